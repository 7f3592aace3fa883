"""What drivers that do not read kernels themselves ask of a kernel and a ramdisk."""

from __future__ import annotations

import os

from hypervisor.errors import KernelInvalid, MemoryTooSmall, RamdiskInvalid
from hypervisor.toolstack.spec import DomainSpec


def check_files(spec: DomainSpec) -> None:
    """Kernel and ramdisk exist and look like what they should be; both fit into the memory."""
    size = _kernel_size(spec.boot.kernel)
    if spec.boot.ramdisk is not None:
        try:
            ramdisk = os.stat(spec.boot.ramdisk).st_size
        except OSError as exc:
            raise RamdiskInvalid(f"ramdisk {spec.boot.ramdisk}: {exc.strerror}: give a readable file") from exc
        if not os.path.isfile(spec.boot.ramdisk) or ramdisk == 0:
            raise RamdiskInvalid(f"ramdisk {spec.boot.ramdisk} is empty or no file: give an initramfs image")
        size += ramdisk
    if size > spec.memory_mib << 20:
        raise MemoryTooSmall(
            f"kernel and ramdisk need {(size >> 20) + 1} MiB, memory_mib is {spec.memory_mib}: give more memory"
        )


def _kernel_size(path: str) -> int:
    try:
        with open(path, "rb") as file:
            head = file.read(0x210)
            size = os.fstat(file.fileno()).st_size
    except OSError as exc:
        raise KernelInvalid(f"kernel {path}: {exc.strerror}: give a readable kernel image") from exc
    # ELF magic, or the boot protocol's signature (Linux Documentation/arch/x86/boot.rst)
    if head[:4] != b"\x7fELF" and head[0x202:0x206] != b"HdrS":
        raise KernelInvalid(f"kernel {path} is neither ELF nor bzImage: give a kernel image")
    return size
