"""Takes messages from this host's queues and acknowledges them once they are durable.

One thread, one connection. A lost broker is tried again with growing pauses. At most `prefetch` messages of a queue
are held unacknowledged; while the dispatcher has no room they simply stay so, and the rest waits at the broker. What
has come by the time that the journal is free is taken in and acknowledged together.
"""

from __future__ import annotations

import collections
import contextlib
import fcntl
import itertools
import logging
import threading
import uuid
from collections.abc import Callable, Sequence
from typing import Any

import kombu

from agent import clock, wire
from agent.errors import AlreadyRunning, ConfigError, JournalCorrupt, JournalError
from agent.faults import boundary
from agent.rpc import connection as broker
from agent.rpc import filesystem, queues
from agent.rpc.addresses import Turn
from agent.rpc.tls import VERIFIED, BrokerTls, explain

LOG = logging.getLogger(__name__)

DRAIN_SECONDS = 0.5
FOLDER_DRAIN_SECONDS = 0.1  # a folder is looked at in any case; so a stop takes effect sooner
FULL_SECONDS = 0.05
JOURNAL_PAUSE = 1.0
SWEEP_SECONDS = 300.0
STALE_SECONDS = 3600.0


class Consumer:
    """:param receive: stores messages; when it returns they are acknowledged.

    :param room: how many messages more may be taken in.
    :param sources: the queues; by default the host's own.
    :param on_fatal: called when going on would do harm (damaged journal, second agent on the queue).
    """

    def __init__(
        self,
        url: str,
        host: str,
        receive: Callable[..., None],
        room: Callable[[], int],
        on_fatal: Callable[[Exception], None],
        *,
        prefetch: int = 32,
        poll_seconds: float = broker.POLL_SECONDS,
        max_message_bytes: int = wire.MAX_BYTES,
        longest_pause: float = 30.0,
        sources: Sequence[queues.Source] = (),
        tls: BrokerTls = VERIFIED,
    ) -> None:
        self._tls = tls
        self._url = url
        self._turn = Turn(url)
        self._host = host
        self._receive = receive
        self._room = room
        self._sources = tuple(sources) or (queues.native(host),)
        self._on_fatal = on_fatal
        self._prefetch = prefetch
        self._poll_seconds = poll_seconds
        self._max_message_bytes = max_message_bytes
        self._longest_pause = longest_pause
        self._held: collections.deque[tuple[str, Any]] = collections.deque()  # (dialect, message)
        self._stop = threading.Event()
        self._owner_file: Any = None
        self._swept = float("-inf")
        self._seen: dict[str, dict[str, float]] = {broker.REPLY_PREFIX: {}, broker.REPORT_PREFIX: {}}
        self.connected = threading.Event()
        self._thread = threading.Thread(target=self._main, name="consumer", daemon=True)

    def start(self) -> None:
        """:raises AlreadyRunning: another agent takes instructions from this queue (folder brokers only)."""
        if broker.is_filesystem(self._url):
            self._own_folder()
        self._thread.start()

    def alive(self) -> bool:
        return self._thread.is_alive()

    def stop(self, timeout: float = 10.0) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(timeout)
        if self._owner_file is not None:
            self._owner_file.close()
            self._owner_file = None

    def _own_folder(self) -> None:
        """Be the one consumer of the queue, then put back what a killed one had taken."""
        root, queue = broker.folder(self._url), wire.queue_name(self._host)
        self._owner_file = open(root / "control" / f"{queue}.owner", "ab")  # noqa: SIM115 - held while consuming
        try:
            fcntl.flock(self._owner_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as exc:
            self._owner_file.close()
            self._owner_file = None
            raise AlreadyRunning(
                f"another agent takes instructions for host {self._host!r} from {root}: stop it, or give this one "
                "another [agent] host"
            ) from exc
        if count := filesystem.recover(root, queue):
            LOG.info("%d messages that an earlier agent had taken and not acknowledged are back in the queue", count)

    def _main(self) -> None:
        pause = 0.2
        while not self._stop.is_set():
            try:
                connection = broker.connect(
                    self._turn.url,
                    poll_seconds=self._poll_seconds,
                    max_message_bytes=self._max_message_bytes,
                    tls=self._tls,
                )
            except ConfigError as exc:  # a folder or file that was there at the start
                LOG.warning("%s; trying again in %.1f s", exc, pause)
                self._stop.wait(pause)
                continue
            try:
                self._serve(connection)
                pause = 0.2
            except JournalCorrupt as exc:
                self._on_fatal(exc)
                return
            except broker.broker_errors(connection) as exc:
                if self.connected.is_set():
                    pause = 0.2
                LOG.warning("broker %s: %s; trying again in %.1f s", broker.redact(self._turn.url), explain(exc), pause)
                self._turn.next()
            except Exception as exc:
                LOG.exception("a mistake in the consumer")
                self._on_fatal(exc)
                return
            finally:
                self.connected.clear()
                self._held.clear()  # the broker delivers them again
                _release(connection)
            self._stop.wait(pause)
            pause = min(pause * 2, self._longest_pause)

    def _serve(self, connection: kombu.Connection) -> None:
        channel = connection.channel()
        queues.declare(connection, channel, self._sources)
        channel.basic_qos(0, self._prefetch, False)
        for source in self._sources:
            # Exclusive: a second agent with this host's name is refused by the broker instead of taking half.
            channel.basic_consume(
                queue=source.queue.name,
                no_ack=False,
                exclusive=source.exclusive,
                consumer_tag=f"reeve-agent-{uuid.uuid4().hex[:8]}",
                callback=lambda message, dialect=source.dialect: self._held.append(
                    (dialect, channel.message_to_python(message))
                ),
            )
        names = ", ".join(source.queue.name for source in self._sources)
        LOG.info("taking instructions from %s of %s", names, broker.redact(self._turn.url))
        self.connected.set()
        folder = broker.is_filesystem(self._url)
        idle = FOLDER_DRAIN_SECONDS if folder else DRAIN_SECONDS
        while not self._stop.is_set():
            with contextlib.suppress(TimeoutError):
                connection.drain_events(timeout=FULL_SECONDS if self._held else idle)
                while not folder and len(self._held) < self._prefetch:
                    connection.drain_events(timeout=0)
            connection.heartbeat_check()
            self._take_in()
            self._sweep()

    def _take_in(self) -> None:
        while self._held and (room := self._room()) > 0 and not self._stop.is_set():
            batch = list(itertools.islice(self._held, min(int(room), self._prefetch)))
            boundary("consumer:taken")
            try:
                self._receive(*(_raw(message, dialect) for dialect, message in batch))
            except JournalCorrupt:
                raise
            except JournalError as exc:
                LOG.error("a message waits: %s", exc)
                self._stop.wait(JOURNAL_PAUSE)
                return
            boundary("consumer:journalled")
            for _ in batch:
                self._held.popleft()
            if broker.is_filesystem(self._url):
                for _, message in batch:
                    message.ack()
            else:
                # They are held in the order in which the channel delivered them: this answers for all.
                batch[-1][1].ack(multiple=True)
            boundary("consumer:acked")

    def _sweep(self) -> None:
        """A folder has no expiry: remove replies and reports nobody fetched."""
        now = clock.elapsed()
        if not broker.is_filesystem(self._url) or now - self._swept < SWEEP_SECONDS:
            return
        self._swept = now
        root = broker.folder(self._url)
        for prefix in (broker.REPLY_PREFIX, broker.REPORT_PREFIX):
            if count := filesystem.sweep(root, prefix, STALE_SECONDS, now, self._seen[prefix]):
                LOG.info("%d messages nobody fetched were removed (%s)", count, prefix)


def _raw(message: Any, dialect: str) -> wire.Raw:
    body = message.body
    data = body.encode() if isinstance(body, str) else bytes(body or b"")
    headers = {str(key): value for key, value in (message.headers or {}).items()}
    size = headers.get("x-reeve-size")
    return wire.Raw(
        body=data,
        size=size if isinstance(size, int) else len(data),
        content_type=str(message.content_type or ""),
        content_encoding=str(message.content_encoding or ""),
        headers=headers,
        reply_to=str(message.properties.get("reply_to") or ""),
        correlation_id=str(message.properties.get("correlation_id") or ""),
        dialect=dialect,
        expiration=str(message.properties.get("expiration") or ""),
    )


def _release(connection: kombu.Connection) -> None:
    try:
        connection.release()
    except broker.broker_errors(connection) as exc:
        LOG.debug("while closing: %s", explain(exc))
