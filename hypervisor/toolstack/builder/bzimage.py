"""The payload of a Linux bzImage (Documentation/arch/x86/boot.rst, boot protocol 2.08 and later)."""

from __future__ import annotations

import struct

from hypervisor.errors import KernelInvalid
from hypervisor.toolstack.builder import elf
from hypervisor.toolstack.builder.unpack import unpack

_SETUP_SECTS = 0x1F1
_BOOT_FLAG = 0x1FE
_MAGIC = 0x202
_VERSION = 0x206
_PAYLOAD = 0x248
_MIN_VERSION = 0x0208


def is_bzimage(data: memoryview) -> bool:
    return len(data) > _PAYLOAD + 8 and bytes(data[_MAGIC : _MAGIC + 4]) == b"HdrS"


def unpack_bzimage(data: memoryview, limit: int, name: str) -> bytes:
    """The ELF kernel inside a bzImage.

    :param limit: most bytes the unpacked kernel may have.
    :raises KernelInvalid: damaged, too old, or larger than `limit` unpacked.
    :raises Unsupported: compressed in a way that needs a missing library.
    """
    version, boot_flag = (struct.unpack_from("<H", data, at)[0] for at in (_VERSION, _BOOT_FLAG))
    if boot_flag != 0xAA55:
        raise KernelInvalid(f"{name} is damaged: its boot sector signature is missing; copy or download it again")
    if version < _MIN_VERSION:
        raise KernelInvalid(
            f"{name} speaks boot protocol {version >> 8}.{version & 255:02}: give a kernel of 2008 or later (2.08)"
        )
    offset, length = struct.unpack_from("<II", data, _PAYLOAD)
    start = ((data[_SETUP_SECTS] or 4) + 1) * 512 + offset
    if length < 8 or start + length > len(data):
        raise KernelInvalid(
            f"{name} is truncated: its payload ends past the end of the file; copy or download it again"
        )
    payload = data[start : start + length]
    if bytes(payload[:4]) == elf.MAGIC:
        return bytes(payload)
    # Linux's build appends the unpacked size to every format (for gzip it is the trailer's own field).
    (size,) = struct.unpack_from("<I", payload, length - 4)
    if size > limit:
        raise KernelInvalid(f"{name} unpacks to {size >> 20} MiB: more than {limit >> 20} MiB is not accepted")
    image = unpack(payload, size, name)
    if len(image) != size:
        raise KernelInvalid(
            f"{name} is damaged: it unpacks to {len(image)} bytes, not {size}; copy or download it again"
        )
    return image
