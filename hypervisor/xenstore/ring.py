"""A domain's xenstore ring: transport between its shared page and its `Connection`.

Layout: ``struct xenstore_domain_interface`` of Xen's ``public/io/xs_wire.h``;
reconnection and error indicator: ``docs/misc/xenstore-ring.txt``.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from hypervisor.devices.ring import Consumer, Producer, RingBroken
from hypervisor.xenstore.connection import Connection
from hypervisor.xenstore.errors import ProtocolViolation
from hypervisor.xenstore.server import Server

LOG = logging.getLogger(__name__)

RING_SIZE = 1024
_REQ_AT, _RSP_AT = 0, RING_SIZE
_REQ_CONS, _REQ_PROD, _RSP_CONS, _RSP_PROD = 2048, 2052, 2056, 2060
_FEATURES, _CONNECTION, _ERROR = 2064 // 4, 2068 // 4, 2072 // 4

FEATURES = 1 | 2 | 4 | 8
"""XENSTORE_SERVER_FEATURE_RECONNECTION, _ERROR, _WATCHDEPTH, _DOMID_ANY."""

CONNECTED, RECONNECT = 0, 1

ERROR_RING_INDEX = 2
ERROR_PROTOCOL = 3

REQUESTS_PER_TURN = 8
TURN_SECONDS = 0.002
"""Requests taken in one call, and time for them, before the other domains have their turn."""


class XenstoreRing:
    """Serves one domain. Making one introduces the domain to the server.

    :param page: the shared page, live, 4096 writable bytes.
    :param notify: sends an event to the guest's xenstore port; must not call back.
    :param call_later: asks the host to call a function in so many seconds, never from within the call itself
        (``asyncio.AbstractEventLoop.call_later``). There is at most one call outstanding.
    :raises AlreadyExists: the server has a ring of this domain.
    """

    def __init__(
        self,
        server: Server,
        domid: int,
        page: memoryview,
        notify: Callable[[], None],
        call_later: Callable[[float, Callable[[], None]], object],
    ) -> None:
        self._server = server
        self._domid = domid
        self._notify = notify
        self._call_later = call_later
        self._call_pending = False
        self._fields = page.cast("I")
        restored = server.restored_positions(domid)
        self._broken = restored is not None and self._fields[_ERROR] != 0
        self._requests = Consumer(page, _REQ_AT, RING_SIZE, _REQ_CONS, _REQ_PROD, restored[0] if restored else None)
        self._replies = Producer(page, _RSP_AT, RING_SIZE, _RSP_CONS, _RSP_PROD)
        self._noted = self._requests.position
        self._conn: Connection | None = None
        self._conn = server.introduce(domid, self)
        self._fields[_FEATURES] = FEATURES
        if restored is None:
            self._fields[_ERROR] = 0
            server.note_start(domid, *self.positions())
        elif not self._broken:
            self._skip_sent(restored[1])
        server.settle()
        if restored is not None:
            # The process before may have ended between a change of the ring and the event that tells of it.
            notify()
        # What the guest said while nobody listened was notified to nobody.
        self.resume()

    @property
    def broken(self) -> bool:
        """The guest broke the protocol; nothing is read until it asks for a reconnection."""
        return self._broken

    def on_notify(self) -> None:
        """The guest sent an event, or it is time that `call_later` was told: take requests, send replies."""
        if self._conn is None or self._conn.closed:
            return
        try:
            if self._fields[_CONNECTION] == RECONNECT:
                self._reconnect()
            if not self._broken:
                self._flush()
                self._take_requests()
        except RingBroken as exc:
            self._stop(ERROR_RING_INDEX, str(exc))
        except ProtocolViolation as exc:
            self._stop(ERROR_PROTOCOL, str(exc))

    def reset(self) -> None:
        """Begin anew with empty queues, no watches and no transactions (INTRODUCE of a domain that is served)."""
        if self._conn is not None and not self._conn.closed:
            self._reconnect()

    def close(self) -> None:
        """Let go of the page. A domain that was not released from the server goes on with its next ring."""
        if self._conn is not None:
            self._server.detach(self._conn)
            self._conn = None
            self._requests.close()
            self._replies.close()
            self._fields.release()

    # -- Endpoint -------------------------------------------------------------------------------------------

    def output_ready(self) -> None:
        if self._conn is None or self._broken:
            return
        try:
            self._flush()
        except RingBroken as exc:
            self._stop(ERROR_RING_INDEX, str(exc))

    def resume(self) -> None:
        self._wake_in(0.0)

    def positions(self) -> tuple[int, int]:
        sent = self._conn.sent_of_first if self._conn is not None else 0
        return self._noted, (self._replies.position - sent) & 0xFFFF_FFFF

    # -- inside ---------------------------------------------------------------------------------------------

    def _wake_in(self, seconds: float) -> None:
        if not self._call_pending:
            self._call_pending = True
            self._call_later(seconds, self._woken)

    def _woken(self) -> None:
        self._call_pending = False
        self.on_notify()

    def _take_requests(self) -> None:
        conn = self._conn
        assert conn is not None
        end = self._server.clock() + TURN_SECONDS
        for _ in range(REQUESTS_PER_TURN):
            delay = self._server.throttle(conn)
            if delay:
                self._wake_in(delay)
                return
            if not conn.accepts or not self._take_one(conn) or self._broken:
                return
            if self._server.clock() >= end:
                break
        if self._requests.available():
            self._wake_in(0.0)

    def _take_one(self, conn: Connection) -> bool:
        """Take one request, or the part of one that is there, and handle it. :returns: False when there was nothing."""
        taken = 0
        while wanted := conn.parser.wanted:
            data = self._requests.peek(wanted + taken)[taken:]
            if not data:
                break
            taken += len(data)
            conn.parser.feed(data)
        if not taken:
            return False
        packet = conn.parser.next()
        # The journal has what was read, and what came of it, before the guest may overwrite it.
        self._noted = (self._requests.position + taken) & 0xFFFF_FFFF
        self._server.note_input(conn, self._noted)
        if packet is not None:
            self._server.process(conn, packet)
        else:
            self._server.settle()
        if conn.closed:  # the request released this very domain
            return False
        self._requests.advance(taken)
        self._notify()
        # Also after a part: a guest that added to it before it saw us advance has told nobody (Linux' xb_write
        # sends an event only when the ring was empty), so the ring must be looked at once more.
        return True

    def _flush(self) -> None:
        conn = self._conn
        assert conn is not None
        sent = 0
        while conn.pending and (space := self._replies.space()):
            count = self._replies.write(conn.peek_output(space))
            conn.consume_output(count)
            sent += count
        if sent:
            self._notify()

    def _skip_sent(self, base: int) -> None:
        """Of the output that was restored, leave out what the guest's ring has got already."""
        conn = self._conn
        assert conn is not None
        sent = (self._replies.position - base) & 0xFFFF_FFFF
        if sent <= conn.pending:
            conn.consume_output(sent)
        else:
            self._stop(ERROR_RING_INDEX, "its reply index changed while xenstored was away")

    def _reconnect(self) -> None:
        assert self._conn is not None
        self._server.reset(self._conn)
        self._requests.restart()
        self._replies.restart()
        self._noted = 0
        self._broken = False
        self._fields[_ERROR] = 0
        self._fields[_CONNECTION] = CONNECTED
        self._notify()

    def _stop(self, error: int, why: str) -> None:
        """The guest hurt itself: no more service until it reconnects. Nobody else notices."""
        assert self._conn is not None
        LOG.warning("domain %d: xenstore ring stopped: %s", self._domid, why)
        self._broken = True
        self._fields[_ERROR] = error
        self._server.reset(self._conn)
