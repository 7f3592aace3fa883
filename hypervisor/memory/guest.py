"""Copying to and from guest virtual addresses, with the rights the guest itself has.

A 64-bit PV kernel runs in ring 3, so a page is reachable when every level of
the walk has the user bit; Xen's own mappings lack it. Each access walks anew:
nothing is cached that a guest could change meanwhile.
"""

from __future__ import annotations

import struct
from collections.abc import Callable

from hypervisor.abi import errno
from hypervisor.engines.x86 import PTE_ADDR, PTE_P, PTE_PSE, PTE_RW, PTE_US
from hypervisor.errors import XenError
from hypervisor.memory.codewatch import CodeWatch
from hypervisor.memory.physical import DomainMemory
from hypervisor.types import PAGE_SIZE

MAX_COPY = 1 << 20
"""Most bytes of one copy; hypercall arguments are smaller by far."""

_LOW_END = 1 << 47
_XEN_END = 0xFFFF_8800_0000_0000
"""Between these lie the non-canonical addresses and Xen's area: the guest may read its M2P there, but hand over none
of it (HYPERVISOR_VIRT_END of public/arch-x86/xen-x86_64.h)."""


class GuestAccess:
    """Copies for the current vCPU.

    :param cr3: returns the machine address of the page-table root in force.
    """

    __slots__ = ("_base", "_bytes", "_code", "_cr3", "_limit", "_words")

    def __init__(self, memory: DomainMemory, cr3: Callable[[], int], code: CodeWatch) -> None:
        self._bytes = memory.bytes
        self._words = memory.words
        self._base = memory.base_mpa
        self._limit = memory.frames * PAGE_SIZE
        self._cr3 = cr3
        self._code = code

    def translate(self, va: int, *, write: bool = False) -> int:
        """Offset in the domain's memory that `va` maps to, or -1."""
        words, base, limit = self._words, self._base, self._limit
        need = PTE_P | PTE_US | PTE_RW if write else PTE_P | PTE_US
        table = (self._cr3() & PTE_ADDR) - base
        if not 0 <= va < _LOW_END and not _XEN_END <= va < 1 << 64:
            return -1
        for shift in (36, 27, 18):
            if not 0 <= table < limit:
                return -1
            entry = words[(table + ((va >> shift) & 0xFF8)) >> 3]
            if entry & need != need or entry & PTE_PSE:
                return -1
            table = (entry & PTE_ADDR) - base
        if not 0 <= table < limit:
            return -1
        entry = words[(table + ((va >> 9) & 0xFF8)) >> 3]
        if entry & need != need:
            return -1
        offset = (entry & PTE_ADDR) - base
        return offset + (va & 0xFFF) if 0 <= offset < limit else -1

    def l1_slot(self, va: int) -> int:
        """Word offset of the L1 entry that maps `va`, whatever it holds, or -1 when there is no L1 table."""
        words, base, limit = self._words, self._base, self._limit
        table = (self._cr3() & PTE_ADDR) - base
        for shift in (36, 27, 18):
            entry = words[(table + ((va >> shift) & 0xFF8)) >> 3]
            if not entry & PTE_P or entry & PTE_PSE:
                return -1
            table = (entry & PTE_ADDR) - base
            if not 0 <= table < limit:
                return -1
        return (table + ((va >> 9) & 0xFF8)) >> 3

    def read(self, va: int, size: int) -> bytes:
        """A private copy. Nothing is read for size 0, wherever `va` points. :raises XenError: EFAULT."""
        if not size:
            return b""
        if (va & 0xFFF) + size <= PAGE_SIZE:
            at = self.translate(va)
            if at < 0:
                raise XenError(errno.EFAULT, f"cannot read {va:#x}")
            return bytes(self._bytes[at : at + size])
        if size > MAX_COPY:
            raise XenError(errno.EFAULT, f"copy of {size} bytes")
        out = bytearray()
        while size:
            part = min(size, PAGE_SIZE - (va & 0xFFF))
            at = self.translate(va)
            if at < 0:
                raise XenError(errno.EFAULT, f"cannot read {va:#x}")
            out += self._bytes[at : at + part]
            va += part
            size -= part
        return bytes(out)

    def write(self, va: int, data: bytes) -> None:
        """Copy out. :raises XenError: EFAULT; what lay before the bad page is written, as in Xen."""
        done, size = 0, len(data)
        while done < size:
            part = min(size - done, PAGE_SIZE - (va & 0xFFF))
            at = self.translate(va, write=True)
            if at < 0:
                raise XenError(errno.EFAULT, f"cannot write {va:#x}")
            self._bytes[at : at + part] = data[done : done + part]
            self._code.host_wrote(at >> 12)
            va += part
            done += part

    def read_u64(self, va: int) -> int:
        if not va & 7:
            at = self.translate(va)
            if at < 0:
                raise XenError(errno.EFAULT, f"cannot read {va:#x}")
            return self._words[at >> 3]
        return int.from_bytes(self.read(va, 8), "little")

    def write_u64(self, va: int, value: int) -> None:
        self.write(va, value.to_bytes(8, "little"))

    def read_u32(self, va: int) -> int:
        return int.from_bytes(self.read(va, 4), "little")

    def write_u32(self, va: int, value: int) -> None:
        self.write(va, (value & 0xFFFF_FFFF).to_bytes(4, "little"))

    def unpack(self, layout: struct.Struct, va: int) -> tuple[int, ...]:
        return layout.unpack(self.read(va, layout.size))
