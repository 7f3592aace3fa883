"""The ring of a block front end: requests in, responses out (public/io/ring.h, public/io/blkif.h).

Requests and responses share slots: response n lies where request n was. Responses are pushed in the order of the
requests, so a single index says how far we are (``req_cons`` is ``rsp_prod``), it lies in the ring, and
what has no response can be done again from there.

The guest may write every byte at any time: a slot is copied once and decoded from the copy, and the producer index
is read once and checked. Our own index is kept here; a guest that scribbles on it changes nothing until a restart.
"""

from __future__ import annotations

import dataclasses
import enum
import struct
import threading
from collections.abc import Sequence

from hypervisor.devices.driver import DeviceBroken

PAGE = 4096
SECTOR = 512
SECTORS_A_PAGE = PAGE // SECTOR
MAX_SEGMENTS = 11
MAX_INDIRECT = 256
"""Segments of an indirect request, as Linux's back end offers."""
MAX_RING_ORDER = 4

_HEADER = 64
_REQ_PROD, _REQ_EVENT, _RSP_PROD, _RSP_EVENT = 0, 1, 2, 3
_MASK = 0xFFFF_FFFF


class Op(enum.IntEnum):
    """BLKIF_OP_*."""

    READ = 0
    WRITE = 1
    WRITE_BARRIER = 2
    FLUSH = 3
    DISCARD = 5
    INDIRECT = 6


OKAY, ERROR, EOPNOTSUPP = 0, -1, -2
"""BLKIF_RSP_*."""

Segment = tuple[int, int, int]
"""Grant reference, first and last sector in its frame."""


@dataclasses.dataclass(frozen=True, slots=True)
class Layout:
    """Where fields are: the two ABIs differ in the alignment of 64-bit numbers.

    :ivar slot: bytes of a slot. :ivar segments: where a request's segments begin; a discard's sector count, too.
    :ivar references: where an indirect request's grant references begin.
    """

    slot: int
    head: struct.Struct
    indirect: struct.Struct
    segments: int
    references: int
    response: struct.Struct


LAYOUTS = {
    "x86_64-abi": Layout(112, struct.Struct("<BBH4xQQ"), struct.Struct("<BBH4xQQ"), 24, 28, struct.Struct("<QBxh4x")),
    "x86_32-abi": Layout(108, struct.Struct("<BBHQQ"), struct.Struct("<BBHQQ"), 20, 24, struct.Struct("<QBxh")),
}
"""By the value of a front end's node ``protocol`` (public/io/protocols.h)."""

_SEGMENTS = [struct.Struct("<" + "IBBxx" * count) for count in range(MAX_SEGMENTS + 1)]
_SEGMENT = struct.Struct("<IBBxx")
_REFERENCES = struct.Struct("<8I")
_COUNT = struct.Struct("<Q")
SEGMENTS_A_PAGE = PAGE // _SEGMENT.size


@dataclasses.dataclass(slots=True)
class Request:
    """What a slot said; nothing of it has been checked.

    :ivar operation: as in the slot. :ivar kind: what is to be done: of an indirect request its inner operation. That
        is what Linux's front end wants to be echoed.
    :ivar sector: first sector on the disk; `count` of a discard, sectors.
    :ivar references: of pages that hold segments; `indirect` how many segments these are.
    """

    operation: int
    kind: int
    id: int
    sector: int
    segments: list[Segment]
    declared: int = 0
    count: int = 0
    references: tuple[int, ...] = ()
    indirect: int = 0


def decode(data: bytes, layout: Layout) -> Request:
    """A copied slot."""
    operation, second, third, ident, sector = layout.head.unpack_from(data)
    if operation == Op.INDIRECT:
        references = _REFERENCES.unpack_from(data, layout.references)
        return Request(operation, second, ident, sector, [], references=references, indirect=third)
    if operation == Op.DISCARD:
        (count,) = _COUNT.unpack_from(data, layout.segments)
        return Request(operation, operation, ident, sector, [], count=count)
    fields = _SEGMENTS[min(second, MAX_SEGMENTS)].unpack_from(data, layout.segments)
    segments = list(zip(fields[::3], fields[1::3], fields[2::3], strict=True))
    return Request(operation, operation, ident, sector, segments, declared=second)


def decode_segments(data: bytes, count: int) -> list[Segment]:
    """The first `count` segments of an indirect page's copy."""
    return list(_SEGMENT.iter_unpack(data[: count * _SEGMENT.size]))


def ring_size(pages: int, layout: Layout) -> int:
    """Slots in a ring of so many pages: the largest power of two that fits (__RING_SIZE)."""
    return 1 << ((pages * PAGE - _HEADER) // layout.slot).bit_length() - 1


class BlkRing:
    """:param pages: of the ring, in order, live and writable, 1 .. 16 of them, a power of two.

    :param layout: of `LAYOUTS`.
    """

    def __init__(self, pages: Sequence[memoryview], layout: Layout) -> None:
        count = len(pages)
        if not 1 <= count <= 1 << MAX_RING_ORDER or count & (count - 1):
            raise DeviceBroken(f"a ring of {count} pages: give 1, 2, 4, 8 or 16")
        self.layout = layout
        self.size = ring_size(count, layout)
        self._pages = [memoryview(page) for page in pages]
        self._indices = self._pages[0][:16].cast("I")
        self._slots = [self._locate(number) for number in range(self.size)]
        # Taking it is the memory barrier between our store and the load after it (an atomic instruction).
        self._barrier = threading.Lock()
        self.done: int = self._indices[_RSP_PROD]

    def _locate(self, number: int) -> tuple[int, int, int]:
        """Page, offset and how many bytes of the slot lie in that page."""
        page, offset = divmod(_HEADER + number * self.layout.slot, PAGE)
        return page, offset, min(self.layout.slot, PAGE - offset)

    def pending(self) -> int:
        """Requests that have no response. :raises DeviceBroken: more than the ring holds."""
        count: int = (self._indices[_REQ_PROD] - self.done) & _MASK
        if count > self.size:
            raise DeviceBroken(f"the front end claims {count} requests in a ring of {self.size}")
        return count

    def request(self, ahead: int) -> Request:
        """A copy of the request that is `ahead` of the next one to be answered."""
        page, offset, length = self._slots[(self.done + ahead) & (self.size - 1)]
        data = bytes(self._pages[page][offset : offset + length])
        if length < self.layout.slot:
            data += bytes(self._pages[page + 1][: self.layout.slot - length])
        return decode(data, self.layout)

    def respond(self, responses: Sequence[tuple[int, int, int]]) -> bool:
        """Push (id, operation, status) for the next requests. :returns: whether the guest wants to be notified."""
        old = self.done
        pack = self.layout.response
        for number, response in enumerate(responses):
            page, offset, length = self._slots[(old + number) & (self.size - 1)]
            data = pack.pack(*response)
            if length >= len(data):
                self._pages[page][offset : offset + len(data)] = data
            else:
                self._pages[page][offset:PAGE] = data[:length]
                self._pages[page + 1][: len(data) - length] = data[length:]
        self.done = (old + len(responses)) & _MASK
        self._indices[_RSP_PROD] = self.done
        with self._barrier:
            event: int = self._indices[_RSP_EVENT]
        return (self.done - event) & _MASK < len(responses)

    def final_check(self) -> bool:
        """Ask to be notified of the next request; whether there is one already (RING_FINAL_CHECK_FOR_REQUESTS)."""
        self._indices[_REQ_EVENT] = (self.done + 1) & _MASK
        with self._barrier:
            return self.pending() > 0

    def close(self) -> None:
        """Let go of the pages; no other call is allowed afterwards."""
        self._indices.release()
        for page in self._pages:
            page.release()
