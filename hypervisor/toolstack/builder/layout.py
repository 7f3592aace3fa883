"""Which page of a new domain holds what; pure arithmetic, nothing is written.

The order is that of Xen's domain builder, and guests rely on parts of it
(public/xen.h, "Start-of-day memory layout"):

::

    virt_base + 0       (unused up to the kernel)
    kernel | ramdisk | p2m list | start_info | xenstore | console | page tables | boot stack | padding
    ─────────────────────────── the initial mapping: ends on 4 MiB, at least 512 KiB padding ──────────
    [ramdisk, when the kernel takes it by page frame number (MOD_START_PFN)]
    [p2m list and its page tables, when the kernel names a place for it (INIT_P2M)]
"""

from __future__ import annotations

import dataclasses

from hypervisor.errors import KernelInvalid
from hypervisor.toolstack.builder.kernel import Kernel, usable_virtual
from hypervisor.types import PAGE_SIZE

_PADDING = 512 << 10
_ALIGNMENT = 4 << 20
_VA_MASK = {64: (1 << 48) - 1, 32: (1 << 32) - 1}
LEVELS = {64: (4, 3, 2, 1), 32: (3, 2, 1)}
"""Page-table levels of a guest, the root's first."""


def shift(level: int) -> int:
    """Address bits below the index of a table entry: 12 at level 1, 39 at level 4."""
    return 12 + 9 * (level - 1)


@dataclasses.dataclass(slots=True)
class TableSet:
    """The page-table pages of a domain: (level, index) to pfn, the index being the address over the table's reach."""

    tables: dict[tuple[int, int], int] = dataclasses.field(default_factory=dict)
    bits: int = 64

    @property
    def top(self) -> int:
        """Level of the root."""
        return LEVELS[self.bits][0]

    def missing(self, start: int, end: int) -> list[tuple[int, int]]:
        """Tables still needed to map ``start .. end-1``, highest level first.

        A 32-bit guest has an L2 for each quarter up to the last one, where Xen's own mappings go.
        """
        mask = _VA_MASK[self.bits]
        first, last = start & mask, (end - 1) & mask
        keys = []
        for level in LEVELS[self.bits]:
            reach = shift(level) + 9
            stop = 3 if self.bits == 32 and level == 2 else last >> reach
            keys += [(level, index) for index in range(first >> reach, stop + 1)]
        return [key for key in keys if key not in self.tables]

    def add(self, start: int, end: int, pfn: int) -> int:
        """Give the missing tables the pages from `pfn` on; returns how many that were."""
        keys = self.missing(start, end)
        self.tables.update(zip(keys, range(pfn, pfn + len(keys)), strict=True))
        return len(keys)


@dataclasses.dataclass(frozen=True, slots=True)
class Layout:
    """Page frame numbers and virtual addresses of a new domain.

    :ivar ramdisk_pfn: where the ramdisk lies, whether or not it is mapped.
    :ivar ramdisk_mapped: it is in the initial mapping.
    :ivar p2m_va: where the guest finds its p2m list.
    :ivar p2m_separate: the list has a mapping of its own, not part of the initial one.
    :ivar p2m_frames: pages of the list, with those of its own page tables.
    :ivar end_pfn: pages needed in all.
    """

    virt_base: int
    virt_end: int
    ramdisk_pfn: int
    ramdisk_mapped: bool
    p2m_pfn: int
    p2m_va: int
    p2m_separate: bool
    p2m_list_pages: int
    p2m_frames: int
    start_info_pfn: int
    store_pfn: int
    console_pfn: int
    pt_base_pfn: int
    nr_pt_frames: int
    stack_pfn: int
    end_pfn: int
    tables: TableSet

    def va(self, pfn: int) -> int:
        return self.virt_base + pfn * PAGE_SIZE


def pages(size: int) -> int:
    """Pages that `size` bytes fill."""
    return -(-size // PAGE_SIZE)


def plan_layout(kernel: Kernel, ramdisk_len: int, nr_pages: int) -> Layout:
    """Lay out a domain of `nr_pages`. Compare `Layout.end_pfn` with them: it may be more.

    :raises KernelInvalid: the kernel asks for addresses that cannot be mapped.
    """
    separate = kernel.p2m_base is not None
    mapped = not kernel.notes.mod_start_pfn
    ramdisk_pages, list_pages = pages(ramdisk_len), pages(nr_pages * kernel.bits // 8)
    pfn = pages(kernel.end)
    ramdisk_pfn = pfn
    if mapped:
        pfn += ramdisk_pages
    p2m_pfn = pfn
    if not separate:
        pfn += list_pages
    start_info_pfn, store_pfn, console_pfn, pt_base_pfn = pfn, pfn + 1, pfn + 2, pfn + 3
    tables, virt_end = _initial_mapping(kernel, pt_base_pfn)
    stack_pfn = pt_base_pfn + len(tables.tables)
    nr_pt_frames = len(tables.tables)
    end = (virt_end - kernel.virt_base) // PAGE_SIZE
    if not mapped:
        ramdisk_pfn = end
        end += ramdisk_pages
    p2m_frames = list_pages
    p2m_va = kernel.virt_base + p2m_pfn * PAGE_SIZE
    if kernel.p2m_base is not None:
        p2m_pfn, p2m_va = end, kernel.p2m_base
        p2m_end = p2m_va + list_pages * PAGE_SIZE
        if not usable_virtual(p2m_va, p2m_end) or (p2m_va < virt_end and p2m_end > kernel.virt_base):
            raise KernelInvalid(
                f"{kernel.name} is damaged: its p2m list cannot be mapped at {p2m_va:#x}; copy it again"
            )
        p2m_frames += tables.add(p2m_va, p2m_end, p2m_pfn + list_pages)
        end += p2m_frames
    return Layout(
        virt_base=kernel.virt_base,
        virt_end=virt_end,
        ramdisk_pfn=ramdisk_pfn,
        ramdisk_mapped=mapped,
        p2m_pfn=p2m_pfn,
        p2m_va=p2m_va,
        p2m_separate=separate,
        p2m_list_pages=list_pages,
        p2m_frames=p2m_frames,
        start_info_pfn=start_info_pfn,
        store_pfn=store_pfn,
        console_pfn=console_pfn,
        pt_base_pfn=pt_base_pfn,
        nr_pt_frames=nr_pt_frames,
        stack_pfn=stack_pfn,
        end_pfn=end,
        tables=tables,
    )


def _initial_mapping(kernel: Kernel, pt_base_pfn: int) -> tuple[TableSet, int]:
    """Page tables that map everything up to themselves, the stack and the padding; and where the mapping ends."""
    extra = 1 + pages(_PADDING)
    used = kernel.virt_base + pt_base_pfn * PAGE_SIZE
    count = 0
    while True:
        virt_end = -(-(used + (count + extra) * PAGE_SIZE) // _ALIGNMENT) * _ALIGNMENT
        if not usable_virtual(kernel.virt_base, virt_end, kernel.bits):
            raise KernelInvalid(
                f"{kernel.name} cannot be mapped from {kernel.virt_base:#x} to {virt_end:#x}: "
                "use a smaller ramdisk, or another kernel"
            )
        tables = TableSet(bits=kernel.bits)
        needed = tables.add(kernel.virt_base, virt_end, pt_base_pfn)
        if needed <= count:
            return tables, virt_end
        count = needed
