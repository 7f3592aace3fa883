"""Xen's own frames of a domain: what the hypervisor maps into or shares with the guest.

* L4[256]: the M2P, readable. The domain sees its own slice; every other entry
  reads as INVALID_M2P_ENTRY, through one page of all ones mapped everywhere.
* L4[260]: the per-domain area with each vCPU's GDT and LDT, not for the guest's
  own access (no user bit): the engine reads descriptors there.
* shared_info, and frames handed out later (grant tables).
"""

from __future__ import annotations

from hypervisor.engines.x86 import PTE_A, PTE_D, PTE_NX, PTE_P, PTE_RW, PTE_US
from hypervisor.errors import HypervisorBug
from hypervisor.memory import layout
from hypervisor.memory.frames import FrameTable
from hypervisor.memory.physical import DomainMemory

PERDOMAIN_START = 0xFFFF_8200_0000_0000
GDT_LDT_VCPU_PAGES = 32  # 16 pages GDT, 16 pages LDT each
MAX_GDT_FRAMES = 14
RESERVED_GDT_PAGE = 14

INVALID_M2P_ENTRY = 0xFFFF_FFFF_FFFF_FFFF

# What Xen reserves (public/arch-x86/xen-x86_64.h): selectors 0xe023 (code 32), 0xe02b (data), 0xe033 (code 64).
_RESERVED_GDT = {4: 0x00CF_FB00_0000_FFFF, 5: 0x00CF_F300_0000_FFFF, 6: 0x00AF_FB00_0000_FFFF}

_HYPERVISOR_RW = PTE_P | PTE_RW | PTE_A | PTE_D | PTE_NX
_TABLE = PTE_P | PTE_RW | PTE_A
_TABLE_USER = _TABLE | PTE_US


class XenArea:
    """Built once per domain; its content lives in the domain's memory, so only indexes are state.

    :ivar slots: L4 slot → entry.
    :ivar m2p_words: word offset of the M2P entry of mfn 0 (virtual: only the own extent is backed).
    """

    RESERVED_GDT = _RESERVED_GDT

    def __init__(self, memory: DomainMemory, frames: FrameTable) -> None:
        self._memory = memory
        self._frames = frames
        self._next = memory.max_pages
        self.shared_info = self._take()
        frames.share(self.shared_info, writable=True)
        self._zero = self._take()
        self._reserved_gdt = self._take()
        for slot, desc in self.RESERVED_GDT.items():
            memory.words[self._reserved_gdt * 512 + slot] = desc
        self.slots = {256: self._build_m2p(), 260: self._build_perdomain()}

    def _take(self, count: int = 1) -> int:
        first = self._next
        self._next += count
        if self._next > self._memory.frames:
            raise HypervisorBug("Xen's frames of the domain are used up: layout.xen_frames is too small")
        return first

    def take_shared(self) -> int:
        """A zeroed frame that the guest may map writable."""
        index = self._take()
        self._memory.clear_page(index)
        self._frames.share(index, writable=True)
        return index

    def _set(self, table: int, slot: int, target: int, flags: int) -> None:
        self._memory.words[table * 512 + slot] = self._memory.mpa(target) | flags

    def _build_m2p(self) -> int:
        memory = self._memory
        first = memory.base_mfn // 512
        pages = (memory.base_mfn + memory.frames - 1) // 512 - first + 1
        l3, l2, invalid_l1, invalid = self._take(), self._take(), self._take(), self._take()
        memory.array[invalid * 512 : invalid * 512 + 512] = INVALID_M2P_ENTRY
        read_only = PTE_P | PTE_US | PTE_A | PTE_NX
        memory.array[invalid_l1 * 512 : invalid_l1 * 512 + 512] = memory.mpa(invalid) | read_only
        self._set(l3, 0, l2, _TABLE_USER)
        memory.array[l2 * 512 : l2 * 512 + 512] = memory.mpa(invalid_l1) | _TABLE_USER
        start = self._take(pages)
        memory.array[start * 512 : (start + pages) * 512] = INVALID_M2P_ENTRY
        l1s: dict[int, int] = {}
        for page in range(pages):
            l2_slot, l1_slot = divmod(first + page, 512)
            if l2_slot not in l1s:
                l1s[l2_slot] = table = self._take()
                memory.array[table * 512 : table * 512 + 512] = memory.mpa(invalid) | read_only
                self._set(l2, l2_slot, table, _TABLE_USER)
            self._set(l1s[l2_slot], l1_slot, start + page, read_only)
        self.m2p_words = start * 512 - first * 512
        return memory.mpa(l3) | PTE_P | PTE_US | PTE_A | PTE_RW

    def _build_perdomain(self) -> int:
        l3, l2 = self._take(), self._take()
        self._perdomain_l1 = self._take(2)
        self._set(l3, 0, l2, _TABLE)
        self._set(l2, 0, self._perdomain_l1, _TABLE)
        self._set(l2, 1, self._perdomain_l1 + 1, _TABLE)
        for vcpu in range(32):
            for page in range(GDT_LDT_VCPU_PAGES):
                self._set_window(vcpu, page, self._zero)
            self._set_window(vcpu, RESERVED_GDT_PAGE, self._reserved_gdt)
        return self._memory.mpa(l3) | _TABLE

    def _set_window(self, vcpu: int, page: int, target: int) -> None:
        word = self._perdomain_l1 * 512 + vcpu * GDT_LDT_VCPU_PAGES + page
        self._memory.words[word] = self._memory.mpa(target) | _HYPERVISOR_RW

    def save(self) -> int:
        """How many frames are taken; what is in them is the domain's memory."""
        return self._next

    def restore(self, taken: int) -> None:
        """:raises ValueError: no such number can be taken."""
        if not self._next <= taken <= self._memory.frames:
            raise ValueError(f"{taken} frames taken, of {self._memory.frames}")
        self._next = taken

    # -- per-vCPU descriptor tables

    def windows(self) -> tuple[int, int]:
        """Word offset of the L1 entries that map vCPU 0's tables, and how many each vCPU has."""
        return self._perdomain_l1 * 512, GDT_LDT_VCPU_PAGES

    def gdt_va(self, vcpu: int) -> int:
        return PERDOMAIN_START + vcpu * GDT_LDT_VCPU_PAGES * 4096

    def ldt_va(self, vcpu: int) -> int:
        return self.gdt_va(vcpu) + 16 * 4096

    def map_gdt(self, vcpu: int, indexes: list[int]) -> None:
        """Show these frames as the first pages of the vCPU's GDT; the rest reads as absent descriptors."""
        for page in range(MAX_GDT_FRAMES):
            self._set_window(vcpu, page, indexes[page] if page < len(indexes) else self._zero)

    def map_ldt(self, vcpu: int, indexes: list[int]) -> None:
        for page in range(16):
            self._set_window(vcpu, 16 + page, indexes[page] if page < len(indexes) else self._zero)

    def descriptor(self, vcpu: int, selector: int, ldt_entries: int) -> int:
        """The descriptor a selector names, 0 when there is none."""
        number = (selector & 0xFFFF) >> 3
        page, slot = divmod(number, 512)
        if selector & 4:
            if number >= ldt_entries:
                return 0
            page += 16
        words = self._memory.words
        entry = words[self._perdomain_l1 * 512 + vcpu * GDT_LDT_VCPU_PAGES + page]
        index = self._memory.index((entry & 0xF_FFFF_FFFF_F000) >> 12)
        return words[index * 512 + slot] if index >= 0 else 0

    # -- machine to physical

    def set_m2p(self, mfn: int, pfn: int) -> None:
        """:param mfn: in the domain's extent (the caller checked)."""
        self._memory.words[self.m2p_words + mfn] = pfn

    def m2p(self, mfn: int) -> int:
        return self._memory.words[self.m2p_words + mfn]

    def m2p_offset(self, mfn: int) -> int:
        """Byte offset in the domain's memory of an entry; they have 8 bytes (32-bit guests': 4) and lie together."""
        return (self.m2p_words + mfn) * 8

    def fill_m2p(self, pages: int) -> None:
        """At boot pfn p is mfn base+p."""
        start = self.m2p_words + self._memory.base_mfn
        self._memory.array[start : start + pages] = range(pages)


assert layout.FIXED_XEN_FRAMES >= 32
