"""From an exit to the guest's handler and back: bounce frames, mode switches, iret.

After Xen's x86_64/entry.S (create_bounce_frame), pv/traps.c and pv/iret.c. A
64-bit PV kernel and its user programs both run in ring 3; what tells them
apart is `VcpuState.kernel_mode`, the page-table root and the GS base.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any

from hypervisor import abi
from hypervisor.cpu.state import Vcpu
from hypervisor.engines import x86
from hypervisor.errors import GuestFault, XenError
from hypervisor.memory.guest import GuestAccess
from hypervisor.memory.physical import DomainMemory
from hypervisor.memory.xenarea import XenArea

if TYPE_CHECKING:
    from hypervisor.native import FastPath

KERNEL_CS, KERNEL_SS = abi.FLAT_RING3_CS64, abi.FLAT_RING3_SS64
_MASK = abi.VCPU_INFO_EVTCHN_UPCALL_MASK
_PENDING = abi.VCPU_INFO_EVTCHN_UPCALL_PENDING
_CR2 = abi.VCPU_INFO_ARCH + abi.ARCH_VCPU_INFO_CR2
_IRET = struct.Struct("<9Q")
_FRAME7, _FRAME8 = struct.Struct("<7Q"), struct.Struct("<8Q")
_WRITABLE = 1 << 41  # of a data descriptor
_CLEARED = x86.FLAG_TF | x86.FLAG_NT | x86.FLAG_RF | x86.FLAG_VM | x86.FLAG_AC
WITH_ERROR_CODE = frozenset((x86.DF, x86.TS, x86.NP, x86.SSF, x86.GP, x86.PF, x86.AC))

OPEN_GATES = frozenset((x86.BP, x86.OF, 0x80))
_SYSCALL_LENGTH = 2

# Flat ring-3 descriptors, as 64-bit guests have them for their programs.
_FLAT_CODE64, _FLAT_DATA = 0x00AF_FB00_0000_FFFF, 0x00CF_F300_0000_FFFF

TI_IF = 4  # trap_info.flags: mask event delivery while handling (TI_SET_IF)


class Traps:
    """Delivery of exceptions, events and callbacks to one domain's vCPUs.

    :ivar vcpu: the vCPU whose registers the engine holds.
    :ivar architectural_iopl: VMASST_TYPE_architectural_iopl is on.
    :ivar native: does plain traps without this class, if there is one.
    """

    def __init__(self, engine: Any, memory: DomainMemory, guest: GuestAccess, area: XenArea) -> None:
        self.engine = engine
        self.regs = engine.regs
        self.memory = memory
        self.guest = guest
        self.area = area
        self.vcpu: Vcpu = Vcpu(0)
        self.state = self.vcpu.state
        self.native: FastPath | None = None
        self._architectural_iopl = False

    def set_vcpu(self, vcpu: Vcpu) -> None:
        self.vcpu = vcpu
        self.state = vcpu.state
        if self.native is not None:
            self.native.use(vcpu.id, vcpu.state, plain=not self._architectural_iopl)

    @property
    def architectural_iopl(self) -> bool:
        return self._architectural_iopl

    @architectural_iopl.setter
    def architectural_iopl(self, on: bool) -> None:
        self._architectural_iopl = on
        self.set_vcpu(self.vcpu)

    # -- modes

    def to_kernel(self) -> None:
        state, regs = self.state, self.regs
        state.kernel_mode = 1
        user_base = regs.gs_base
        regs.gs_base = state.gs_base_other
        state.gs_base_other = user_base
        self.engine.switch_tables(state.kernel_cr3, True)

    def to_user(self) -> None:
        state, regs = self.state, self.regs
        state.kernel_mode = 0
        kernel_base = regs.gs_base
        regs.gs_base = state.gs_base_other
        state.gs_base_other = kernel_base
        self.engine.switch_tables(state.user_cr3, False)

    # -- into the guest kernel

    def bounce(self, address: int, error_code: int | None, mask_events: bool) -> None:
        """Build a bounce frame and continue at `address` in the guest kernel.

        :raises GuestFault: no handler, or no stack to put the frame on.
        """
        state, regs = self.state, self.regs
        gpr = regs.gpr
        flags = regs.rflags
        memory = self.memory
        mask_at = state.vcpu_info + _MASK
        masked = memory.bytes[mask_at]
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
        self.bounce(address, error_code if vector in WITH_ERROR_CODE else None, masks)

    def software_interrupt(self, vector: int, length: int) -> None:
        """`int n`, `int3`, `into`: allowed when the gate's privilege level permits the mode it came from.

        #BP, #OF and `int 0x80` have gates of their own in Xen, open to all. No error code, whatever the vector.
        """
        state, regs = self.state, self.regs
        address = state.trap_address[vector]
        # A 64-bit guest kernel has level 1 for this purpose, its programs 3 (x86/traps.c, permit_softint).
        allowed = vector in OPEN_GATES or state.trap_flags[vector] & 3 >= (1 if state.kernel_mode else 3)
        if address and allowed:
            self.bounce(address, None, bool(state.trap_flags[vector] & TI_IF))
        elif vector in (x86.BP, x86.OF):
            self.inject(vector)
        else:
            regs.rip = (regs.rip - length) & x86.MASK64
            self.inject(x86.GP, vector << 3 | 2)

    def user_syscall(self) -> None:
        """A `syscall` from a user program. Without a callback it is an invalid instruction (switch_to_kernel)."""
        state, regs = self.state, self.regs
        gpr = regs.gpr
        rip, flags = regs.rip, regs.rflags
        gpr[x86.RCX] = rip
        gpr[x86.R11] = flags
        if regs.long_mode_code:
            regs.cs, regs.ss = abi.FLAT_USER_CS64, abi.FLAT_USER_SS64
            address, masks = state.syscall_callback, state.syscall_masks
        else:
            regs.cs, regs.ss = abi.FLAT_USER_CS32, abi.FLAT_USER_SS32
            address, masks = state.syscall32_callback, state.syscall32_masks
        if address:
            self.bounce(address, None, bool(masks))
        else:
            regs.rip = (rip - _SYSCALL_LENGTH) & x86.MASK64
            self.inject(x86.UD)
        regs.clear_flags(x86.FLAG_DF)

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
        rflags = (rflags & ~(x86.FLAG_IOPL | x86.FLAG_VM)) | x86.FLAG_IF | 2
        gpr[x86.RAX] = rax
        regs.rip = rip
        gpr[x86.RSP] = rsp
        regs.rflags = rflags
        if not flags & abi.VGCF_in_syscall:
            gpr[x86.R11] = r11
            gpr[x86.RCX] = rcx
        elif x86.is_canonical(rip):
            # By `sysret`: R11 and RCX tell where to, and the selectors are Xen's flat ones whatever the frame says.
            gpr[x86.R11] = rflags
            gpr[x86.RCX] = rip
            if cs != abi.FLAT_USER_CS32:
                engine.load_flat64(KERNEL_CS, KERNEL_SS)
                return
        if cs | 3 == KERNEL_CS and ss | 3 == KERNEL_SS and x86.is_canonical(rip):
            engine.load_flat64(KERNEL_CS, KERNEL_SS)
        else:
            self._load_cs_ss(cs | 3, ss | 3)

    def _load_cs_ss(self, cs: int, ss: int) -> None:
        """Load the selectors an iret asks for. What the processor's own `iretq` would refuse faults there."""
        vcpu = self.vcpu
        code = self.area.descriptor(vcpu.id, cs, vcpu.ldt_entries) if cs & ~3 else 0
        if code | x86.DESC_ACCESSED == _FLAT_CODE64 and x86.is_canonical(self.regs.rip):
            stack = self.area.descriptor(vcpu.id, ss, vcpu.ldt_entries) if ss & ~3 else 0
            if stack | x86.DESC_ACCESSED == _FLAT_DATA:  # every return to a 64-bit program
                self.engine.load_flat64(cs, ss)
                return None
        if not code & x86.DESC_S or not code & x86.DESC_CODE or x86.desc_dpl(code) != 3:
            return self._refuse_return(x86.GP, cs, cs, ss)
        if not code & x86.DESC_P:
            return self._refuse_return(x86.NP, cs, cs, ss)
        if not x86.is_canonical(self.regs.rip):
            return self._refuse_return(x86.GP, 0, cs, ss)
        stack = self.area.descriptor(vcpu.id, ss, vcpu.ldt_entries) if ss & ~3 else 0
        writable = stack & x86.DESC_S and not stack & x86.DESC_CODE and stack & _WRITABLE
        if not writable or x86.desc_dpl(stack) != 3:
            return self._refuse_return(x86.GP, ss, cs, ss)
        if not stack & x86.DESC_P:
            return self._refuse_return(x86.SSF, ss, cs, ss)
        self.engine.load_segment(x86.CS, cs, code)
        self.engine.load_segment(x86.SS, ss, stack)
        return None

    def _refuse_return(self, vector: int, selector: int, cs: int, ss: int) -> None:
        """The fault has the context that was to be entered (entry.S: iret_exit_to_guest's exception table entry)."""
        self.regs.cs, self.regs.ss = cs, ss
        self.inject(vector, selector & 0xFFFC)
