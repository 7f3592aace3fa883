"""Publishes replies from the journal's outbox and reports from memory.

A reply leaves the outbox when the broker has confirmed it (RabbitMQ: publisher confirm; folder: fsync), so it
is sent at least once. A reply that no queue takes is tried again until it is `reply_seconds` old. Reports are
worth something only while they are fresh: the oldest are dropped when the broker stays away.
"""

from __future__ import annotations

import collections
import contextlib
import logging
import threading
import time
from typing import Any

import kombu

from agent import wire
from agent.errors import ConfigError, JournalCorrupt, JournalError, Unroutable
from agent.faults import boundary
from agent.journal import Journal, OutboxRow
from agent.rpc import connection as broker

LOG = logging.getLogger(__name__)

IDLE_SECONDS = 1.0
CONFIRM_SECONDS = 30
MAX_REPORTS = 1000
RETURNED_PAUSE = 1.0


class Publisher:
    """One thread, one connection. :param reply_seconds: how long an undeliverable reply is tried."""

    def __init__(
        self,
        url: str,
        journal: Journal,
        *,
        reply_seconds: float = 60.0,
        longest_pause: float = 30.0,
    ) -> None:
        self._url = url
        self._journal = journal
        self._reply_seconds = reply_seconds
        self._longest_pause = longest_pause
        self._reports: collections.deque[wire.Outgoing] = collections.deque(maxlen=MAX_REPORTS)
        self._returned: BaseException | None = None
        self._wake = threading.Event()
        self._stop = threading.Event()
        self._idle = threading.Event()
        self.connected = threading.Event()
        self._thread = threading.Thread(target=self._main, name="publisher", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def wake(self) -> None:
        """There may be something in the outbox."""
        self._idle.clear()
        self._wake.set()

    def report(self, report: wire.Report) -> None:
        try:
            self._reports.append(wire.encode_report(report))
        except (TypeError, ValueError):
            LOG.exception("a %s report that is no JSON is dropped", report.kind)
        self.wake()

    def flush(self, timeout: float) -> bool:
        """Wait until everything due is published; False when it took longer than `timeout` seconds."""
        self.wake()
        return self._idle.wait(timeout)

    def stop(self, timeout: float = 10.0) -> None:
        self._stop.set()
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(timeout)

    def _main(self) -> None:
        pause = 0.2
        while not self._stop.is_set():
            try:
                connection = broker.connect(self._url)
            except ConfigError as exc:  # a folder that was there at the start
                LOG.warning("%s; trying again in %.1f s", exc, pause)
                self._stop.wait(pause)
                continue
            try:
                self._serve(connection)
            except JournalCorrupt as exc:
                LOG.error("replies are no longer sent: %s", exc)
                return
            except JournalError as exc:
                LOG.error("replies wait: %s", exc)
            except broker.broker_errors(connection) as exc:
                if self.connected.is_set():
                    pause = 0.2
                LOG.warning("broker %s: %s; trying again in %.1f s", broker.redact(self._url), exc, pause)
            except Exception:
                LOG.exception("a mistake in the publisher; trying again in %.1f s", pause)
            finally:
                self.connected.clear()
                try:
                    connection.release()
                except broker.broker_errors(connection) as exc:
                    LOG.debug("while closing: %s", exc)
            self._stop.wait(pause)
            pause = min(pause * 2, self._longest_pause)

    def _serve(self, connection: kombu.Connection) -> None:
        channel = connection.channel()
        broker.REPORTS(channel).declare()
        # A folder takes every message: nothing is ever returned.
        on_return = None if broker.is_filesystem(self._url) else self._on_return
        producer = kombu.Producer(channel, on_return=on_return)
        self.connected.set()
        while not self._stop.is_set():
            self._wake.clear()
            # Replies first: someone waits for them.
            while rows := self._journal.outbox():
                for row in rows:
                    self._reply(producer, row)
                if self._stop.is_set():
                    return
            while self._reports:
                report = self._reports[0]
                self._send(producer, report, mandatory=False)
                if self._reports and self._reports[0] is report:
                    self._reports.popleft()
            if not self._wake.is_set():
                self._idle.set()
                self._wake.wait(IDLE_SECONDS)
            self._keep_alive(connection)

    def _reply(self, producer: kombu.Producer, row: OutboxRow) -> None:
        message = wire.Outgoing(row.exchange, row.routing_key, row.body, row.correlation_id, row.content_type)
        boundary("publisher:before")
        try:
            self._send(producer, message, mandatory=True)
        except Unroutable as exc:
            if time.time() - row.created > self._reply_seconds:
                LOG.warning("reply to %s given up: %s; it stays in the journal", row.correlation_id or "?", exc)
                self._journal.published(row.seq)
            else:
                self._journal.postpone(row.seq, RETURNED_PAUSE)
            return
        boundary("publisher:published")
        self._journal.published(row.seq)

    def _send(self, producer: kombu.Producer, message: wire.Outgoing, *, mandatory: bool) -> None:
        """:raises Unroutable: the broker has no such queue."""
        self._returned = None
        producer.publish(
            message.body,
            exchange=message.exchange,
            routing_key=message.routing_key,
            content_type=message.content_type,
            content_encoding="utf-8",
            correlation_id=message.correlation_id or None,
            delivery_mode=2,
            mandatory=mandatory,
            timeout=CONFIRM_SECONDS,
        )
        if self._returned is not None:
            raise Unroutable(f"nobody has a queue {message.routing_key!r} any more")

    def _on_return(self, exc: BaseException, *_rest: Any) -> None:
        self._returned = exc

    def _keep_alive(self, connection: kombu.Connection) -> None:
        if broker.is_filesystem(self._url):
            return
        connection.heartbeat_check()
        with contextlib.suppress(TimeoutError):
            connection.drain_events(timeout=0.001)
