"""A look at the guest's page tables from outside, for what the public path has to work out."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

from hypervisor.engines import x86


class TableWalk:
    """:param cr3: the page-table root in force; memory [base, base+size) lies at host `address`."""

    __slots__ = ("_address", "_base", "_cr3", "_size")

    def __init__(self, cr3: Callable[[], int], base: int, size: int, address: int) -> None:
        self._cr3 = cr3
        self._base, self._size, self._address = base, size, address

    def _entry(self, mpa: int) -> int:
        offset = mpa - self._base
        if not 0 <= offset <= self._size - 8:
            return 0
        return ctypes.c_uint64.from_address(self._address + offset).value

    def walk(self, va: int) -> tuple[int, int]:
        """(leaf entry, machine address) of `va`; (0, 0) when it is not mapped."""
        table = self._cr3() & x86.PTE_ADDR
        for shift in (39, 30, 21, 12):
            entry = self._entry(table + ((va >> shift) & 511) * 8)
            if not entry & x86.PTE_P:
                return 0, 0
            if shift == 12 or (shift != 39 and entry & x86.PTE_PSE):
                mask = (1 << shift) - 1
                return entry, (entry & x86.PTE_ADDR & ~mask) + (va & mask)
            table = entry & x86.PTE_ADDR
        return 0, 0

    def peek(self, va: int) -> int:
        """The byte at `va`, or -1."""
        entry, mpa = self.walk(va)
        offset = mpa - self._base
        if not entry or not 0 <= offset < self._size:
            return -1
        return ctypes.c_uint8.from_address(self._address + offset).value
