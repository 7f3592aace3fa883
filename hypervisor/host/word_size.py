"""How wide a kernel's addresses are, by a look at the first bytes of its file.

The host process gives a domain its frames before the kernel is read, and it does not read kernels: that is done
in the domain process, where it can do no harm. What is not known counts as 32 bits.
"""

from __future__ import annotations

import contextlib
import os
import zlib

_LOOK = 0x250
_GZIP = b"\x1f\x8b"
_ELF, _ELF64 = b"\x7fELF", 2
_BZIMAGE_AT, _BZIMAGE = 0x202, b"HdrS"
_VERSION_AT, _FLAGS_AT, _WITH_FLAGS = 0x206, 0x236, 0x20C  # Linux, Documentation/arch/x86/boot.rst
_KERNEL_64 = 1


def is_64bit(path: str) -> bool:
    """Whether it is a kernel for 64-bit guests, ELF (gzipped or not) or bzImage; False: no, or nobody knows."""
    try:
        # Not to hang on a pipe.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (OSError, ValueError):
        return False
    try:
        with contextlib.suppress(OSError):
            return _is_64bit(os.pread(fd, _LOOK, 0))
    finally:
        os.close(fd)
    return False


def _is_64bit(head: bytes) -> bool:
    if head.startswith(_GZIP):
        try:
            head = zlib.decompressobj(wbits=31).decompress(head, 8)
        except zlib.error:
            return False
    if head.startswith(_ELF):
        return head[4:5] == bytes([_ELF64])
    if head[_BZIMAGE_AT : _BZIMAGE_AT + 4] != _BZIMAGE or len(head) < _LOOK:
        return False
    version = int.from_bytes(head[_VERSION_AT : _VERSION_AT + 2], "little")
    return version >= _WITH_FLAGS and bool(head[_FLAGS_AT] & _KERNEL_64)
