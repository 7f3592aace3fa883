"""Xen's own frames of a 32-bit domain: compatibility M2P, descriptor windows, and a root table per vCPU.

A 32-bit guest's tables have three levels; the engine, in long mode, walks four. So each vCPU has an L4 table of
Xen's own whose slot 0 names the guest's L3 (setup_compat_l4 in xen/arch/x86/pv/domain.c). The machine-to-physical
table has 4-byte entries and is seen at 0xF5800000, through the last slots of the L2 table in the guest's L3 slot 3
(public/arch-x86/xen-x86_32.h); pages of ring 1 carry no user bit, so user programs do not see it.
"""

from __future__ import annotations

import numpy as np

from hypervisor import abi
from hypervisor.engines.x86 import MASK32, PTE_A, PTE_ADDR, PTE_NX, PTE_P, PTE_RW, PTE_US
from hypervisor.errors import Unsupported
from hypervisor.memory.frames import FrameTable
from hypervisor.memory.physical import DomainMemory
from hypervisor.memory.xenarea import XenArea

FIRST_XEN_L2_SLOT = (abi.COMPAT_HYPERVISOR_VIRT_START >> 21) & 511
XEN_L2_SLOTS = 512 - FIRST_XEN_L2_SLOT
M2P_ENTRIES = XEN_L2_SLOTS << 19
"""Machine frames that the compatibility M2P has room for."""
MAX_VCPUS = 32

# Flat selectors 0xe019 and 0xe021 of ring 1, 0xe02b and 0xe033 of ring 3, marked accessed.
KERNEL_CODE, KERNEL_DATA = 0x00CF_BB00_0000_FFFF, 0x00CF_B300_0000_FFFF
_RESERVED_GDT_32 = {3: KERNEL_CODE, 4: KERNEL_DATA, 5: 0x00CF_FB00_0000_FFFF, 6: 0x00CF_F300_0000_FFFF}

_READ_ONLY = PTE_P | PTE_A | PTE_NX
_ROOT_ENTRY = PTE_P | PTE_RW | PTE_US | PTE_A


class XenArea32(XenArea):
    """See the module.

    :ivar slots: L2 slot → entry that belongs into the guest's last L2 table.
    """

    RESERVED_GDT = _RESERVED_GDT_32

    def __init__(self, memory: DomainMemory, frames: FrameTable) -> None:
        if memory.base_mfn + memory.frames > M2P_ENTRIES:
            raise Unsupported(
                f"machine memory above {M2P_ENTRIES >> 18} GiB cannot be given to a 32-bit guest: use a 64-bit kernel"
            )
        self._l2_slots: dict[int, int] = {}
        super().__init__(memory, frames)
        entries = {260: self.slots[260]}
        self.slots = self._l2_slots
        self._roots = self._take(MAX_VCPUS)
        for vcpu in range(MAX_VCPUS):
            for slot, entry in entries.items():
                memory.words[(self._roots + vcpu) * 512 + slot] = entry

    def _build_m2p(self) -> int:
        memory = self._memory
        self._dwords = memory.array.view(np.uint32)
        first = memory.base_mfn // 1024
        pages = (memory.base_mfn + memory.frames - 1) // 1024 - first + 1
        invalid_l1, invalid = self._take(), self._take()
        self._dwords[invalid * 1024 : invalid * 1024 + 1024] = MASK32
        memory.array[invalid_l1 * 512 : invalid_l1 * 512 + 512] = memory.mpa(invalid) | _READ_ONLY
        tables = dict.fromkeys(range(XEN_L2_SLOTS), invalid_l1)
        start = self._take(pages)
        self._dwords[start * 1024 : (start + pages) * 1024] = MASK32
        for page in range(pages):
            l2_slot, l1_slot = divmod(first + page, 512)
            if tables[l2_slot] == invalid_l1:
                tables[l2_slot] = table = self._take()
                memory.array[table * 512 : table * 512 + 512] = memory.mpa(invalid) | _READ_ONLY
            self._set(tables[l2_slot], l1_slot, start + page, _READ_ONLY)
        for slot, table in tables.items():
            self._l2_slots[FIRST_XEN_L2_SLOT + slot] = memory.mpa(table) | PTE_P | PTE_RW | PTE_A
        self._m2p_dwords = (start - first) * 1024
        return 0

    # -- roots

    def root(self, vcpu: int) -> int:
        """Machine address of a vCPU's L4 table."""
        return self._memory.mpa(self._roots + vcpu)

    def guest_root(self, vcpu: int) -> int:
        """Machine frame of the guest's L3 in force on a vCPU, 0 for none."""
        return (self._memory.words[(self._roots + vcpu) * 512] & PTE_ADDR) >> 12

    def set_guest_root(self, vcpu: int, mfn: int) -> None:
        self._memory.words[(self._roots + vcpu) * 512] = mfn << 12 | _ROOT_ENTRY if mfn else 0

    # -- machine to physical

    def set_m2p(self, mfn: int, pfn: int) -> None:
        self._memory.dwords[self._m2p_dwords + mfn] = pfn & MASK32

    def m2p(self, mfn: int) -> int:
        return self._memory.dwords[self._m2p_dwords + mfn]

    def m2p_offset(self, mfn: int) -> int:
        return (self._m2p_dwords + mfn) * 4

    def fill_m2p(self, pages: int) -> None:
        start = self._m2p_dwords + self._memory.base_mfn
        self._dwords[start : start + pages] = np.arange(pages, dtype=np.uint32)
