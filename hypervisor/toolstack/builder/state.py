"""What the domain builder takes and what it hands to the machine."""

from __future__ import annotations

import dataclasses
from typing import Any

from hypervisor.errors import HypervisorBug
from hypervisor.types import PAGE_SIZE, Mfn, Pfn, Port


@dataclasses.dataclass(frozen=True, slots=True)
class BuildMemory:
    """A domain's RAM, zeroed.

    :ivar view: writable bytes; pfn *p* starts at ``p * 4096``. May be longer than the RAM.
    :ivar base_mfn: machine frame of pfn 0; pfn *p* is ``base_mfn + p``.
    :ivar nr_pages: RAM pages, >= 1.
    """

    view: memoryview
    base_mfn: Mfn
    nr_pages: int

    def __post_init__(self) -> None:
        if self.view.readonly or self.view.itemsize != 1 or self.nr_pages < 1:
            raise HypervisorBug("the builder needs a writable byte view of at least one page")
        if len(self.view) < self.nr_pages * PAGE_SIZE:
            raise HypervisorBug(f"the view holds {len(self.view)} bytes, less than {self.nr_pages} pages")


@dataclasses.dataclass(frozen=True, slots=True)
class BootState:
    """Start-of-day of a PV guest: registers, and where things lie in its memory.

    The first vCPU starts at `entry` with rsp, rsi and cr3 as given, rflags 0x200
    and flat selectors; all other registers are zero.

    :ivar rsi: virtual address of start_info.
    :ivar l4_mfn: the page-table root (cr3). Its slots 256..271 are zero: they are Xen's. The L3 of a 32-bit guest.
    :ivar page_tables: (pfn, level 1..4) of each page-table page, root first; all mapped read-only or not at all.
    :ivar bits: 64 or 32.
    :ivar extended_cr3: a 32-bit guest gets VMASST_TYPE_pae_extended_cr3 from the start.
    :ivar pt_base_pfn: first page of the ``nr_pt_frames`` that start_info tells the guest of.
    :ivar virt_base: virtual address of pfn 0; the initial mapping is ``virt_base .. virt_end-1``.
    :ivar features_supported: bit mask, numbers of public/features.h.
    """

    entry: int
    rsp: int
    rsi: int
    l4_mfn: Mfn
    shared_info_mfn: Mfn
    start_info_mfn: Mfn
    store_mfn: Mfn
    console_mfn: Mfn
    store_port: Port
    console_port: Port
    virt_base: int
    virt_end: int
    pt_base_pfn: Pfn
    nr_pt_frames: int
    page_tables: tuple[tuple[int, int], ...]
    nr_pages: int
    hypercall_page_va: int | None = None
    suspend_cancel: bool = False
    features_supported: int = 0
    features_required: int = 0
    guest_os: str = ""
    guest_version: str = ""
    bits: int = 64
    extended_cr3: bool = False

    def to_json(self) -> dict[str, Any]:
        data = dataclasses.asdict(self)
        data["page_tables"] = [list(pair) for pair in self.page_tables]
        return data

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> BootState:
        fields = dict(data)
        fields["page_tables"] = tuple((int(pfn), int(level)) for pfn, level in fields["page_tables"])
        return cls(**fields)
