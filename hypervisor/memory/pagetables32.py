"""Validation of a 32-bit guest's PAE page tables, after the 32-bit cases of Xen's xen/arch/x86/mm.c.

The rules are those of `PageTables` but for these: the root is an L3 with four entries, the rest of its page is
zeroed; its last entry names an L2 table of its own kind, `L2_XEN`, used by one L3 only, whose last slots are Xen's;
the guest's user bits mean what they say, for its kernel runs in ring 1.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from hypervisor.abi import errno
from hypervisor.engines.x86 import PTE_A, PTE_ADDR, PTE_NX, PTE_P, PTE_RW, PTE_US
from hypervisor.errors import XenError
from hypervisor.memory.frames import L1, L2, L2_XEN, L3, L4, SEGDESC
from hypervisor.memory.pagetables import DISALLOW, L1_DISALLOW, LAZY_NX, SAME, PageTables
from hypervisor.memory.segdesc import validate_segdesc_page
from hypervisor.memory.segdesc32 import check_descriptor
from hypervisor.memory.xenarea32 import FIRST_XEN_L2_SLOT

L3_ENTRIES = 4
_L3_DISALLOW = DISALLOW | PTE_NX | 0x7FF << 52
_L3_ADDED = PTE_US | PTE_RW


class PaeTables(PageTables):
    """The page tables of one 32-bit domain.

    :param xen_slots: L2 slot → entry that the hypervisor puts into each table of kind `L2_XEN`.
    """

    TABLES = PageTables.TABLES | {L2_XEN}

    # -- whole tables

    def _validate(self, index: int, kind: int) -> None:
        if kind == SEGDESC:
            validate_segdesc_page(self.memory, index, check_descriptor)
        elif kind == L3:
            self._validate_l3(index)
        elif kind == L4:
            raise XenError(errno.EINVAL, "a 32-bit guest has no L4 tables")
        else:
            super()._validate(index, kind)

    def _adjusted_l1(self, entries: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        return entries

    def own_slots(self, kind: int) -> np.ndarray[Any, Any]:
        own = np.zeros(512, dtype=bool)
        own[: {L3: L3_ENTRIES, L2_XEN: FIRST_XEN_L2_SLOT}.get(kind, 512)] = True
        return own

    def present(self, index: int, kind: int) -> list[tuple[int, int]]:
        slots = 512 if kind != L2_XEN else FIRST_XEN_L2_SLOT
        if kind == L3:
            slots = L3_ENTRIES
        words = self.words
        table = words[index * 512 : index * 512 + slots].tolist()
        return [(slot, entry) for slot, entry in enumerate(table) if entry & PTE_P]

    def _validate_upper(self, index: int, kind: int) -> None:
        """L2 tables of both kinds."""
        done: list[int] = []
        try:
            for _, entry in self.present(index, kind):
                self._get_upper(entry, L2)
                done.append(entry)
        except BaseException:
            for entry in done:
                self._put_upper(entry)
            raise
        if kind == L2_XEN:
            for slot, entry in self.xen_slots.items():
                self.words[index * 512 + slot] = entry

    def _validate_l3(self, index: int) -> None:
        self.memory.array[index * 512 + L3_ENTRIES : (index + 1) * 512] = 0
        words = self.words
        done: list[tuple[int, int]] = []
        try:
            for slot in range(L3_ENTRIES):
                entry = words[index * 512 + slot]
                if not entry & PTE_P:
                    if slot == 3:
                        raise XenError(errno.EINVAL, "no L2 in L3 slot 3, where Xen's mappings go")
                    continue
                self._get_l2(entry, slot)
                done.append((slot, entry))
        except BaseException:
            for _, entry in done:
                self._put_upper(entry)
            raise
        for slot, entry in done:
            words[index * 512 + slot] = entry | _L3_ADDED

    def _get_l2(self, entry: int, slot: int) -> None:
        if entry & _L3_DISALLOW:
            raise XenError(errno.EINVAL, f"bad L3 flags in {entry:#x}")
        target = self.owned_index((entry & PTE_ADDR) >> 12)
        if slot != 3:
            self.get_type(target, L2)
            return
        self.get_type(target, L2_XEN)
        if self.frames.count[target] != 1:
            self.put_type(target)
            raise XenError(errno.EINVAL, "the L2 in L3 slot 3 belongs to another L3 already")

    def _release_upper(self, index: int, kind: int) -> None:
        super()._release_upper(index, kind)
        words = self.words
        if kind == L3:
            for slot, entry in self.present(index, kind):
                words[index * 512 + slot] = entry & ~(_L3_ADDED | PTE_A)
        elif kind == L2_XEN:
            self.memory.array[index * 512 + FIRST_XEN_L2_SLOT : (index + 1) * 512] = 0

    # -- the guest's operations

    def update(self, index: int, slot: int, new: int, *, preserve_ad: bool = False) -> None:
        frames = self.frames
        if frames.kind[index] == L2_XEN and frames.count[index]:
            at = index * 512 + slot
            if preserve_ad:
                new |= self.words[at] & 0x60
            self._update_upper(at, slot, new, L2_XEN)
        else:
            super().update(index, slot, new, preserve_ad=preserve_ad)

    def update_l1(self, at: int, new: int) -> None:
        words = self.words
        old = words[at]
        if new & PTE_P:
            if new & L1_DISALLOW:
                raise XenError(errno.EINVAL, f"bad L1 flags in {new:#x}")
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

    def _update_upper(self, at: int, slot: int, new: int, kind: int) -> None:
        if kind == L2_XEN and slot >= FIRST_XEN_L2_SLOT:
            raise XenError(errno.EPERM, f"L2 slot {slot} is Xen's")
        if kind == L3 and slot >= 3:
            raise XenError(errno.EINVAL, f"L3 slot {slot} of a table in use cannot be changed")
        words = self.words
        old = words[at]
        if new & PTE_P:
            if new & (_L3_DISALLOW if kind == L3 else DISALLOW):
                raise XenError(errno.EINVAL, f"bad L{kind} flags in {new:#x}")
            if kind == L3:
                new |= _L3_ADDED
            if old & PTE_P and not (old ^ new) & SAME:
                words[at] = new
                return
            if kind == L3:
                self._get_l2(new, slot)
            else:
                self._get_upper(new, L2)
        words[at] = new
        if old & PTE_P:
            self._put_upper(old)
            self.tlb.flush_all()

    def pin(self, mfn: int, level: int) -> None:
        if level != L4:  # pinning a level that is not there does nothing (do_mmuext_op)
            super().pin(mfn, level)

    def wanted(self, kind: int, slot: int, entry: int) -> int:
        if kind == L3:
            return L2_XEN if slot == 3 else L2
        if kind == L2_XEN:
            return L1
        return super().wanted(kind, slot, entry)
