"""Copying to and from a 32-bit guest's memory, with the rights of its kernel in ring 1.

A hypercall's 32-bit arguments are translated into the 64-bit ones that the handlers know. Where such an argument
is a pointer to something translated too, it points into a scratch area that lies above all 32-bit addresses, so
that no guest can name it (COMPAT_ARG_XLAT_VIRT_BASE in Xen).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from hypervisor import abi
from hypervisor.abi import errno
from hypervisor.engines.x86 import PTE_ADDR, PTE_P, PTE_PSE, PTE_RW
from hypervisor.errors import XenError
from hypervisor.memory.codewatch import CodeWatch
from hypervisor.memory.guest import GuestAccess
from hypervisor.memory.physical import DomainMemory

SCRATCH = 1 << 40
MAX_SCRATCH = 1 << 20


class GuestAccess32(GuestAccess):
    """See `GuestAccess`; addresses below 4 GiB are the guest's, from `SCRATCH` on lies the scratch area."""

    __slots__ = ("_scratch",)

    def __init__(self, memory: DomainMemory, cr3: Callable[[], int], code: CodeWatch) -> None:
        super().__init__(memory, cr3, code)
        self._scratch = bytearray()

    # -- scratch

    @contextmanager
    def translating(self) -> Iterator[None]:
        """What is put into the scratch area inside is gone afterwards."""
        mark = len(self._scratch)
        try:
            yield
        finally:
            del self._scratch[mark:]

    def put(self, data: bytes) -> int:
        """Place `data` in the scratch area; its address, a multiple of 16. :raises XenError: EFAULT, too much."""
        self._scratch += bytes(-len(self._scratch) % 16)
        at = len(self._scratch)
        if at + len(data) > MAX_SCRATCH:
            raise XenError(errno.EFAULT, "arguments too large to translate")
        self._scratch += data
        return SCRATCH + at

    def _in_scratch(self, va: int, size: int) -> int:
        at = va - SCRATCH
        if not 0 <= at <= len(self._scratch) - size:
            raise XenError(errno.EFAULT, f"{va:#x} is not in the scratch area")
        return at

    # -- access

    def translate(self, va: int, *, write: bool = False) -> int:
        words, base, limit = self._words, self._base, self._limit
        if not 0 <= va < abi.COMPAT_HYPERVISOR_VIRT_START:
            return -1
        need = PTE_P | PTE_RW if write else PTE_P
        table = (self._cr3() & PTE_ADDR) - base
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
        return super().l1_slot(va) if 0 <= va < abi.COMPAT_HYPERVISOR_VIRT_START else -1

    def read(self, va: int, size: int) -> bytes:
        if va >= SCRATCH and size:
            at = self._in_scratch(va, size)
            return bytes(self._scratch[at : at + size])
        return super().read(va, size)

    def write(self, va: int, data: bytes) -> None:
        if va >= SCRATCH:
            at = self._in_scratch(va, len(data))
            self._scratch[at : at + len(data)] = data
        else:
            super().write(va, data)

    def read_u64(self, va: int) -> int:
        return int.from_bytes(self.read(va, 8), "little")
