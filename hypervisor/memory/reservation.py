"""Which of its frames a domain has: giving them back, taking new ones, setting some aside for an exchange.

After xen/common/memory.c and page_alloc.c. A frame that is given back while anything still uses it stays the domain's
until the last use goes, and is handed out again only then. Nothing handed out is reachable by a translation from
before: whoever gave frames back ends with `settle`, and what was swept up is flushed before it is taken. Their
memory goes back to the host then.
"""

from __future__ import annotations

from hypervisor.abi import errno
from hypervisor.errors import XenError
from hypervisor.memory.frames import FREE, HELD, LEFT, NONE, STOLEN, FrameTable
from hypervisor.memory.pagetables import PageTables
from hypervisor.memory.xenarea import INVALID_M2P_ENTRY, XenArea

MAX_ORDER = 9
"""Largest extent of an ordinary domain: 2 MiB (CONFIG_DOMU_MAX_ORDER)."""
SCAN = 512
"""Blocks looked up at a time."""


class Reservation:
    """The frames of one domain. Its state is in the frame table.

    :ivar limit: frames it may have; who has more keeps them, but gets no more (``d->max_pages``). Any thread may
        set it.
    """

    __slots__ = ("_area", "_frames", "_freed", "_left", "_stale", "_tables", "limit")

    def __init__(self, frames: FrameTable, tables: PageTables, area: XenArea) -> None:
        self._frames = frames
        self._tables = tables
        self._area = area
        self._stale = False
        self._left = True  # there may be frames that are LEFT
        self._freed: list[int] = []  # their memory is still to be given back to the host
        self.limit = frames.ram

    # -- giving back

    def give_back(self, mfn: int) -> None:
        """The domain's own hold on a frame goes; a second time it is gone already, which is no error.

        :raises XenError: EINVAL, it is not the domain's RAM.
        """
        frames, index = self._frames, self._ram_index(mfn)
        if frames.holding[index] != HELD:
            return
        frames.holding[index] = LEFT
        frames.refs[index] -= 1
        self._left = True
        if not frames.refs[index]:
            self._free(index)

    def _ram_index(self, mfn: int) -> int:
        index = self._tables.owned_index(mfn)
        if index >= self._frames.ram:
            raise XenError(errno.EINVAL, f"frame {mfn:#x} is Xen's")
        return index

    def _free(self, index: int) -> None:
        self._frames.holding[index] = FREE
        self._forget(index)
        self._freed.append(index)

    def _clean(self, index: int) -> None:
        """Nothing of what the frame was may show."""
        self._forget(index)
        self._tables.memory.clear_page(index)

    def _forget(self, index: int) -> None:
        frames, tables = self._frames, self._tables
        if frames.executed[index]:
            tables.code.changed(index)
            frames.executed[index] = 0
        frames.kind[index] = NONE
        self._area.set_m2p(tables.memory.mfn(index), INVALID_M2P_ENTRY)
        self._stale = True

    def settle(self) -> None:
        """Before the guest runs on: no translation of a frame that was given back may stay. Once for many frames."""
        if self._stale:
            self._stale = False
            self._tables.tlb.flush_all()
        if self._freed:
            self._return_memory()

    def _return_memory(self) -> None:
        """In runs: each is a system call."""
        freed, self._freed = sorted(self._freed), []
        first = end = freed[0]
        for index in freed:
            if index != end:
                self._tables.memory.punch(first, end - first)
                first = index
            end = index + 1
        self._tables.memory.punch(first, end - first)

    # -- taking

    def taker(self, order: int, address_bits: int = 0) -> Taker:
        """For any number of extents of 2**`order` frames below 2**`address_bits` bytes; 0: wherever they are."""
        if self._left:
            for index in self._frames.unused():
                self._free(index)
            self._left = bool((self._frames.holding_np == LEFT).any())
            self.settle()
        return Taker(self._frames, self._tables.base, order, address_bits)

    # -- exchange

    def exchange(self, mfns: list[int], taker: Taker, extents: int) -> list[int]:
        """Frames that nothing uses for `extents` extents of `taker`'s; the index of each one's first frame.

        Other frames if there are any; else the same ones may come back, empty.

        :raises XenError: EINVAL, one of them is in use or not the domain's; ENOMEM. Nothing has changed then.
        """
        stolen: list[int] = []
        taken: list[int] = []
        try:
            for mfn in mfns:
                stolen.append(self._steal(mfn))
            if not taker.take_into(taken, extents):
                self._mark(stolen, FREE)
                if not taker.take_into(taken, extents):
                    raise XenError(errno.ENOMEM, f"no {extents} extents of {taker.size} frames")
        except XenError:
            taker.undo(taken)
            self._mark(stolen, HELD)
            raise
        for index in stolen:
            if self._frames.holding[index] == STOLEN:
                self._frames.holding[index] = FREE
            self._clean(index)
        return taken

    def _steal(self, mfn: int) -> int:
        frames, index = self._frames, self._ram_index(mfn)
        if frames.holding[index] != HELD or frames.refs[index] != 1:
            raise XenError(errno.EINVAL, f"frame {mfn:#x} is in use")
        self._mark([index], STOLEN)
        return index

    def _mark(self, indexes: list[int], holding: int) -> None:
        for index in indexes:
            self._frames.holding[index] = holding
            self._frames.refs[index] = holding == HELD


class Taker:
    """Takes free extents, all of one size and each at a multiple of its size, as Xen's allocator does."""

    __slots__ = ("_end", "_first", "_frames", "_known", "size")

    def __init__(self, frames: FrameTable, base_mfn: int, order: int, address_bits: int) -> None:
        self.size = 1 << order
        self._frames = frames
        self._first = -base_mfn % self.size
        self._end = frames.ram
        if address_bits:
            self._end = min(self._end, max(0, (1 << max(0, address_bits - 12)) - base_mfn))
        self._known: list[int] = []

    def take(self) -> int | None:
        """The index of the first frame of an extent that is now the domain's; None: there is none."""
        frames = self._frames
        if not self._known:
            self._known = self._look()[::-1]
        if not self._known:
            return None
        first = self._known.pop()
        for index in range(first, first + self.size):
            frames.holding[index] = HELD
            frames.refs[index] = 1
        return first

    def _look(self) -> list[int]:
        if self.size == 1:
            return self._frames.free_frames(SCAN, self._end)
        if self._first >= self._end:
            return []
        return self._frames.free_blocks(SCAN, self._end, self.size, self._first)

    def take_into(self, taken: list[int], wanted: int) -> bool:
        """Take until `taken` has `wanted` extents. Whether it has."""
        while len(taken) < wanted:
            first = self.take()
            if first is None:
                return False
            taken.append(first)
        return True

    def undo(self, taken: list[int]) -> None:
        """Extents that nobody saw yet are free again."""
        for first in taken:
            for index in range(first, first + self.size):
                self._frames.holding[index] = FREE
                self._frames.refs[index] = 0
        self._known += taken
