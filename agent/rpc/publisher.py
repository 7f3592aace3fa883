"""Publishes replies and notifications from the journal's outbox, and reports from memory.

A reply leaves the outbox when the broker has confirmed it (RabbitMQ: publisher confirm; folder: fsync), so it
is sent at least once. A reply that no queue takes is tried again, once a second, for `reply_seconds`; for as long again
that queue counts as gone and other replies to it are not tried. Neither the broker's absence nor a clock that is set
counts as trying. Reports are worth something only while they are
fresh: the oldest are dropped when the broker stays away. Signs of life (`agent.heartbeats`) are not kept at all.
"""

from __future__ import annotations

import collections
import contextlib
import logging
import threading
from collections.abc import Callable, Sequence

import kombu

from agent import clock, wire
from agent.errors import ConfigError, JournalCorrupt, JournalError
from agent.faults import boundary
from agent.heartbeats import Heartbeats
from agent.journal import Journal, OutboxRow
from agent.rpc import connection as broker
from agent.rpc.addresses import Turn
from agent.rpc.sender import AmqpSender, FolderSender
from agent.rpc.tls import VERIFIED, BrokerTls, explain
from agent.signing import Signer

LOG = logging.getLogger(__name__)

IDLE_SECONDS = 1.0
MAX_REPORTS = 1000
REPORT_BATCH = 50
JOURNAL_PAUSE = 1.0
RETURNED_PAUSE = 1.0
MAX_GONE = 1000


class Publisher:
    """One thread, one connection.

    :param reply_seconds: how long an undeliverable reply is tried.
    :param heartbeats: signs of life to send; call `wake` when there is a new one.
    :param prepare: makes what messages are sent to, on each new connection.
    :param on_fatal: called when the journal is damaged: the agent must end.
    """

    def __init__(
        self,
        url: str,
        journal: Journal,
        *,
        reply_seconds: float = 60.0,
        longest_pause: float = 30.0,
        heartbeats: Heartbeats | None = None,
        prepare: Callable[[kombu.Connection], None] = lambda connection: None,
        tls: BrokerTls = VERIFIED,
        signer: Signer | None = None,
        on_fatal: Callable[[Exception], None] = lambda exc: None,
    ) -> None:
        self._on_fatal = on_fatal
        self._signer = signer
        self._tls = tls
        self._prepare = prepare
        self._url = url
        self._turn = Turn(url)
        self._heartbeats = heartbeats or Heartbeats()
        self._journal = journal
        self.reply_seconds = reply_seconds
        self._longest_pause = longest_pause
        self._reports: collections.deque[wire.Outgoing] = collections.deque(maxlen=MAX_REPORTS)
        self._gone: dict[str, float] = {}  # reply queues nobody has, until when
        self._wake = threading.Event()
        self._stop = threading.Event()
        self._idle = threading.Event()
        self.connected = threading.Event()
        self._thread = threading.Thread(target=self._main, name="publisher", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def alive(self) -> bool:
        return self._thread.is_alive()

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
                connection = broker.connect(self._turn.url, confirm=False, tls=self._tls)
            except ConfigError as exc:  # a folder or file that was there at the start
                LOG.warning("%s; trying again in %.1f s", exc, pause)
                self._stop.wait(pause)
                continue
            try:
                self._serve(connection)
            except JournalCorrupt as exc:
                LOG.error("replies are no longer sent: %s", exc)
                self._on_fatal(exc)
                return
            except broker.broker_errors(connection) as exc:
                if self.connected.is_set():
                    pause = 0.2
                LOG.warning("broker %s: %s; trying again in %.1f s", broker.redact(self._turn.url), explain(exc), pause)
                self._turn.next()
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
        sender = FolderSender(connection) if broker.is_filesystem(self._url) else AmqpSender(connection)
        self._prepare(connection)
        self.connected.set()
        while not self._stop.is_set():
            self._wake.clear()
            wait = self._beat(sender)
            # Replies before reports: someone waits for them.
            try:
                if rows := self._journal.outbox():
                    self._replies(sender, rows)
                    continue
            except JournalCorrupt:
                raise
            except JournalError as exc:
                LOG.error("replies wait: %s", exc)
                self._stop.wait(JOURNAL_PAUSE)
                self._wake.set()  # not idle: nobody knows what waits
            while self._reports:
                reports = [self._reports[n] for n in range(min(len(self._reports), REPORT_BATCH))]
                sender.send(reports, mandatory=False)
                for report in reports:
                    if self._reports and self._reports[0] is report:
                        self._reports.popleft()
            if not self._wake.is_set():
                self._idle.set()
                self._wake.wait(min(IDLE_SECONDS, wait))
            self._keep_alive(connection)

    def _beat(self, sender: AmqpSender | FolderSender) -> float:
        """Send the signs of life that are due; seconds until the next one."""
        messages, wait = self._heartbeats.due()
        if messages:
            for message, taken in zip(messages, sender.send(messages, mandatory=True), strict=True):
                if not taken:
                    self._heartbeats.gone(message.routing_key)
        return wait

    def _replies(self, sender: AmqpSender | FolderSender, rows: Sequence[OutboxRow]) -> None:
        now = clock.elapsed()
        self._gone = {queue: until for queue, until in self._gone.items() if now < until}
        known = [row for row in rows if row.routing_key not in self._gone]
        messages = [
            wire.Outgoing(
                row.exchange, row.routing_key, row.body, row.correlation_id, row.content_type, self._headers(row)
            )
            for row in known
        ]
        boundary("publisher:before")
        taken = sender.send(messages, mandatory=True)
        boundary("publisher:published")
        settled, again = [row.seq for row in rows if row.routing_key in self._gone], []
        for row, ok in zip(known, taken, strict=True):
            tried = row.attempts * RETURNED_PAUSE >= self.reply_seconds
            if ok or tried:
                settled.append(row.seq)
            else:
                again.append(row.seq)
            if not ok and tried:
                LOG.warning(
                    "reply to %s given up: nobody has a queue %r any more; it stays in the journal",
                    row.correlation_id or "?",
                    row.routing_key,
                )
                if len(self._gone) < MAX_GONE:
                    self._gone[row.routing_key] = now + self.reply_seconds
        self._journal.published(*settled)
        self._journal.postpone(RETURNED_PAUSE, *again)

    def _headers(self, row: OutboxRow) -> dict[str, str]:
        """Instructions to other agents and replies are signed when they are sent, however long they have waited."""
        if self._signer is None or row.exchange:
            return {}
        if row.body.startswith(wire.REPLY_HEAD):
            return self._signer.reply_headers(row.body, row.correlation_id)
        return self._signer.headers(row.body) if row.routing_key.startswith(wire.queue_name("")) else {}

    def _keep_alive(self, connection: kombu.Connection) -> None:
        if broker.is_filesystem(self._url):
            return
        connection.heartbeat_check()
        with contextlib.suppress(TimeoutError):
            connection.drain_events(timeout=0.001)
