"""What of the processor differs for a 32-bit guest: instructions that are emulated, and the wall clock's place."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from hypervisor import abi
from hypervisor.cpu.cpuid import GuestCpuid
from hypervisor.cpu.decode import RIP, Instruction
from hypervisor.cpu.emulate import PrivilegedOps
from hypervisor.cpu.msr import EFER, FS_BASE, GS_BASE, KERNEL_GS_BASE, MsrPolicy
from hypervisor.cpu.ptwr import PageTableWrites
from hypervisor.cpu.time import Clock
from hypervisor.cpu.traps import Traps
from hypervisor.engines import x86
from hypervisor.errors import XenError

_CR2 = abi.COMPAT_VCPU_INFO_ARCH
_READ_CR = 0x0F20
_BASES = frozenset((FS_BASE, GS_BASE, KERNEL_GS_BASE))


def cr3_of(mfn: int) -> int:
    """CR3 as a 32-bit guest sees it: frame numbers above 4 GiB go on in the low bits (xen_pfn_to_cr3)."""
    return (mfn << 12 | mfn >> 20) & x86.MASK32


def mfn_of(cr3: int) -> int:
    return (cr3 >> 12 | cr3 << 20) & x86.MASK32


class MsrPolicy32(MsrPolicy):
    """See `MsrPolicy`; without those of long mode."""

    __slots__ = ()

    def read(self, msr: int) -> int | None:
        if msr in _BASES:
            return None
        return x86.EFER_NX if msr == EFER else super().read(msr)

    def write(self, msr: int, value: int) -> bool:
        return msr not in _BASES and super().write(msr, value)


class PrivilegedOps32(PrivilegedOps):
    """See `PrivilegedOps`."""

    def __init__(self, traps: Traps, cpuid: GuestCpuid, new_baseptr: Callable[[int], None]) -> None:
        super().__init__(traps, cpuid, new_baseptr)
        self.msr = MsrPolicy32(traps, cpuid.policy.msrs)

    guest_root: Callable[[], int]
    """Frame of the running vCPU's L3; set by the domain."""

    def _fetch(self, at: int) -> int:
        regs = self._regs
        offset = self._traps.guest.translate((regs.segment_base(x86.CS) + regs.rip + at) & x86.MASK32)
        return self._traps.memory.bytes[offset] if offset >= 0 else -1

    def _control_register(self, ins: Instruction) -> bool:
        gpr, state, memory = self._regs.gpr, self._traps.state, self._traps.memory
        if ins.reg == 2:
            at = (state.vcpu_info + _CR2) >> 2
            if ins.opcode == _READ_CR:
                gpr[ins.rm] = memory.dwords[at]
            else:
                memory.dwords[at] = gpr[ins.rm] & x86.MASK32
            return True
        if ins.reg == 3:
            if ins.opcode == _READ_CR:
                gpr[ins.rm] = cr3_of(self.guest_root())
                return True
            try:
                self._new_baseptr(mfn_of(gpr[ins.rm] & x86.MASK32))
            except XenError:
                return False
            return True
        return super()._control_register(ins)


class PageTableWrites32(PageTableWrites):
    """See `PageTableWrites`. A kernel of 32 bits writes an 8-byte entry in two halves."""

    __slots__ = ()

    def _address(self, ins: Instruction) -> int:
        operand = ins.operand
        if operand is not None and operand.base == RIP:  # an absolute address in 32-bit code
            ins = dataclasses.replace(ins, operand=dataclasses.replace(operand, base=-1))
        address = super()._address(ins)
        return address if address < 0 else address & x86.MASK32

    def _fetch(self, at: int) -> int:
        regs = self._regs
        offset = self._guest.translate((regs.segment_base(x86.CS) + regs.rip + at) & x86.MASK32)
        return self._tables.memory.bytes[offset] if offset >= 0 else -1

    def _store_part(self, word: int, value: int, target: int, size: int) -> None:
        """An upper half that does not fit the lower one was written first: not present until the lower one comes."""
        try:
            self._store(word, value)
        except XenError:
            if size != 4 or not target & 4 or not value & x86.PTE_P:
                raise
            self._store(word, value & ~x86.PTE_P)


class Clock32(Clock):
    """See `Clock`; the wall clock's fields lie elsewhere in a 32-bit shared_info."""

    __slots__ = ()

    WALLCLOCK = (
        abi.COMPAT_SHARED_INFO_WC_VERSION,
        abi.COMPAT_SHARED_INFO_WC_SEC,
        abi.COMPAT_SHARED_INFO_WC_NSEC,
        abi.COMPAT_SHARED_INFO_ARCH + abi.COMPAT_ARCH_SHARED_INFO_WC_SEC_HI,
    )
