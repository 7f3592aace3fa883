"""From an exit to the guest's handler and back: bounce frames, mode switches, iret.

After Xen's x86_64/entry.S (create_bounce_frame), pv/traps.c and pv/iret.c. A
64-bit PV kernel and its user programs both run in ring 3; what tells them
apart is `VcpuState.kernel_mode`, the page-table root and the GS base.
"""

from __future__ import annotations

import struct
from typing import Any

from hypervisor import abi
from hypervisor.cpu.state import Vcpu
from hypervisor.engines import x86
from hypervisor.errors import GuestFault, XenError
from hypervisor.memory.guest import GuestAccess
from hypervisor.memory.physical import DomainMemory
from hypervisor.memory.xenarea import XenArea

KERNEL_CS, KERNEL_SS = abi.FLAT_RING3_CS64, abi.FLAT_RING3_SS64
_MASK = abi.VCPU_INFO_EVTCHN_UPCALL_MASK
_PENDING = abi.VCPU_INFO_EVTCHN_UPCALL_PENDING
_CR2 = abi.VCPU_INFO_ARCH + abi.ARCH_VCPU_INFO_CR2
_IRET = struct.Struct("<9Q")
_FRAME7, _FRAME8 = struct.Struct("<7Q"), struct.Struct("<8Q")
_CLEARED = x86.FLAG_TF | x86.FLAG_NT | x86.FLAG_RF | x86.FLAG_VM | x86.FLAG_AC
_WITH_ERROR_CODE = frozenset((x86.DF, x86.TS, x86.NP, x86.SSF, x86.GP, x86.PF, x86.AC))

TI_IF = 4  # trap_info.flags: mask event delivery while handling (TI_SET_IF)


class Traps:
    """Delivery of exceptions, events and callbacks to one domain's vCPUs.

    :ivar vcpu: the vCPU whose registers the engine holds.
    :ivar architectural_iopl: VMASST_TYPE_architectural_iopl is on.
    """

    def __init__(self, engine: Any, memory: DomainMemory, guest: GuestAccess, area: XenArea) -> None:
        self.engine = engine
        self.regs = engine.regs
        self.memory = memory
        self.guest = guest
        self.area = area
        self.vcpu: Vcpu = Vcpu(0)
        self.state = self.vcpu.state
        self.architectural_iopl = False

    def set_vcpu(self, vcpu: Vcpu) -> None:
        self.vcpu = vcpu
        self.state = vcpu.state

    # -- modes

    def to_kernel(self) -> None:
        state, regs = self.state, self.regs
        state.kernel_mode = 1
        user_base = regs.gs_base
        regs.gs_base = state.gs_base_other
        state.gs_base_other = user_base
        self.engine.load_cr3(state.kernel_cr3)

    def to_user(self) -> None:
        state, regs = self.state, self.regs
        state.kernel_mode = 0
        kernel_base = regs.gs_base
        regs.gs_base = state.gs_base_other
        state.gs_base_other = kernel_base
        self.engine.load_cr3(state.user_cr3)

    # -- into the guest kernel

    def bounce(self, address: int, error_code: int | None, mask_events: bool, extra: tuple[int, ...] = ()) -> None:
        """Build a bounce frame and continue at `address` in the guest kernel.

        :param extra: words below the frame (the failsafe callback's data segments).
        :raises GuestFault: no handler, or no stack to put the frame on.
        """
        state, regs = self.state, self.regs
        gpr = regs.gpr
        flags = regs.rflags
        memory = self.memory
        mask_at = state.vcpu_info + _MASK
        masked = memory.bytes[mask_at] != 0
        cs, ss, rsp = regs.cs, regs.ss, gpr[x86.RSP]
        if state.kernel_mode:
            stack = rsp
            cs &= ~3
        else:
            self.to_kernel()
            stack = state.kernel_sp
        if address == 0:
            raise GuestFault(f"no handler to call at rip {regs.rip:#x} ({self._where()})")
        flags &= ~(x86.FLAG_IF | x86.FLAG_IOPL)
        if not masked:
            flags |= x86.FLAG_IF
        if self.architectural_iopl:
            flags |= state.iopl << 12
        cs |= masked << 32
        if error_code is None:
            frame = _FRAME7.pack(gpr[x86.RCX], gpr[x86.R11], regs.rip, cs, flags, rsp, ss)
        else:
            frame = _FRAME8.pack(gpr[x86.RCX], gpr[x86.R11], error_code, regs.rip, cs, flags, rsp, ss)
        if extra:
            frame = struct.pack(f"<{len(extra)}Q", *extra) + frame
        stack = ((stack & ~15) - len(frame)) & x86.MASK64
        self._push(stack, frame)
        if mask_events:
            memory.bytes[mask_at] = 1
        gpr[x86.RSP] = stack
        regs.rip = address
        regs.load_flat64(KERNEL_CS, KERNEL_SS)
        regs.clear_flags(_CLEARED)

    def _push(self, stack: int, frame: bytes) -> None:
        if (stack & 0xFFF) + len(frame) <= 4096:
            at = self.guest.translate(stack, write=True)
            if at >= 0:
                # Stacks hold no code: no need to look for translations.
                self.memory.bytes[at : at + len(frame)] = frame
                return
        else:
            try:
                self.guest.write(stack, frame)
                return
            except XenError:
                pass
        raise GuestFault(f"no stack at {stack:#x} for a trap frame at rip {self.regs.rip:#x} ({self._where()})")

    def _where(self) -> str:
        return f"vcpu {self.vcpu.id}, {'kernel' if self.state.kernel_mode else 'user'} mode"

    def inject(self, vector: int, error_code: int = 0, cr2: int | None = None) -> None:
        """Deliver an exception to the guest's handler. :raises GuestFault: it has none."""
        state = self.state
        if vector == x86.PF:
            if cr2 is None:
                cr2 = self.regs.cr2
            self.memory.words[(state.vcpu_info + _CR2) >> 3] = cr2
            error_code &= ~x86.PF_USER
            if not state.kernel_mode:
                error_code |= x86.PF_USER
        address = state.trap_address[vector]
        if not address:
            detail = f" address {cr2:#x}" if cr2 is not None else ""
            what = f"unhandled exception {vector} error {error_code:#x}{detail}"
            raise GuestFault(f"{what} at rip {self.regs.rip:#x} ({self._where()})")
        masks = bool(state.trap_flags[vector] & TI_IF)
        self.bounce(address, error_code if vector in _WITH_ERROR_CODE else None, masks)

    def software_interrupt(self, vector: int, length: int) -> None:
        """`int n`, `int3`, `into`: allowed when the gate's privilege level permits the mode it came from."""
        state, regs = self.state, self.regs
        allowed = state.trap_flags[vector] & 3
        # A 64-bit guest kernel has level 1 for this purpose, its programs 3 (pv/traps.c, pv_inject_sw_interrupt).
        if not state.trap_address[vector] or allowed < (1 if state.kernel_mode else 3):
            regs.rip = (regs.rip - length) & x86.MASK64
            self.inject(x86.GP, vector << 3 | 2)
            return
        self.inject(vector)

    def user_syscall(self) -> None:
        """A `syscall` from a user program."""
        state, regs = self.state, self.regs
        gpr = regs.gpr
        rip, flags = regs.rip, regs.rflags
        gpr[x86.RCX] = rip
        gpr[x86.R11] = flags
        if regs.long_mode_code:
            regs.cs, regs.ss = abi.FLAT_USER_CS64, abi.FLAT_USER_SS64
            self.bounce(state.syscall_callback, None, bool(state.syscall_masks))
        else:
            regs.cs, regs.ss = abi.FLAT_USER_CS32, abi.FLAT_USER_SS32
            self.bounce(state.syscall32_callback, None, bool(state.syscall32_masks))

    def deliver_event(self) -> bool:
        """Call the event callback if an event is pending and not masked; True if it was called."""
        state, data = self.state, self.memory.bytes
        info = state.vcpu_info
        if not data[info + _PENDING] or data[info + _MASK] or not state.event_callback:
            return False
        self.vcpu.blocked = False
        self.vcpu.poll = None
        self.bounce(state.event_callback, None, True)
        return True

    def event_pending(self, vcpu: Vcpu) -> bool:
        data, info = self.memory.bytes, vcpu.state.vcpu_info
        return data[info + _PENDING] != 0 and not data[info + _MASK]

    # -- back

    def iret(self) -> None:
        """HYPERVISOR_iret: pop a `struct iret_context` and continue there."""
        state, regs, engine = self.state, self.regs, self.engine
        gpr = regs.gpr
        stack = gpr[x86.RSP]
        try:
            rax, r11, rcx, flags, rip, cs, rflags, rsp, ss = _IRET.unpack(self.guest.read(stack, _IRET.size))
        except XenError as exc:
            raise GuestFault(f"iret with an unreadable stack at {stack:#x}") from exc
        cs &= 0xFFFF
        ss &= 0xFFFF
        if cs & 3 == 3:
            if not state.user_cr3:
                raise GuestFault("iret to user mode without a user page table")
            self.to_user()
        if self.architectural_iopl:
            state.iopl = (rflags >> 12) & 3
        self.memory.bytes[state.vcpu_info + _MASK] = 0 if rflags & x86.FLAG_IF else 1
        gpr[x86.RAX] = rax
        if not flags & abi.VGCF_in_syscall:
            gpr[x86.R11] = r11
            gpr[x86.RCX] = rcx
        else:
            gpr[x86.R11] = rflags
            gpr[x86.RCX] = rip
        regs.rip = rip
        gpr[x86.RSP] = rsp
        regs.rflags = (rflags & ~(x86.FLAG_IOPL | x86.FLAG_VM)) | x86.FLAG_IF | 2
        if cs | 3 == KERNEL_CS and ss | 3 == KERNEL_SS:
            engine.load_flat64(KERNEL_CS, KERNEL_SS)
        elif not x86.is_canonical(rip) or not self._load_cs_ss(cs | 3, ss | 3 if ss & ~3 else ss):
            self.failsafe(cs, ss)

    def _load_cs_ss(self, cs: int, ss: int) -> bool:
        """Load the selectors an iret asks for; False when the processor would refuse them."""
        code = self.area.descriptor(self.vcpu.id, cs, self.vcpu.ldt_entries)
        if not code & x86.DESC_P or not code & x86.DESC_S or not code & x86.DESC_CODE or x86.desc_dpl(code) != 3:
            return False
        stack = 0
        if ss & ~3:
            stack = self.area.descriptor(self.vcpu.id, ss, self.vcpu.ldt_entries)
            writable_data = stack & x86.DESC_S and not stack & x86.DESC_CODE and stack & 1 << 41
            if not stack & x86.DESC_P or not writable_data or x86.desc_dpl(stack) != 3:
                return False
        elif not code & x86.DESC_L:
            return False
        self.engine.load_segment(x86.CS, cs, code)
        self.engine.load_segment(x86.SS, ss, stack)
        return True

    def failsafe(self, cs: int, ss: int) -> None:
        """The guest asked to return to a context that cannot be loaded: tell its failsafe callback."""
        state, regs = self.state, self.regs
        regs.cs, regs.ss = cs | 3, ss
        if not state.failsafe_callback:
            raise GuestFault(f"iret to unusable selectors {cs:#x}, {ss:#x} and no failsafe callback")
        data = (regs.ds, regs.es, regs.fs, regs.gs)
        self.bounce(state.failsafe_callback, None, bool(state.failsafe_masks), data)
