"""Model-specific registers as a PV guest may see them (xen/arch/x86/pv/emul-priv-op.c, msr.c)."""

from __future__ import annotations

from collections.abc import Mapping

from hypervisor.cpu.traps import Traps
from hypervisor.engines import x86

EFER = 0xC000_0080
FS_BASE, GS_BASE, KERNEL_GS_BASE, TSC_AUX = 0xC000_0100, 0xC000_0101, 0xC000_0102, 0xC000_0103
TSC = 0x10
PAT = 0x277
MCG_CAP, MCG_STATUS, MCG_CTL = 0x179, 0x17A, 0x17B
MC0_CTL, MC0_CTL2 = 0x400, 0x280
_BANK_COUNT = 0xFF

# Written without effect, as Xen does for what it owns.
_IGNORED = frozenset((0x8B, 0x79, 0x174, 0x175, 0x176, 0x1A0, PAT, *range(0xC000_0081, 0xC000_0085)))


class MsrPolicy:
    """Reads and writes for the current vCPU. An unknown MSR faults.

    :param constants: what reads the same at all times (`hypervisor.cpu.policy`).
    :ivar mcg_cap: what IA32_MCG_CAP reads. A guest from a host with machine-check banks goes on as if it had them;
        no error is ever in one (xen/arch/x86/cpu/mcheck/vmce.c).
    """

    __slots__ = ("_constants", "_traps", "mcg_cap")

    def __init__(self, traps: Traps, constants: Mapping[int, int]) -> None:
        self._traps = traps
        self._constants = constants
        self.mcg_cap = 0

    def read(self, msr: int) -> int | None:
        """The value, or None for #GP."""
        traps = self._traps
        if msr == EFER:
            return x86.EFER_SCE | x86.EFER_LME | x86.EFER_LMA | x86.EFER_NX
        if msr == FS_BASE:
            return int(traps.regs.fs_base)
        if msr == GS_BASE:
            return int(traps.regs.gs_base)
        if msr == KERNEL_GS_BASE:
            return int(traps.state.gs_base_other)
        if msr == TSC:
            return int(traps.engine.read_tsc())
        if msr == MCG_CAP:
            return self.mcg_cap
        if msr == TSC_AUX or self._of_a_bank(msr):
            return 0
        return self._constants.get(msr)

    def write(self, msr: int, value: int) -> bool:
        """False for #GP."""
        traps = self._traps
        if msr in (FS_BASE, GS_BASE, KERNEL_GS_BASE):
            if not x86.is_canonical(value):
                return False
            if msr == FS_BASE:
                traps.regs.fs_base = value
            elif msr == GS_BASE:
                traps.regs.gs_base = value
            else:
                traps.state.gs_base_other = value
            return True
        if msr == EFER:
            return value & ~0xD01 == 0
        return msr in _IGNORED or msr in (MCG_STATUS, MCG_CTL) or self._of_a_bank(msr)

    def _of_a_bank(self, msr: int) -> bool:
        banks = self.mcg_cap & _BANK_COUNT
        return 0 <= msr - MC0_CTL < 4 * banks or 0 <= msr - MC0_CTL2 < banks
