"""What start-of-day of a 32-bit (PAE) PV guest has of its own; the rest is in `pv64`.

Three levels of tables with 8-byte entries, a p2m list of 4-byte frame numbers, the 32-bit start_info, and a
hypercall page that calls by ``int $0x82`` (xen/arch/x86/pv/hypercall.c, pv_ring1_init_hypercall_page).
"""

from __future__ import annotations

import struct

import numpy as np

from hypervisor import abi
from hypervisor.errors import HostFailure
from hypervisor.toolstack.builder.kernel import Kernel
from hypervisor.toolstack.builder.layout import Layout
from hypervisor.toolstack.builder.state import BuildMemory
from hypervisor.types import PAGE_SHIFT, PAGE_SIZE

HYPERCALL_VECTOR = 0x82
_FRAMES_BELOW_4G = 1 << (32 - PAGE_SHIFT)


def check_placement(memory: BuildMemory, kernel: Kernel, layout: Layout, shared_info_mfn: int) -> None:
    """Whether the frames the guest is told of by 32-bit machine addresses have such addresses.

    :raises HostFailure: they lie above 4 GiB.
    """
    root = memory.base_mfn + layout.pt_base_pfn
    if shared_info_mfn >= _FRAMES_BELOW_4G or (root >= _FRAMES_BELOW_4G and not kernel.extended_cr3):
        raise HostFailure(
            f"{kernel.name} is a 32-bit kernel and needs machine memory below 4 GiB, which other domains have:"
            " stop one of those first"
        )


def write_p2m(memory: BuildMemory, layout: Layout) -> None:
    """The list of 4-byte machine frame numbers."""
    frames = np.frombuffer(memory.view[: memory.nr_pages * PAGE_SIZE], dtype="<u4")
    at = layout.p2m_pfn * PAGE_SIZE // 4
    frames[at : at + memory.nr_pages] = np.arange(memory.base_mfn, memory.base_mfn + memory.nr_pages, dtype=np.uint32)


def hypercall_page() -> bytes:
    """128 stubs of 32 bytes.

    ::

        mov $nr,%eax; int $0x82; ret
        iret (23): push eax; mov $23,%eax; int $0x82     (jumped to, never returns)
    """
    call = bytes((0xCD, HYPERCALL_VECTOR))
    stubs = []
    for number in range(PAGE_SIZE // 32):
        load = b"\xb8" + struct.pack("<I", number) + call
        code = b"\x50" + load if number == abi.HYPERVISOR_iret else load + b"\xc3"
        stubs.append(code.ljust(32, b"\xcc"))
    return b"".join(stubs)
