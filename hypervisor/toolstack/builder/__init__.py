"""The domain builder: kernel files and start-of-day memory of PV guests.

::

    kernel = KernelCache(directory).load("/boot/vmlinuz")      # or load_kernel(path)
    ramdisk = load_ramdisk("/boot/initrd.img", guest_os=kernel.notes.guest_os)
    plan_memory(kernel, len(ramdisk), memory_mib)              # before anything is claimed
    state = build(memory, kernel, ramdisk, cmdline, shared_info_mfn=mfn)
"""

from hypervisor.toolstack.builder.build import build, minimum_memory_mib, plan_memory
from hypervisor.toolstack.builder.cache import KernelCache
from hypervisor.toolstack.builder.kernel import Kernel, load_kernel, parse_kernel
from hypervisor.toolstack.builder.ramdisk import check_ramdisk, load_ramdisk
from hypervisor.toolstack.builder.state import BootState, BuildMemory

__all__ = [
    "BootState",
    "BuildMemory",
    "Kernel",
    "KernelCache",
    "build",
    "check_ramdisk",
    "load_kernel",
    "load_ramdisk",
    "minimum_memory_mib",
    "parse_kernel",
    "plan_memory",
]
