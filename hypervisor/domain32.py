"""A 32-bit (PAE) domain: `Domain` with the parts that differ for a guest of that word size."""

from __future__ import annotations

import contextlib
import mmap
import struct
from collections.abc import Callable
from typing import Any, cast

from hypervisor import abi
from hypervisor.abi import errno
from hypervisor.cpu.compat import Clock32, PageTableWrites32, PrivilegedOps32
from hypervisor.cpu.state import Vcpu
from hypervisor.cpu.traps32 import KERNEL_CS, KERNEL_SS, Traps32
from hypervisor.domain import RUNSTATE_UPDATE, Domain, MachineConfig
from hypervisor.engines import x86
from hypervisor.errors import HypervisorBug, Unsupported, XenError
from hypervisor.evtchn.core import Router
from hypervisor.evtchn.twolevel32 import TwoLevel32
from hypervisor.memory.frames import L3
from hypervisor.memory.guest32 import GuestAccess32
from hypervisor.memory.pagetables32 import PaeTables
from hypervisor.memory.xenarea32 import KERNEL_CODE, KERNEL_DATA, XenArea32
from hypervisor.toolstack.builder.state import BootState

_RUNSTATE = struct.Struct("<i5Q")
_SELECTOR, _CR2 = abi.COMPAT_VCPU_INFO_EVTCHN_PENDING_SEL, abi.COMPAT_VCPU_INFO_ARCH


class Domain32(Domain):
    """See `Domain`. `VcpuState.kernel_cr3` is the vCPU's L4 table of Xen's own and never changes.

    :raises Unsupported: the engine cannot run 32-bit code.
    """

    AREA, TABLES, GUEST, CLOCK, EVENTS = XenArea32, PaeTables, GuestAccess32, Clock32, TwoLevel32
    TRAPS, TABLE_WRITES, PRIVILEGED = Traps32, PageTableWrites32, PrivilegedOps32

    def __init__(
        self,
        config: MachineConfig,
        mapping: mmap.mmap,
        engine: Any,
        router: Router,
        wake: Callable[[int, int], None],
    ) -> None:
        if not engine.runs_32_bit:
            raise Unsupported(
                "32-bit guests need the engine's direct path, whose self-check failed (see `reeve doctor`):"
                " use a 64-bit kernel"
            )
        super().__init__(config, mapping, engine, router, wake)
        self._area = cast(XenArea32, self.area)
        for vcpu in self.vcpus:
            vcpu.state.kernel_cr3 = self._area.root(vcpu.id)
        privileged = cast(PrivilegedOps32, self.privileged)
        privileged.guest_root = lambda: self._area.guest_root(self.running.id)

    # -- page-table roots

    def new_baseptr(self, mfn: int) -> None:
        vcpu = self.running
        old = self._area.guest_root(vcpu.id)
        if old != mfn:
            self.tables.get_type(self.tables.owned_index(mfn), L3)
            self._area.set_guest_root(vcpu.id, mfn)
        self.engine.load_cr3(self._area.root(vcpu.id))
        if old and old != mfn:
            self.tables.put_type(self.memory.index(old))

    def new_user_baseptr(self, mfn: int) -> None:
        raise XenError(errno.EINVAL, "a 32-bit guest has one page-table root")

    def root_uses(self, vcpu: Vcpu) -> list[tuple[int, int]]:
        root = self._area.guest_root(vcpu.id)
        return [(self.memory.index(root), L3)] if root else []

    # -- what the guest reads of its vCPUs

    def register_vcpu_info(self, vcpu: Vcpu, mfn: int, offset: int) -> None:
        old = vcpu.state.vcpu_info
        cr2 = bytes(self.memory.bytes[old + _CR2 : old + _CR2 + 8])
        super().register_vcpu_info(vcpu, mfn, offset)
        new = vcpu.state.vcpu_info
        # The 64-bit selector word lies where this guest has other things.
        self.memory.bytes[new + _CR2 : new + _CR2 + 8] = cr2
        self.memory.dwords[(new + _SELECTOR) >> 2] = x86.MASK32

    def publish_runstate(self, vcpu: Vcpu) -> None:
        if not vcpu.runstate_area:
            return
        view = self.kernel_view(vcpu)
        entry, marked = vcpu.runstate_since, self.vm_assist & 1 << abi.VMASST_TYPE_runstate_update_flag
        with contextlib.suppress(XenError):
            if marked:
                view.write_u64(vcpu.runstate_area + 4, entry | RUNSTATE_UPDATE)
            view.write(vcpu.runstate_area, _RUNSTATE.pack(vcpu.runstate, entry, *vcpu.runstate_times))

    # -- start of day

    def load_first_vcpu(self, boot: BootState) -> None:
        """Registers and page tables of vCPU 0. :raises XenError: the initial tables do not validate."""
        if boot.bits != 32:
            raise HypervisorBug("a 64-bit guest's start of day for a 32-bit domain")
        engine, vcpu = self.engine, self.vcpus[0]
        regs, state = engine.regs, vcpu.state
        self.tables.pin(boot.l4_mfn, L3)
        self.tables.get_type(self.tables.owned_index(boot.l4_mfn), L3)
        self._area.set_guest_root(0, boot.l4_mfn)
        if boot.extended_cr3:
            self.vm_assist |= 1 << abi.VMASST_TYPE_pae_extended_cr3
        engine.reset_pv64(state.kernel_cr3, self.area.gdt_va(0), 0xFFFF)
        engine.load_segment(x86.CS, KERNEL_CS, KERNEL_CODE)
        for index in (x86.SS, x86.DS, x86.ES, x86.FS, x86.GS):
            engine.load_segment(index, KERNEL_SS, KERNEL_DATA)
        state.kernel_ss, state.kernel_sp = KERNEL_SS, boot.rsp
        for number in range(16):
            regs.gpr[number] = 0
        regs.gpr[x86.RSP], regs.gpr[x86.RSI], regs.rip = boot.rsp, boot.rsi, boot.entry
        regs.rflags = x86.FLAG_IF | 2
