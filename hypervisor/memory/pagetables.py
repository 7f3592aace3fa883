"""Validation of 4-level page tables, after Xen's xen/arch/x86/mm.c.

A frame becomes a page table only when no writable mapping of it exists and
every present entry in it passes; from then on each change passes through
`PageTables.update`. So whatever the engine can reach by walking a validated
root is the domain's own, or shared with it by Xen.

Errors are Xen's: EINVAL for bad flags, a frame that is not a table of the
wanted level or a reserved slot; EBUSY for a mapping that is not allowed now
(a foreign frame, a writable mapping of a page table); EPERM for a frame that
does not exist on the machine.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

from hypervisor.abi import errno
from hypervisor.engines.x86 import PTE_ADDR, PTE_NX, PTE_P, PTE_RW, PTE_US
from hypervisor.errors import HypervisorBug, XenError
from hypervisor.memory import layout
from hypervisor.memory.codewatch import CodeWatch
from hypervisor.memory.foreign import ForeignFrames
from hypervisor.memory.frames import L1, L2, L3, L4, NONE, SEGDESC, WRITABLE, FrameTable
from hypervisor.memory.linear import LinearTables
from hypervisor.memory.physical import DomainMemory
from hypervisor.memory.segdesc import validate_segdesc_page

# Flags a guest may not set (mm.c: base_disallow_mask and L1_DISALLOW_MASK of a domain without devices).
DISALLOW = 0x198  # PWT, PCD, PSE or PAT, global
L1_DISALLOW = 0x098 | 1 << 62  # the global bit is tolerated; bit 62 is _PAGE_GNTTAB
GUEST_KERNEL = 1 << 52  # _PAGE_GUEST_KERNEL: marks entries to which Xen added the user bit
USER_BITS = GUEST_KERNEL | PTE_US
LAZY_NX = 1 << 53 | PTE_NX
"""Not executable because nothing was executed there yet, and not because the guest wants that; bit 53 is the guest's to
use, and nobody's."""

# A change confined to these needs no new validation (FASTPATH_FLAG_WHITELIST).
SAME = ~(PTE_NX | 0x7FF << 52 | 0xE00 | 0x100 | 0x60 | PTE_US) & (1 << 64) - 1

XEN_SLOT_FIRST, XEN_SLOT_LAST = 256, 271
"""L4 slots that are Xen's (public/arch-x86/xen-x86_64.h)."""

_NP_P, _NP_RW, _NP_US = np.uint64(PTE_P), np.uint64(PTE_RW), np.uint64(PTE_US)
_NP_ADDR, _NP_USER_BITS = np.uint64(PTE_ADDR), np.uint64(USER_BITS)
_NP_RW_NX, _NP_LAZY_NX = np.uint64(PTE_RW | PTE_NX), np.uint64(LAZY_NX)
_NP_ONE = np.uint32(1)  # of the counts' own type: with another, ufunc.at takes ten times as long
_NP_L1_DISALLOW, _NP_12, _NP_63 = np.uint64(L1_DISALLOW), np.uint64(12), np.uint64(63)


class Tlb(Protocol):
    """What of the engine this module needs."""

    @property
    def flush_epoch(self) -> int: ...
    def flush_all(self) -> None: ...
    def memory_written(self, mpa: int, size: int) -> None: ...


class PageTables:
    """The page tables of one domain.

    :param xen_slots: L4 slot → entry that the hypervisor puts there.
    :ivar lazy_nx: writable L1 entries without NX are stored with `LAZY_NX`. An engine that translates code is slow on
        stores through executable pages; a guest that maps all its memory so (a boot loader) would crawl.
    """

    TABLES = frozenset((L1, L2, L3, L4))

    def __init__(self, memory: DomainMemory, frames: FrameTable, tlb: Tlb, xen_slots: dict[int, int]) -> None:
        self.memory = memory
        self.frames = frames
        self.tlb = tlb
        self.xen_slots = xen_slots
        self.code = CodeWatch(memory, frames, tlb)
        self.linear = LinearTables()
        self.foreign = ForeignFrames()
        self.words = memory.words
        self.base = memory.base_mfn
        self.lazy_nx = False

    # -- references

    def frame_of(self, entry: int) -> int:
        """Index of the frame an entry points to. :raises XenError: not in the domain."""
        mfn = (entry & PTE_ADDR) >> 12
        index = mfn - self.base
        if 0 <= index < self.frames.size and self.frames.refs[index]:
            return index
        if layout.FIRST_MFN <= mfn < layout.MAX_MFN:
            raise XenError(errno.EBUSY, f"frame {mfn:#x} is not the domain's")
        if mfn == PTE_ADDR >> 12:
            raise XenError(errno.EINVAL, "frame number is INVALID_MFN")
        raise XenError(errno.EPERM, f"frame {mfn:#x} is no memory")

    def owned_index(self, mfn: int) -> int:
        """Index of a frame the domain owns. :raises XenError: EINVAL otherwise."""
        index = mfn - self.base
        if 0 <= index < self.frames.size and self.frames.refs[index]:
            return index
        raise XenError(errno.EINVAL, f"frame {mfn:#x} is not the domain's")

    def get_type(self, index: int, kind: int) -> None:
        """Take a use of the frame as `kind`, validating it if it becomes that now."""
        frames = self.frames
        if frames.count[index]:
            if frames.kind[index] != kind:
                raise XenError(errno.EINVAL, f"frame is {frames.kind[index]}, wanted {kind}")
        else:
            if kind != WRITABLE and frames.kind[index] == WRITABLE and frames.stamp[index] >= self.tlb.flush_epoch:
                self.tlb.flush_all()
            frames.kind[index] = kind
            if kind != WRITABLE:
                # Counted first: an entry of the table that maps the table itself must see its type.
                frames.count[index] = 1
                try:
                    self._validate(index, kind)
                except BaseException:
                    frames.count[index] = 0
                    frames.kind[index] = NONE
                    raise
                frames.refs[index] += 1
                return
        frames.count[index] += 1
        frames.refs[index] += 1

    def put_type(self, index: int) -> None:
        """Give back one use taken by `get_type`."""
        frames = self.frames
        left = frames.count[index] - 1
        if left < 0:
            raise HypervisorBug(f"type count of frame {index:#x} falls below zero")
        frames.refs[index] -= 1
        kind = frames.kind[index]
        if left == 0:
            if kind == WRITABLE:
                frames.stamp[index] = self.tlb.flush_epoch
            else:
                self._release(index, kind)
                frames.kind[index] = NONE
        frames.count[index] = left

    # -- leaf entries

    def _get_leaf(self, entry: int) -> None:
        if entry & L1_DISALLOW:
            raise XenError(errno.EINVAL, f"bad L1 flags in {entry:#x}")
        frames = self.frames
        index = ((entry & PTE_ADDR) >> 12) - self.base
        if not (0 <= index < frames.size and frames.refs[index]):
            self.frame_of(entry)
        if entry & PTE_RW:
            count = frames.count[index]
            if frames.kind[index] != WRITABLE:
                if count:
                    raise XenError(errno.EBUSY, "writable mapping of a page table or descriptor page")
                frames.kind[index] = WRITABLE
            frames.count[index] = count + 1
        frames.refs[index] += 1
        if not entry & PTE_NX:
            self.code.mapped_executable(index)

    def _put_leaf(self, entry: int) -> None:
        frames = self.frames
        index = ((entry & PTE_ADDR) >> 12) - self.base
        if self.foreign and not 0 <= index < frames.size:
            self.tlb.flush_all()
            self.foreign.left(entry)
            return
        if entry & PTE_RW:
            left = frames.count[index] - 1
            frames.count[index] = left
            if left == 0:
                frames.stamp[index] = self.tlb.flush_epoch
            if frames.executed[index]:
                self.code.changed(index)
        frames.refs[index] -= 1

    # -- whole tables

    def _validate(self, index: int, kind: int) -> None:
        if kind == L1:
            self._validate_l1(index)
        elif kind == SEGDESC:
            validate_segdesc_page(self.memory, index)
        else:
            self._validate_upper(index, kind)

    def _release(self, index: int, kind: int) -> None:
        if kind == L1:
            self._release_l1(index)
        elif kind != SEGDESC:
            self._release_upper(index, kind)

    def _validate_l1(self, index: int) -> None:
        frames = self.frames
        table = self.memory.array[index * 512 : index * 512 + 512]
        present = (table & _NP_P) != 0
        entries = table[present]
        if not entries.size:
            return
        if (entries & _NP_L1_DISALLOW).any():
            raise XenError(errno.EINVAL, "bad L1 flags")
        targets = ((entries & _NP_ADDR) >> _NP_12).astype(np.int64) - self.base
        if targets.min() < 0 or targets.max() >= frames.size or not frames.refs_np[targets].all():
            for entry in entries.tolist():
                self.frame_of(entry)
        writable = targets[(entries & _NP_RW) != 0]
        if ((frames.kind_np[writable] != WRITABLE) & (frames.count_np[writable] != 0)).any():
            raise XenError(errno.EBUSY, "writable mapping of a page table or descriptor page")
        np.add.at(frames.refs_np, targets, _NP_ONE)
        frames.kind_np[writable] = WRITABLE
        np.add.at(frames.count_np, writable, _NP_ONE)
        entries = self._adjusted_l1(entries)
        if self.lazy_nx:
            entries = np.where((entries & _NP_RW_NX) == _NP_RW, entries | _NP_LAZY_NX, entries)
        self.code.mapped_executable_many(targets[(entries >> _NP_63) == 0])
        table[present] = entries

    def _adjusted_l1(self, entries: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Present L1 entries as they are stored: a 64-bit PV kernel runs in ring 3, so each is for users."""
        return np.where((entries & _NP_US) != 0, entries, entries | _NP_USER_BITS)

    def _release_l1(self, index: int) -> None:
        frames = self.frames
        table = self.memory.array[index * 512 : index * 512 + 512]
        entries = table[(table & _NP_P) != 0]
        if self.foreign:
            self.tlb.flush_all()
            entries = self.foreign.left_table(entries, self.base, frames.size)
        if not entries.size:
            return
        targets = ((entries & _NP_ADDR) >> _NP_12).astype(np.int64) - self.base
        np.subtract.at(frames.refs_np, targets, _NP_ONE)
        writable = targets[(entries & _NP_RW) != 0]
        np.subtract.at(frames.count_np, writable, _NP_ONE)
        frames.stamp_np[writable[frames.count_np[writable] == 0]] = self.tlb.flush_epoch
        self.code.changed_many(writable)

    def own_slots(self, kind: int) -> np.ndarray[Any, Any]:
        """Which of a table's 512 slots are the guest's to choose."""
        own = np.ones(512, dtype=bool)
        if kind == L4:
            own[XEN_SLOT_FIRST : XEN_SLOT_LAST + 1] = False
        return own

    def present(self, index: int, kind: int) -> list[tuple[int, int]]:
        """(slot, entry) of the present entries that are the guest's to choose."""
        table = self.memory.array[index * 512 : index * 512 + 512]
        slots = np.flatnonzero(table & _NP_P).tolist()
        if kind == L4:
            slots = [s for s in slots if not XEN_SLOT_FIRST <= s <= XEN_SLOT_LAST]
        words = self.words
        return [(s, words[index * 512 + s]) for s in slots]

    def _validate_upper(self, index: int, kind: int) -> None:
        done: list[int] = []
        words = self.words
        try:
            for slot, entry in self.present(index, kind):
                self._get_upper(entry, kind, index)
                done.append(entry)
                words[index * 512 + slot] = _adjust(entry)
        except BaseException:
            for entry in done:
                self._put_upper(entry, index)
            raise
        if kind == L4:
            self._install_xen_slots(index)

    def _release_upper(self, index: int, kind: int) -> None:
        for _, entry in self.present(index, kind):
            self._put_upper(entry, index)

    def _install_xen_slots(self, index: int) -> None:
        start = index * 512
        self.memory.array[start + XEN_SLOT_FIRST : start + XEN_SLOT_LAST + 1] = 0
        for slot, entry in self.xen_slots.items():
            self.words[start + slot] = entry

    def _get_upper(self, entry: int, kind: int, owner: int = -1) -> None:
        """A use of the table that an entry of level-`kind` table `owner` points to."""
        if entry & DISALLOW:
            raise XenError(errno.EINVAL, f"bad L{kind} flags in {entry:#x}")
        target = self.owned_index((entry & PTE_ADDR) >> 12)
        if self.frames.kind[target] != kind or not self.frames.count[target]:
            self.get_type(target, kind - 1)
            return
        self.linear.take(entry, owner, target)
        if target != owner:
            self.get_type(target, kind)

    def _put_upper(self, entry: int, owner: int = -1) -> None:
        target = ((entry & PTE_ADDR) >> 12) - self.base
        if owner >= 0 and self.frames.kind[target] == self.frames.kind[owner]:
            self.linear.give(owner, target)
            if target == owner:
                return
        self.put_type(target)

    # -- the guest's operations

    def update(self, index: int, slot: int, new: int, *, preserve_ad: bool = False) -> None:
        """Write entry `slot` (0..511) of frame `index`, whatever the frame is (mmu_update).

        :raises XenError: nothing was written.
        """
        frames = self.frames
        kind = frames.kind[index] if frames.count[index] else NONE
        at = index * 512 + slot
        if preserve_ad:
            new |= self.words[at] & 0x60
        if kind == L1:
            self.update_l1(at, new)
        elif L2 <= kind <= L4:
            self._update_upper(at, slot, new, kind)
        elif kind in (NONE, WRITABLE):
            self.words[at] = new
            if frames.executed[index]:
                self.code.changed(index)
        else:
            raise XenError(errno.EINVAL, "frame holds descriptors")

    def update_l1(self, at: int, new: int) -> None:
        """Write the L1 entry at word offset `at` of the domain's memory."""
        words = self.words
        old = words[at]
        if new & PTE_P:
            if new & L1_DISALLOW:
                raise XenError(errno.EINVAL, f"bad L1 flags in {new:#x}")
            if not new & PTE_US:
                new |= USER_BITS
            if self.lazy_nx and new & (PTE_RW | PTE_NX) == PTE_RW:
                new |= LAZY_NX
            if old & PTE_P and not (old ^ new) & SAME:
                words[at] = new
                if (old & ~new) & PTE_NX:
                    self.code.mapped_executable(((new & PTE_ADDR) >> 12) - self.base)
                return
            self._get_leaf(new)
        words[at] = new
        if old & PTE_P:
            self._put_leaf(old)

    def allow_execution(self, at: int) -> bool:
        """The guest executes through the L1 entry at word offset `at` (-1: there is none), which is present: whether it
        may, and only `LAZY_NX` was in the way."""
        if at < 0 or (entry := self.words[at]) & LAZY_NX != LAZY_NX:
            return False
        self.words[at] = entry & ~LAZY_NX
        self.code.mapped_executable(((entry & PTE_ADDR) >> 12) - self.base)
        return True

    def _update_upper(self, at: int, slot: int, new: int, kind: int) -> None:
        if kind == L4 and XEN_SLOT_FIRST <= slot <= XEN_SLOT_LAST:
            raise XenError(errno.EINVAL, f"L4 slot {slot} is Xen's")
        words = self.words
        old = words[at]
        if new & PTE_P:
            if new & DISALLOW:
                raise XenError(errno.EINVAL, f"bad L{kind} flags in {new:#x}")
            new = _adjust(new)
            if old & PTE_P and not (old ^ new) & SAME:
                words[at] = new
                return
            self._get_upper(new, kind, at >> 9)
        words[at] = new
        if old & PTE_P:
            self._put_upper(old, at >> 9)
            # A table left the tree: translations made through it must not outlive it (mmu_update's flush_linear_pt).
            self.tlb.flush_all()

    def pin(self, mfn: int, level: int) -> None:
        """MMUEXT_PIN_Ln_TABLE. :raises XenError: EINVAL not pinnable, EINVAL already pinned."""
        index = self.owned_index(mfn)
        self.get_type(index, level)
        if self.frames.pinned[index]:
            self.put_type(index)
            raise XenError(errno.EINVAL, f"frame {mfn:#x} is pinned already")
        self.frames.pinned[index] = 1

    def unpin(self, mfn: int) -> None:
        index = self.owned_index(mfn)
        if not self.frames.pinned[index]:
            raise XenError(errno.EINVAL, f"frame {mfn:#x} is not pinned")
        self.frames.pinned[index] = 0
        self.put_type(index)

    def wanted(self, kind: int, _slot: int, entry: int) -> int:
        """The type that an entry of a level-`kind` table needs its frame to have; NONE for any."""
        return kind - 1 if kind > L1 else (WRITABLE if entry & PTE_RW else NONE)


def _adjust(entry: int) -> int:
    """Present upper-level entries carry the user bit: a 64-bit PV kernel runs in ring 3."""
    return entry | PTE_US
