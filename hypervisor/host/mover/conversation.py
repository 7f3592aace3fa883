"""Records over one TLS connection, in a mover process. Single-threaded; whoever waits serves the channel meanwhile."""

from __future__ import annotations

import select
import time
from collections.abc import Callable
from typing import Any

from hypervisor.host.mover import wire
from hypervisor.host.mover.tls import PeerClosed, TlsSocket
from hypervisor.host.mover.wire import Header, Kind
from hypervisor.types import PAGE_SIZE

SILENCE = 20.0
"""Seconds without a byte from the other side after which it counts as gone; each says something every `PING_EVERY`."""
PING_EVERY = 5.0
_WAIT_STEP = 1.0
_TURN = 128
"""Steps of reading before something else has a turn."""


class Conversation:
    """:param allowed: kinds that the other side may send.

    :param on_record: called with each whole record; its body is good during the call.
    :param channel_fd: of the channel to the host process; `serve` is called when it can be read.
    """

    def __init__(
        self,
        tls: TlsSocket,
        allowed: frozenset[Kind],
        on_record: Callable[[Header, memoryview], None],
        channel_fd: int,
        serve: Callable[[], None],
    ) -> None:
        self._tls = tls
        self._allowed = allowed
        self._on_record = on_record
        self._channel_fd = channel_fd
        self._serve = serve
        self._head = memoryview(bytearray(wire.HEADER.size))
        self._body = memoryview(bytearray(wire.MAX_BATCH * (wire.INDEX_BYTES + PAGE_SIZE)))
        self._header: Header | None = None
        self._have = 0
        self._heard = self._said = time.monotonic()
        self._sending = False
        self._more = False

    @property
    def bytes_sent(self) -> int:
        return self._tls.bytes_sent

    # -- in

    def take(self) -> None:
        """Records that lie ready, for a while. :raises PeerClosed, BadRecord."""
        self._more = False
        for _ in range(_TURN):
            buffer = self._head if self._header is None else self._body[: self._header.length]
            if self._have < len(buffer):
                got = self._tls.read_into(buffer[self._have :])
                if not got:
                    return
                self._heard = time.monotonic()
                self._have += got
                if self._have < len(buffer):
                    continue
            self._have = 0
            if self._header is None:
                self._header = wire.parse_header(self._head, self._allowed)
                continue
            head, self._header = self._header, None
            if head.kind is not Kind.PING:
                self._on_record(head, buffer)
        self._more = True

    # -- out

    def send(self, pieces: list[Any]) -> None:
        """One record, whole; what the other side says meanwhile is taken. :raises PeerClosed, BadRecord."""
        self._sending = True
        for piece in pieces:
            view = memoryview(piece)
            while view:
                taken = self._tls.write(view)
                view = view[taken:]
                if view and not taken:
                    self.wait(_WAIT_STEP)
        self._sending = False
        self._said = time.monotonic()

    def flush(self) -> None:
        while not self._tls.flush():
            self.wait(_WAIT_STEP)

    # -- waiting

    def wait(self, timeout: float) -> None:
        """For at most so long: take what arrives, let out what waits, serve the channel.

        :raises PeerClosed, BadRecord.
        """
        now = time.monotonic()
        if now - self._heard > SILENCE:
            raise PeerClosed(f"the other side was silent for {SILENCE:g} s")
        if now - self._said > PING_EVERY and self._tls.idle and not self._sending:
            self._said = now
            self._tls.write(wire.record(Kind.PING))
        poll = select.poll()
        poll.register(self._tls.fileno(), select.POLLIN | (0 if self._tls.idle else select.POLLOUT))
        poll.register(self._channel_fd, select.POLLIN)
        ready = dict(poll.poll(0 if self._more else max(0.0, min(timeout, _WAIT_STEP)) * 1000))
        if self._more or ready.get(self._tls.fileno(), 0) & (select.POLLIN | select.POLLHUP | select.POLLERR):
            self.take()
        self._tls.flush()
        if self._channel_fd in ready:
            self._serve()
