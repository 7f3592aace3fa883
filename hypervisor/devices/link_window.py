"""Where a driver process maps granted frames: a window of its address space with a slot for each.

A slot is one page, and the page after it is never mapped: so each mapping is a memory area (VMA) of its own, and
to unmap it whole cannot fail for want of anything. The filter that guards the window
(`hypervisor.host.driver_sandbox`) sends every mapping of the guest's memory, and every munmap inside the
window, to the domain process, which knows what is granted.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from collections.abc import Sequence

PAGE = mmap.PAGESIZE
STRIDE = 2 * PAGE
SLOTS = 8192
BYTES = SLOTS * STRIDE
"""A power of two, and the window's alignment: a filter recognises its addresses by a mask."""

_PROT_NONE = 0
_MAP_NORESERVE = 0x4000
_MAP_FIXED = 0x10
_MAP_FIXED_NOREPLACE = 0x10_0000
_RESERVED = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
_FAILED = ctypes.c_void_p(-1).value

_libc = ctypes.CDLL(None, use_errno=True)
_mmap = _libc.mmap
_mmap.restype = ctypes.c_void_p
_mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
_munmap = _libc.munmap
_munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)


def map_memory(length: int, prot: int, flags: int, fd: int, offset: int = 0, address: int | None = None) -> int:
    """mmap(2) where Python's own would ask for more rights (fstat, dup). :raises OSError."""
    result = _mmap(address, length, prot, flags, fd, offset)
    if result is None or result == _FAILED:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return int(result)


def unmap_memory(address: int, length: int) -> None:
    """:raises OSError."""
    if _munmap(address, length):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def view_of(address: int, length: int, *, readonly: bool = False) -> memoryview:
    """Bytes of this process's memory; nothing keeps them mapped."""
    view = memoryview((ctypes.c_ubyte * length).from_address(address)).cast("B")
    return view.toreadonly() if readonly else view


class Window:
    """:ivar address: of its first slot; a multiple of `BYTES`."""

    def __init__(self) -> None:
        start = map_memory(2 * BYTES, _PROT_NONE, _RESERVED, -1)
        self.address = -(-start // BYTES) * BYTES
        if self.address > start:
            unmap_memory(start, self.address - start)
        unmap_memory(self.address + BYTES, start + BYTES - self.address)

    def at(self, slot: int) -> int:
        return self.address + slot * STRIDE

    def map(self, slot: int, fd: int, page: int, *, readonly: bool) -> memoryview:
        """Map a page of the guest's memory. :raises OSError: refused, or the process has too many mappings."""
        prot = mmap.PROT_READ if readonly else mmap.PROT_READ | mmap.PROT_WRITE
        at = map_memory(PAGE, prot, mmap.MAP_SHARED | _MAP_FIXED, fd, page * PAGE, self.at(slot))
        return view_of(at, PAGE, readonly=readonly)

    def unmap(self, slot: int) -> bool:
        """False: the slot cannot be used again. :raises OSError: it is mapped still."""
        unmap_memory(self.at(slot), PAGE)
        try:
            # Not with MAP_FIXED: another thread may have been given the hole meanwhile.
            map_memory(PAGE, _PROT_NONE, _RESERVED | _MAP_FIXED_NOREPLACE, -1, 0, self.at(slot))
        except OSError as exc:
            if exc.errno not in (errno.EEXIST, errno.ENOMEM):
                raise
            return False
        return True

    def settle(self) -> None:
        """Let the domain process know that this thread's unmaps are behind it: an munmap of nothing."""
        _munmap(self.address, 0)

    def close(self) -> None:
        unmap_memory(self.address, BYTES)


class Slots:
    """The free slots of a window."""

    def __init__(self, count: int = SLOTS) -> None:
        self._free = list(range(count))[::-1]

    def __len__(self) -> int:
        return len(self._free)

    def take(self, count: int) -> list[int]:
        """:raises MemoryError: so many are not free."""
        if count > len(self._free):
            raise MemoryError(f"{count} mappings more: at most {len(self._free)} fit")
        return [self._free.pop() for _ in range(count)]

    def give_back(self, slots: Sequence[int]) -> None:
        self._free.extend(slots)
