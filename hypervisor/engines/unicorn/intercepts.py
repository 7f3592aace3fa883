"""Instructions that the library tells of as exits of a virtual machine (SVM intercepts), on the direct path."""

from __future__ import annotations

from typing import Any

from hypervisor.engines import x86
from hypervisor.engines.base import TrapHandler
from hypervisor.engines.unicorn.private import EXIT_CPUID, EXIT_PAUSE
from hypervisor.engines.unicorn.tablewalk import TableWalk

_LAST_BYTE = {EXIT_PAUSE: 0x90, EXIT_CPUID: 0xA2}
"""Of each instruction; no prefix, and no byte before it, is the same."""


class Intercepts:
    """A part of `hypervisor.engines.unicorn.engine.UnicornEngine`."""

    regs: Any
    _tables: TableWalk
    _handler: TrapHandler | None

    def _intercepted(self, number: int) -> None:
        regs, handler, last = self.regs, self._handler, _LAST_BYTE[number]
        assert handler is not None
        at = regs.segment_base(x86.CS) + regs.rip
        length = next((n for n in range(1, 15) if self._tables.peek((at + n) & x86.MASK64) == last), 1) + 1
        regs.rip = (regs.rip + length) & x86.MASK64
        if number == EXIT_CPUID:
            handler.cpuid()
        if regs.single_step:
            handler.exception(x86.DB, 0, False)
        elif number == EXIT_PAUSE:
            handler.spinning()
