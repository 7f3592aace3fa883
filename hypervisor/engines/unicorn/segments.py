"""The segment registers and descriptor tables of an engine."""

from __future__ import annotations

from typing import Any

from hypervisor.engines.unicorn.fpu import FloatingPoint
from hypervisor.engines.unicorn.library import uc_x86

_SLOT_LDT = 6


class Segments(FloatingPoint):
    """A part of `hypervisor.engines.unicorn.engine.UnicornEngine`."""

    regs: Any
    _uc: Any
    _direct: Any

    def load_flat64(self, cs: int, ss: int) -> None:
        self.regs.load_flat64(cs, ss)

    def load_segment(self, index: int, selector: int, descriptor: int) -> None:
        self.regs.load_segment(index, selector, descriptor)

    def set_gdt(self, base: int, limit: int) -> None:
        self._uc.reg_write(uc_x86.UC_X86_REG_GDTR, (0, base, limit, 0))

    def set_ldt(self, selector: int, base: int, limit: int) -> None:
        attributes = 0x8200 if selector else 0
        if self._direct:
            self._direct.set_hidden(_SLOT_LDT, selector, base, limit, attributes)
        else:
            self._uc.reg_write(uc_x86.UC_X86_REG_LDTR, (selector, base, limit, attributes))
