"""Build a domain's first moment: the entry points of the domain builder."""

from __future__ import annotations

import logging

from hypervisor.errors import MemoryTooSmall
from hypervisor.toolstack.builder import pv32, pv64
from hypervisor.toolstack.builder.kernel import Kernel
from hypervisor.toolstack.builder.layout import Layout, plan_layout
from hypervisor.toolstack.builder.state import BootState, BuildMemory
from hypervisor.types import PAGE_SIZE, Mfn, Pfn, Port

LOG = logging.getLogger(__name__)

_PAGES_PER_MIB = (1 << 20) // PAGE_SIZE
_STORE_PORT = Port(1)
_CONSOLE_PORT = Port(2)


def minimum_memory_mib(kernel: Kernel, ramdisk_len: int) -> int:
    """Least memory, MiB, in which kernel, ramdisk and start-of-day pages fit. Running takes more than that."""
    mib = 1
    while (needed := plan_layout(kernel, ramdisk_len, mib * _PAGES_PER_MIB).end_pfn) > mib * _PAGES_PER_MIB:
        mib = -(-needed // _PAGES_PER_MIB)
    return mib


def plan_memory(kernel: Kernel, ramdisk_len: int, memory_mib: int) -> None:
    """Check that the domain fits, before anything is claimed for it.

    :param ramdisk_len: bytes, 0 without a ramdisk.
    :raises MemoryTooSmall: it does not; the message names the least that does.
    :raises KernelInvalid: the kernel asks for addresses that cannot be mapped.
    """
    _check_fit(kernel, ramdisk_len, memory_mib * _PAGES_PER_MIB)


def build(
    memory: BuildMemory,
    kernel: Kernel,
    ramdisk: bytes | memoryview | None = None,
    cmdline: str | bytes = "",
    *,
    shared_info_mfn: Mfn,
    store_port: Port = _STORE_PORT,
    console_port: Port = _CONSOLE_PORT,
    flags: int = 0,
    nx: bool = True,
) -> BootState:
    """Write kernel, ramdisk, p2m list, page tables and start_info into a new domain's memory.

    The pages of the xenstore and console rings stay zero, and so does
    shared_info: filling it is the machine's part.

    :param memory: zeroed RAM; only pages that hold something are touched.
    :param flags: SIF_* flags of start_info (public/xen.h); SIF_MOD_START_PFN is added when it applies.
    :param nx: map what is not code as not executable (Xen leaves that to the guest; an engine that translates
        code is slow on stores through executable pages).
    :raises MemoryTooSmall, KernelInvalid: see `plan_memory`.
    :raises SpecInvalid: the command line is too long.
    :raises HostFailure: a 32-bit guest's frames lie above 4 GiB.
    """
    ramdisk = ramdisk or b""
    layout = _check_fit(kernel, len(ramdisk), memory.nr_pages)
    personality = pv64 if kernel.bits == 64 else pv32
    if kernel.bits == 32:
        pv32.check_placement(memory, kernel, layout, shared_info_mfn)
    pv64.write_start_info(
        memory,
        layout,
        shared_info_mfn=shared_info_mfn,
        store_port=store_port,
        console_port=console_port,
        flags=flags,
        cmdline=cmdline.encode() if isinstance(cmdline, str) else cmdline,
        ramdisk_len=len(ramdisk),
    )
    pv64.load_image(memory, kernel)
    pv64.load_ramdisk(memory, layout, ramdisk)
    personality.write_p2m(memory, layout)
    pv64.write_page_tables(memory, kernel, layout, nx=nx)
    if kernel.hypercall_page is not None:
        at = kernel.hypercall_page - kernel.virt_base
        memory.view[at : at + PAGE_SIZE] = personality.hypercall_page()
    state = _boot_state(memory, kernel, layout, shared_info_mfn, store_port, console_port)
    LOG.debug(
        "built %s: entry %#x, initial mapping %#x..%#x, %d page tables",
        kernel.name,
        state.entry,
        layout.virt_base,
        layout.virt_end,
        len(state.page_tables),
    )
    return state


def _check_fit(kernel: Kernel, ramdisk_len: int, nr_pages: int) -> Layout:
    layout = plan_layout(kernel, ramdisk_len, nr_pages)
    if layout.end_pfn > nr_pages:
        raise MemoryTooSmall(
            f"{nr_pages // _PAGES_PER_MIB} MiB of memory do not hold {kernel.name} (up to {-(-kernel.end >> 20)} MiB)"
            f" and its ramdisk of {-(-ramdisk_len >> 20)} MiB:"
            f" give at least {minimum_memory_mib(kernel, ramdisk_len)} MiB, and more for it to run in"
        )
    return layout


def _boot_state(
    memory: BuildMemory, kernel: Kernel, layout: Layout, shared_info_mfn: Mfn, store_port: Port, console_port: Port
) -> BootState:
    def mfn(pfn: int) -> Mfn:
        return Mfn(memory.base_mfn + pfn)

    return BootState(
        entry=kernel.entry,
        rsp=layout.va(layout.stack_pfn + 1),
        rsi=layout.va(layout.start_info_pfn),
        l4_mfn=mfn(layout.pt_base_pfn),
        shared_info_mfn=shared_info_mfn,
        start_info_mfn=mfn(layout.start_info_pfn),
        store_mfn=mfn(layout.store_pfn),
        console_mfn=mfn(layout.console_pfn),
        store_port=store_port,
        console_port=console_port,
        virt_base=layout.virt_base,
        virt_end=layout.virt_end,
        pt_base_pfn=Pfn(layout.pt_base_pfn),
        nr_pt_frames=layout.nr_pt_frames,
        page_tables=tuple((pfn, level) for (level, _), pfn in layout.tables.tables.items()),
        nr_pages=memory.nr_pages,
        hypercall_page_va=kernel.hypercall_page,
        suspend_cancel=kernel.notes.suspend_cancel,
        features_supported=kernel.notes.features_supported,
        features_required=kernel.notes.features_required,
        guest_os=kernel.notes.guest_os,
        guest_version=kernel.notes.guest_version,
        bits=kernel.bits,
        extended_cr3=kernel.extended_cr3,
    )
