"""netif's two rings: requests in, responses out, each in its page (public/io/ring.h, netif.h).

The guest is hostile: its index is read once and checked, each request is copied once. Our own
indices are kept here. A response lies over the request of the same slot, so that a driver killed between
writing it and publishing it leaves a slot that is neither. For that:

- A transmit request that is done has its ``size`` set to 0 first, which no request to send has; the
  response covers other bytes. The next driver answers it and does not send it again.
- Receive requests are noted in a `Journal` before responses cover them, and taken from there again.
"""

from __future__ import annotations

import struct
import threading
from typing import NamedTuple

from hypervisor import abi
from hypervisor.devices.driver import DeviceBroken

SLOTS = 256
"""Of both rings: the largest power of two of 12- and of 8-byte slots behind 64 bytes of a page."""
_MASK = SLOTS - 1
_MASK32 = 0xFFFF_FFFF
_FIRST = 64
_REQ_PROD, _REQ_EVENT, _RSP_PROD, _RSP_EVENT = range(4)

_TX_BYTES, _RX_BYTES = 12, 8
_TX_REQUEST = struct.Struct("<IHHHH")
_EXTRA = struct.Struct("<BBHBBH")
_TX_RESPONSE = struct.Struct("<Hh")
_TX_SIZE_AT = 10
_RX_REQUEST = struct.Struct("<HHI")
_RX_RESPONSE = struct.Struct("<HHHh")

RSP_OKAY, RSP_NULL = 0, 1

_fence = threading.Lock()


def barrier() -> None:
    """Stores before are seen by the guest before anything is loaded after (a locked instruction does that on x86)."""
    _fence.acquire()
    _fence.release()


class TxRequest(NamedTuple):
    gref: int
    offset: int
    flags: int
    id: int
    size: int


class Extra(NamedTuple):
    """``netif_extra_info``: `size`, `gso_type` of a GSO one. :ivar raw: the union's 6 bytes (a multicast address)."""

    type: int
    flags: int
    size: int
    gso_type: int
    raw: bytes


class RxRequest(NamedTuple):
    id: int
    gref: int


class RxResponse(NamedTuple):
    """:ivar raw: an extra info's 8 bytes in place of a response."""

    id: int
    flags: int
    status: int
    raw: bytes = b""


class _Ring:
    """:ivar cons: requests taken; `produced`: responses published. Free-running, 32 bits."""

    def __init__(self, page: memoryview) -> None:
        self._page = page
        self._indices = page[:16].cast("I")
        self.produced = self._indices[_RSP_PROD]
        self.cons = self.produced

    def waiting(self) -> int:
        """Requests that are not taken. :raises DeviceBroken: more than the ring holds."""
        prod = self._indices[_REQ_PROD]
        count = (prod - self.cons) & _MASK32
        if count + self.taken() > SLOTS:
            raise DeviceBroken(f"the front end claims {count} requests in a ring of {SLOTS}")
        return count

    def taken(self) -> int:
        """Requests without a published response."""
        return (self.cons - self.produced) & _MASK32

    def ask(self, count: int = 1) -> bool:
        """Ask for an event at the `count`-th request from here; whether as many are there already."""
        self._indices[_REQ_EVENT] = (self.cons + count) & _MASK32
        barrier()
        return self.waiting() >= count

    def _publish(self, count: int) -> bool:
        """Whether the guest wants to hear of it."""
        before = self.produced
        self.produced = after = (before + count) & _MASK32
        self._indices[_RSP_PROD] = after
        barrier()
        return (after - self._indices[_RSP_EVENT]) & _MASK32 < count

    def close(self) -> None:
        """Let go of the page: nothing else is allowed afterwards."""
        self._indices.release()


class TxRing(_Ring):
    """What the guest sends. :ivar done_before: requests up to here were there when this driver came."""

    def __init__(self, page: memoryview) -> None:
        super().__init__(page)
        self._left = self.waiting()

    @property
    def old(self) -> bool:
        """The next request may have been served by a driver before this one."""
        return self._left > 0

    def peek(self, ahead: int) -> TxRequest:
        """A copy of the request `ahead` places behind the next one."""
        return TxRequest._make(_TX_REQUEST.unpack_from(self._page, self._at(self.cons + ahead)))

    def peek_extra(self, ahead: int) -> Extra:
        raw = bytes(self._page[(at := self._at(self.cons + ahead)) : at + _EXTRA.size])
        kind, flags, size, gso_type, _, _ = _EXTRA.unpack(raw)
        return Extra(kind, flags, size, gso_type, raw[2:])

    def take(self, count: int) -> None:
        self.cons = (self.cons + count) & _MASK32
        self._left = max(0, self._left - count)

    def mark(self, index: int) -> None:
        """The frame whose first request lies at `index` needs nothing but its responses."""
        at = self._at(index) + _TX_SIZE_AT
        self._page[at : at + 2] = b"\0\0"

    def respond(self, index: int, id_: int, status: int) -> None:
        _TX_RESPONSE.pack_into(self._page, self._at(index), id_, status)

    def respond_extra(self, index: int) -> None:
        """Leaves the extra's type and flags: a driver after this one walks over them."""
        at = self._at(index)
        self._page[at + 2 : at + 4] = RSP_NULL.to_bytes(2, "little")

    def publish(self, count: int) -> bool:
        """Show `count` more responses; whether to notify the guest."""
        return self._publish(count)

    @staticmethod
    def _at(index: int) -> int:
        return _FIRST + (index & _MASK) * _TX_BYTES


class RxRing(_Ring):
    """Where the guest wants what arrives."""

    def __init__(self, page: memoryview, journal: Journal) -> None:
        super().__init__(page)
        self._journal = journal
        self._again = journal.load(self.produced)
        if len(self._again) > self.waiting():
            self._again = []  # the guest has made a new ring at the same place

    def take(self) -> RxRequest:
        """The next request; `waiting` must have said that there is one."""
        ahead = (self.cons - self.produced) & _MASK32
        if ahead < len(self._again):
            request = self._again[ahead]
        else:
            id_, _, gref = _RX_REQUEST.unpack_from(self._page, self._at(self.cons))
            request = RxRequest(id_, gref)
        self.cons = (self.cons + 1) & _MASK32
        return request

    def respond(self, requests: list[RxRequest], responses: list[RxResponse]) -> bool:
        """Answer the oldest requests that were taken and show it; whether to notify the guest."""
        again = self._again
        self._journal.store(self.produced, [*requests, *again[len(requests) :]])
        index = self.produced
        for response in responses:
            at = self._at(index)
            if response.raw:
                self._page[at : at + _RX_BYTES] = response.raw
            else:
                _RX_RESPONSE.pack_into(self._page, at, response.id, 0, response.flags, response.status)
            index += 1
        notify = self._publish(len(responses))
        self._again = again[len(requests) :]
        self._journal.store(self.produced, self._again)
        return notify

    @staticmethod
    def _at(index: int) -> int:
        return _FIRST + (index & _MASK) * _RX_BYTES


def gso_extra(kind: int, size: int, *, more: bool = False) -> bytes:
    """A ``netif_extra_info`` for a frame to be cut into segments of `size` bytes."""
    return _EXTRA.pack(abi.XEN_NETIF_EXTRA_TYPE_GSO, abi.XEN_NETIF_EXTRA_FLAG_MORE if more else 0, size, kind, 0, 0)


class Journal:
    """Receive requests whose slots may be half overwritten: memory that outlives a driver process.

    Layout: u32 index of the first, u32 count, then (u32 id, u32 gref) each. The count is 0 while the rest
    changes. A driver sees its own guest's data there, and nobody else believes it.
    """

    BYTES = 4096
    _HEAD = struct.Struct("<II")
    _ENTRY = struct.Struct("<II")

    def __init__(self, memory: memoryview) -> None:
        if len(memory) != self.BYTES:
            raise ValueError(f"a journal has {self.BYTES} bytes")
        self._memory = memory

    def load(self, produced: int) -> list[RxRequest]:
        """The requests from index `produced` on; empty if it tells of another place."""
        start, count = self._HEAD.unpack_from(self._memory)
        passed = (produced - start) & _MASK32
        if not passed <= count <= SLOTS:
            return []
        entries = self._ENTRY.iter_unpack(self._memory[8 : 8 + count * 8])
        return [RxRequest(id_ & 0xFFFF, gref) for id_, gref in entries][passed:]

    def store(self, start: int, requests: list[RxRequest]) -> None:
        count = len(requests)
        self._memory[4:8] = b"\0\0\0\0"
        if count:
            data = b"".join([self._ENTRY.pack(request.id, request.gref) for request in requests])
            self._memory[8 : 8 + len(data)] = data
            self._HEAD.pack_into(self._memory, 0, start, count)
