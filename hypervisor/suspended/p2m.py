"""A guest's own list of frames: where it says that it keeps it, and what is in it.

See struct arch_shared_info in public/arch-x86/xen.h.
Either a list at a virtual address of a page table (``p2m_cr3``), or a tree of three levels of frames
(``pfn_to_mfn_frame_list_list``). All of it is the guest's word: every frame is looked up before it is read.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np

from hypervisor import abi
from hypervisor.domain import Domain
from hypervisor.engines.x86 import PTE_ADDR, PTE_P
from hypervisor.errors import WrongState
from hypervisor.types import PAGE_SIZE

Array = np.ndarray[Any, Any]


@dataclasses.dataclass(frozen=True, slots=True)
class _Fields:
    """Byte offsets in shared_info."""

    max_pfn: int
    list_list: int
    cr3: int
    address: int


def _fields(arch: int, list_list: int, cr3: int, address: int) -> _Fields:
    return _Fields(arch + abi.ARCH_SHARED_INFO_MAX_PFN, arch + list_list, arch + cr3, arch + address)


FIELDS = {
    64: _fields(
        abi.SHARED_INFO_ARCH,
        abi.ARCH_SHARED_INFO_PFN_TO_MFN_FRAME_LIST_LIST,
        abi.ARCH_SHARED_INFO_P2M_CR3,
        abi.ARCH_SHARED_INFO_P2M_VADDR,
    ),
    32: _fields(
        abi.COMPAT_SHARED_INFO_ARCH,
        abi.COMPAT_ARCH_SHARED_INFO_PFN_TO_MFN_FRAME_LIST_LIST,
        abi.COMPAT_ARCH_SHARED_INFO_P2M_CR3,
        abi.COMPAT_ARCH_SHARED_INFO_P2M_VADDR,
    ),
}
_TOP_LEVEL = {64: 4, 32: 3}
_VA_MASK = {64: (1 << 48) - 1, 32: (1 << 32) - 1}


@dataclasses.dataclass(frozen=True, slots=True)
class P2m:
    """:ivar leaves: indexes of the frames that hold the list, in order.

    :ivar entries: machine frame of each page number as the guest says, uint64; all ones (of its word) for none.
    """

    leaves: tuple[int, ...]
    entries: Array


def read(domain: Domain) -> P2m:
    """:raises WrongState: the guest keeps no list, or says nonsense of it: it cannot be saved."""
    bits = domain.config.bits
    reader = _Reader(domain, bits)
    fields = FIELDS[bits]
    count, list_list = reader.shared(fields.max_pfn), reader.shared(fields.list_list)
    cr3 = reader.shared(fields.cr3)
    if not 0 < count <= 4 * domain.memory.max_pages + (1 << 16):
        raise WrongState(f"the guest cannot be saved: it says that its list of frames has {count} entries")
    pages = -(-count // reader.per_page)
    leaves = tuple(reader.linear(cr3, reader.shared(fields.address), pages) if cr3 else reader.tree(list_list, pages))
    entries = np.concatenate([reader.page(index) for index in leaves])[:count]
    return P2m(leaves, entries.astype(np.uint64))


class _Reader:
    def __init__(self, domain: Domain, bits: int) -> None:
        self._memory, self._frames = domain.memory, domain.frames
        self._bits = bits
        self._info = domain.area.shared_info * PAGE_SIZE
        self.per_page = PAGE_SIZE * 8 // bits

    def shared(self, offset: int) -> int:
        at = self._info + offset
        return int.from_bytes(self._memory.bytes[at : at + self._bits // 8], "little")

    def page(self, index: int) -> Array:
        words = self._memory.array[index * 512 : index * 512 + 512]
        return words if self._bits == 64 else words.view(np.uint32)

    def index(self, mfn: int, what: str) -> int:
        index = self._memory.index(mfn)
        if not 0 <= index < self._frames.ram or not self._frames.refs[index]:
            raise WrongState(f"the guest cannot be saved: {what} of its list of frames is at {mfn:#x}, not its own")
        return index

    def tree(self, list_list: int, pages: int) -> Iterator[int]:
        if not list_list:
            raise WrongState("the guest cannot be saved: it does not say where its list of frames is")
        top = self.page(self.index(list_list, "the top"))
        for number in range(pages):
            upper, lower = divmod(number, self.per_page)
            if upper >= self.per_page:
                raise WrongState("the guest cannot be saved: its list of frames is too long for a tree")
            if not lower:
                middle = self.page(self.index(int(top[upper]), "a middle page"))
            yield self.index(int(middle[lower]), "a page")

    def linear(self, cr3: int, address: int, pages: int) -> Iterator[int]:
        root = self.index((cr3 >> 12 | cr3 << 20) & 0xFFFF_FFFF if self._bits == 32 else cr3 >> 12, "the page table")
        words, mask = self._memory.words, _VA_MASK[self._bits]
        for number in range(pages):
            va, table = (address + number * PAGE_SIZE) & mask, root
            for level in range(_TOP_LEVEL[self._bits], 0, -1):
                entry = words[table * 512 + (va >> (12 + 9 * (level - 1)) & 511)]
                if not entry & PTE_P:
                    raise WrongState(f"the guest cannot be saved: its list of frames is not mapped at {va:#x}")
                table = self.index((entry & PTE_ADDR) >> 12, "a page")
            yield table
