"""What the engine stopped for becomes a hypercall, an emulation or a trap of the guest's."""

from __future__ import annotations

from typing import Any

from hypervisor import abi
from hypervisor.cpu.traps import Traps
from hypervisor.domain import Domain
from hypervisor.engines import x86
from hypervisor.errors import GuestFault
from hypervisor.hypercalls.compat import Dispatcher32
from hypervisor.hypercalls.dispatch import Dispatcher

_WRITABLE_TABLES = 1 << abi.VMASST_TYPE_writable_pagetables
_FETCH = x86.PF_PRESENT | x86.PF_FETCH


class Trapping:
    """The half of a machine that the engine calls; everything in the run loop's thread."""

    domain: Domain
    engine: Any
    _traps: Traps
    _dispatcher: Dispatcher | Dispatcher32
    _leaving: bool

    def syscall(self) -> None:
        if self._traps.state.kernel_mode:
            self._dispatcher.hypercall()
        else:
            self._traps.user_syscall()
        if not self._leaving:
            self._traps.deliver_event()

    def exception(self, vector: int, error_code: int, software: bool) -> None:
        traps = self._traps
        if software:
            traps.software_interrupt(vector, self._interrupt_length(vector))
        elif vector == x86.PF:
            writes_table = error_code & 3 == 3 and traps.state.kernel_mode and self.domain.vm_assist & _WRITABLE_TABLES
            if writes_table and self.domain.table_writes.emulate(traps.regs.cr2):
                self._stepped()
            elif error_code & _FETCH != _FETCH or not self._allow_execution(traps.regs.cr2):
                traps.inject(x86.PF, error_code)
        elif vector == x86.GP:
            if self.domain.privileged.emulate():
                self._stepped()
            else:
                by_stack = error_code == 0 and self.domain.privileged.fault_by_stack()
                traps.inject(x86.SSF if by_stack else x86.GP, error_code)
        elif vector < 32:
            if vector == x86.NM:
                # Xen clears TS before it tells the guest (do_device_not_available).
                traps.regs.task_switched = False
            elif vector == x86.DB and traps.regs.single_step:
                traps.vcpu.debug_registers[6] |= x86.DR6_BS
            traps.inject(vector, error_code)
        else:
            raise GuestFault(f"unexpected vector {vector}")
        if not self._leaving:
            traps.deliver_event()

    def _stepped(self) -> None:
        """Behind an emulated instruction: it was a single step, too, if one was to be."""
        if self._traps.regs.single_step:
            self._traps.vcpu.debug_registers[6] |= x86.DR6_BS
            self._traps.inject(x86.DB)

    def _allow_execution(self, va: int) -> bool:
        return self.domain.tables.allow_execution(self.domain.guest.l1_slot(va))

    def _interrupt_length(self, vector: int) -> int:
        """Bytes of the interrupt instruction before RIP: `int3` and `into` have one, `int n` two."""
        if vector not in (x86.BP, x86.OF):
            return 2
        at = self.domain.guest.translate((self.engine.regs.rip - 1) & x86.MASK64)
        return 1 if at >= 0 and self.domain.memory.bytes[at] in (0xCC, 0xCE) else 2

    def invalid_opcode(self) -> None:
        if self.domain.privileged.forced_cpuid():
            self._stepped()
        else:
            self._traps.inject(x86.UD)
        if not self._leaving:
            self._traps.deliver_event()

    def cpuid(self) -> None:
        self.domain.privileged.answer_cpuid()
