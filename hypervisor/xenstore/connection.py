"""One client of xenstored: a domain over its ring, or a tool over a socket.

A connection holds what has been said and not yet been heard, in both
directions, and nothing of it can grow without bound:

* input: one unfinished packet;
* replies: a client with `Limits.outstanding` unread ones is not read from;
* watch events: equal ones are sent once; beyond `Limits.event_bytes` a
  domain loses events, its own fault. A domain with as many bytes of events
  waiting at tools is not read from until the tools have caught up, so no
  domain floods a tool, no domain can hold up another, and a tool that never
  reads holds up nobody for long: its transport cuts it off.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any, Protocol

from hypervisor.devices.rate import Bucket
from hypervisor.xenstore.perms import Who
from hypervisor.xenstore.quota import Limits
from hypervisor.xenstore.transaction import Transaction
from hypervisor.xenstore.wire import Op, Packet, Parser


class Endpoint(Protocol):
    """The transport of a connection, as the server sees it."""

    def output_ready(self) -> None:
        """There is output to take; take no request here."""

    def resume(self) -> None:
        """The connection accepts requests again; arrange to be run soon."""

    def positions(self) -> tuple[int, int]:
        """Ring indices (req_cons, rsp_prod) to save; (0, 0) for a socket."""


@dataclass(slots=True)
class _Message:
    data: bytes
    is_event: bool
    origin: Connection | None


class Connection:
    """:ivar endpoint: None while nobody is attached (a domain between restart and re-introduction).

    :ivar limits: the domain's; they do not bind dom0, except `Limits.tool_output_bytes`.
    """

    def __init__(self, who: Who, limits: Limits, bucket: Bucket, label: str = "") -> None:
        self.who = who
        self.limits = limits
        self.bucket = bucket
        self.label = label or f"domain {who.domid}"
        self.endpoint: Endpoint | None = None
        self.closed = False
        self.parser = Parser()
        self.transactions: dict[int, Transaction] = {}
        self.dropped_events = 0
        self._next_transaction = 1
        self._out: deque[_Message] = deque()
        self._offset = 0
        self._bytes = 0
        self._events: set[bytes] = set()
        self._event_bytes = 0
        self._replies = 0
        self._blamed = 0

    # -- requests -----------------------------------------------------------------------------------------

    @property
    def accepts(self) -> bool:
        """Whether another request may be taken from this client now."""
        if self.closed:
            return False
        if self.who.privileged:
            return self._bytes < self.limits.tool_output_bytes
        return self._replies < self.limits.outstanding and self._blamed < self.limits.event_bytes

    @property
    def outstanding(self) -> int:
        """Replies it has not read."""
        return self._replies

    @property
    def stuck(self) -> bool:
        """A tool that lets its output pile up beyond every measure."""
        return self.who.privileged and self._bytes > 16 * self.limits.tool_output_bytes

    def new_transaction_id(self) -> int:
        while True:
            ident = self._next_transaction
            self._next_transaction = ident % 0xFFFF_FFFF + 1
            if ident not in self.transactions:
                return ident

    def set_limits(self, limits: Limits) -> None:
        self.limits = limits
        for transaction in self.transactions.values():
            transaction.limits = limits

    # -- output -------------------------------------------------------------------------------------------

    @property
    def pending(self) -> int:
        """Bytes of output not yet taken."""
        return self._bytes - self._offset

    @property
    def sent_of_first(self) -> int:
        """Bytes of the first queued message that have been sent."""
        return self._offset

    def push_reply(self, packet: Packet) -> bytes:
        """Queue a reply. :returns: its bytes, for the journal."""
        data = packet.encode()
        self._push(_Message(data, False, None))
        return data

    def push_event(self, payload: bytes, origin: Connection | None, *, once: bool = True) -> bytes | None:
        """Queue a watch event.

        :param origin: whose change it is; held back while tools have too much of it to read.
        :param once: leave it out when an equal one is waiting.
        :returns: its bytes, or None when it was left out.
        """
        data = Packet(Op.WATCH_EVENT, 0, 0, payload).encode()
        if once and data in self._events:
            return None
        if not self.who.privileged and self._event_bytes + len(data) > self.limits.event_bytes:
            self.dropped_events += 1
            return None
        blame = origin if origin is not self and self.who.privileged else None
        self._push(_Message(data, True, blame))
        return data

    def peek_output(self, size: int) -> bytes:
        """Up to `size` of the next bytes to send, left in the queue."""
        parts: list[bytes] = []
        skip = self._offset
        for message in self._out:
            if size <= 0:
                break
            part = message.data[skip : skip + size]
            parts.append(part)
            size -= len(part)
            skip = 0
        return b"".join(parts)

    def consume_output(self, size: int) -> None:
        """The first `size` bytes have been sent. Wakes whom they held up."""
        was_accepting = self.accepts
        self._offset += size
        woken: list[Connection] = []
        while self._out and self._offset >= len(self._out[0].data):
            message = self._out.popleft()
            self._offset -= len(message.data)
            self._bytes -= len(message.data)
            if not message.is_event:
                self._replies -= 1
                continue
            self._events.discard(message.data)
            self._event_bytes -= len(message.data)
            if message.origin is not None and message.origin._forgive(len(message.data)):
                woken.append(message.origin)
        if not was_accepting and self.accepts:
            woken.append(self)
        for connection in woken:
            if connection.endpoint is not None:
                connection.endpoint.resume()

    def rewind(self) -> None:
        """The first queued message counts as unsent as a whole; its transport knows how much of it was sent."""
        self._offset = 0

    def reset(self) -> None:
        """Forget input, output and transactions (not the watches, which the server keeps)."""
        self.parser.clear()
        self.transactions.clear()
        self.consume_output(self.pending)

    def close(self) -> None:
        self.reset()
        self.closed = True

    # -- persistence --------------------------------------------------------------------------------------

    def save(self) -> dict[str, Any]:
        """JSON form of what survives a restart. Of transactions the numbers do, their contents do not."""
        return {
            "in": self.parser.pending.decode("latin-1"),
            "out": [[m.data.decode("latin-1"), m.is_event] for m in self._out],
            "transactions": sorted(self.transactions),
            "next_transaction": self._next_transaction,
        }

    def load(self, data: dict[str, Any]) -> None:
        """Into a fresh connection; the server makes the transactions anew."""
        self.parser = Parser(data["in"].encode("latin-1"))
        for text, is_event in data["out"]:
            self._push(_Message(text.encode("latin-1"), bool(is_event), None))
        self._next_transaction = int(data["next_transaction"])

    def _push(self, message: _Message) -> None:
        self._out.append(message)
        self._bytes += len(message.data)
        if message.is_event:
            self._events.add(message.data)
            self._event_bytes += len(message.data)
            if message.origin is not None:
                message.origin._blamed += len(message.data)
        else:
            self._replies += 1

    def _forgive(self, size: int) -> bool:
        """So much less to wait for. :returns: whether requests are accepted again just now."""
        before = self.accepts
        self._blamed -= size
        return not before and self.accepts
