"""Privileged instructions a PV kernel may use: emulated after their #GP (xen/arch/x86/pv/emul-priv-op.c)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hypervisor import abi
from hypervisor.cpu.cpuid import GuestCpuid
from hypervisor.cpu.decode import DecodeError, Instruction, decode
from hypervisor.cpu.msr import MsrPolicy
from hypervisor.cpu.stackfault import is_stack_fault
from hypervisor.cpu.traps import Traps
from hypervisor.engines import x86
from hypervisor.errors import XenError

FORCED_CPUID = b"\x0f\x0bxen\x0f\xa2"
"""``ud2; .ascii "xen"; cpuid``: XEN_EMULATE_PREFIX CPUID (public/arch-x86/xen.h)."""

_CR2 = abi.VCPU_INFO_ARCH + abi.ARCH_VCPU_INFO_CR2
_IN = frozenset((0xE4, 0xE5, 0xEC, 0xED))
_OUT = frozenset((0xE6, 0xE7, 0xEE, 0xEF))


class PrivilegedOps:
    """Emulator for one domain.

    :param new_baseptr: MMUEXT_NEW_BASEPTR with a machine frame number.
    """

    def __init__(
        self,
        traps: Traps,
        cpuid: GuestCpuid,
        new_baseptr: Callable[[int], None],
    ) -> None:
        self._traps = traps
        self._cpuid = cpuid
        self.msr = MsrPolicy(traps, cpuid.policy.msrs)
        self._new_baseptr = new_baseptr
        self._regs: Any = traps.regs

    def _fetch(self, at: int) -> int:
        offset = self._traps.guest.translate((self._regs.rip + at) & x86.MASK64)
        return self._traps.memory.bytes[offset] if offset >= 0 else -1

    def forced_cpuid(self) -> bool:
        """Handle the emulate-prefixed CPUID at RIP; False: it is something else."""
        for at, value in enumerate(FORCED_CPUID):
            if self._fetch(at) != value:
                return False
        self.answer_cpuid()
        self._regs.rip = (self._regs.rip + len(FORCED_CPUID)) & x86.MASK64
        return True

    def answer_cpuid(self) -> None:
        """Fill the registers as `cpuid` does; RIP stays."""
        gpr = self._regs.gpr
        result = self._cpuid.query(gpr[x86.RAX] & x86.MASK32, gpr[x86.RCX] & x86.MASK32)
        gpr[x86.RAX], gpr[x86.RBX], gpr[x86.RCX], gpr[x86.RDX] = result

    def emulate(self) -> bool:
        """Handle the instruction at RIP; False: inject the #GP."""
        try:
            instruction = decode(self._fetch, self._regs.long_mode_code)
        except DecodeError:
            return False
        if not self._execute(instruction):
            return False
        self._regs.rip = (self._regs.rip + instruction.length) & x86.MASK64
        return True

    def fault_by_stack(self) -> bool:
        """Whether a #GP(0) of the instruction at RIP is #SS(0) on a processor."""
        return bool(self._regs.long_mode_code) and is_stack_fault(self._fetch, self._regs.gpr)

    def _io_allowed(self) -> bool:
        """The guest kernel counts as ring 0 once it asked for an architectural IOPL, else as ring 1 (iopl_ok)."""
        state = self._traps.state
        kernel_level = 0 if self._traps.architectural_iopl else 1
        return bool(state.iopl >= (kernel_level if state.kernel_mode else 3))

    def _execute(self, ins: Instruction) -> bool:
        op = ins.opcode
        if op in _IN or op in _OUT:
            return self._port(ins)
        if op in (0xFA, 0xFB):  # cli, sti: without effect on a PV guest's events, but allowed at its IOPL
            return self._io_allowed()
        if not self._traps.state.kernel_mode:
            return False
        if op == 0x0F09:  # wbinvd: no device sees our memory, nothing to write back
            return True
        if op == 0x0F06:
            self._regs.task_switched = False
            return True
        if op == 0x0FA2:
            self.answer_cpuid()
            return True
        if op == 0x0F32:
            return self._read_msr()
        if op == 0x0F30:
            return self._write_msr()
        if op in (0x0F20, 0x0F22):
            return self._control_register(ins)
        if op in (0x0F21, 0x0F23):
            return self._debug_register(ins)
        return False

    def _port(self, ins: Instruction) -> bool:
        """Ports of a domain without devices: reads are all ones, writes go nowhere."""
        if not self._io_allowed():
            return False
        if ins.opcode in _IN:
            gpr = self._regs.gpr
            size = 1 if ins.opcode in (0xE4, 0xEC) else min(ins.size, 4)
            gpr[x86.RAX] = x86.MASK32 if size == 4 else gpr[x86.RAX] | (1 << size * 8) - 1
        return True

    def _read_msr(self) -> bool:
        gpr = self._regs.gpr
        value = self.msr.read(gpr[x86.RCX] & x86.MASK32)
        if value is None:
            return False
        gpr[x86.RAX], gpr[x86.RDX] = value & x86.MASK32, value >> 32
        return True

    def _write_msr(self) -> bool:
        gpr = self._regs.gpr
        value = gpr[x86.RAX] & x86.MASK32 | (gpr[x86.RDX] & x86.MASK32) << 32
        return self.msr.write(gpr[x86.RCX] & x86.MASK32, value)

    def _control_register(self, ins: Instruction) -> bool:
        gpr, state, memory = self._regs.gpr, self._traps.state, self._traps.memory
        number, general = ins.reg, ins.rm
        if ins.opcode == 0x0F20:
            if number == 0:
                value = x86.CR0_PE | x86.CR0_MP | x86.CR0_ET | x86.CR0_NE | x86.CR0_WP | x86.CR0_AM | x86.CR0_PG
                value |= x86.CR0_TS if self._regs.task_switched else 0
            elif number == 2:
                value = memory.words[(state.vcpu_info + _CR2) >> 3]
            elif number == 3:
                value = state.kernel_cr3
            elif number == 4:
                value = x86.CR4_PAE | x86.CR4_OSFXSR | x86.CR4_OSXMMEXCPT
            else:
                return False
            gpr[general] = value
            return True
        value = gpr[general]
        if number == 0:
            self._regs.task_switched = bool(value & x86.CR0_TS)
        elif number == 2:
            memory.words[(state.vcpu_info + _CR2) >> 3] = value
        elif number == 3:
            try:
                self._new_baseptr(value >> 12)
            except XenError:
                return False
        elif number != 4:
            return False
        return True

    def _debug_register(self, ins: Instruction) -> bool:
        gpr, registers = self._regs.gpr, self._traps.vcpu.debug_registers
        number = ins.reg + 2 if ins.reg in (4, 5) else ins.reg
        if number > 7:
            return False
        if ins.opcode == 0x0F21:
            gpr[ins.rm] = registers[number]
            return True
        return set_debug_register(registers, number, gpr[ins.rm])


def set_debug_register(registers: list[int], number: int, value: int) -> bool:
    """Store a guest's DR value; False when Xen refuses it (xen/arch/x86/pv/misc-hypercalls.c)."""
    if number < 4:
        if not x86.is_canonical(value) or (value >= 0xFFFF_8000_0000_0000 and value < 0xFFFF_8800_0000_0000):
            return False
    elif number == 6:
        value = (value & 0xE00F) | 0xFFFF_0FF0
    elif number == 7:
        value = (value & 0xFFFF_27FF) | 0x400
        if any((value >> (16 + 4 * i)) & 3 == 2 for i in range(4)):
            return False  # I/O breakpoints
    else:
        return False
    registers[number] = value
    return True
