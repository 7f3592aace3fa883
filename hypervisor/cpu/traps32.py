"""Traps of 32-bit guests: 4-byte frames, callbacks with code selectors, a kernel in ring 1.

After Xen's x86_64/compat/entry.S (compat_create_bounce_frame) and pv/iret.c (compat_iret). The mode follows from
CS: ring 1 is the guest's kernel, and it may go to ring 3 by an `iret` of its own, without a hypercall. So
`VcpuState.kernel_mode` is brought up to date at each exit (`Traps32.sync`).
"""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Callable

from hypervisor import abi
from hypervisor.cpu.state import Vcpu
from hypervisor.cpu.traps import OPEN_GATES, TI_IF, WITH_ERROR_CODE, Traps
from hypervisor.engines import x86
from hypervisor.engines.base import TrapHandler
from hypervisor.errors import GuestFault, XenError
from hypervisor.memory.xenarea import XenArea
from hypervisor.memory.xenarea32 import KERNEL_CODE, KERNEL_DATA

KERNEL_CS, KERNEL_SS = abi.COMPAT_FLAT_KERNEL_CS, abi.COMPAT_FLAT_KERNEL_SS
HYPERCALL_VECTOR = 0x82
_MASK = abi.VCPU_INFO_EVTCHN_UPCALL_MASK
_PENDING = abi.VCPU_INFO_EVTCHN_UPCALL_PENDING
_CR2 = abi.COMPAT_VCPU_INFO_ARCH
_CLEARED = x86.FLAG_TF | x86.FLAG_NT | x86.FLAG_RF | x86.FLAG_VM
_WRITABLE, _READABLE_CODE, _CONFORMING = 1 << 41, 1 << 41, 1 << 42
_OUTER_RING = 2
"""This bit of CS is set in rings 2 and 3: a trap there switches to the kernel stack."""
_VM86_FRAME = 40


class ModeHandler:
    """Brings the mode up to date before each trap is handled.

    :param handler: the machine.
    """

    __slots__ = ("_handler", "_traps")

    def __init__(self, traps: Traps32, handler: TrapHandler) -> None:
        self._traps = traps
        self._handler = handler

    def syscall(self) -> None:
        self._traps.sync()
        self._handler.syscall()

    def exception(self, vector: int, error_code: int, software: bool) -> None:
        self._traps.sync()
        self._handler.exception(vector, error_code, software)

    def invalid_opcode(self) -> None:
        self._traps.sync()
        self._handler.invalid_opcode()

    def cpuid(self) -> None:
        self._handler.cpuid()

    def spinning(self) -> None:
        self._handler.spinning()


class Traps32(Traps):
    """See `Traps`.

    :ivar hypercall: called for an ``int $0x82`` of the guest kernel.
    """

    hypercall: Callable[[], None]

    def sync(self) -> None:
        """Take the mode from CS."""
        self.state.kernel_mode = 1 if self.regs.cs & 3 == 1 else 0

    # -- into the guest kernel

    def enter(self, cs: int, address: int, error_code: int | None, mask_events: bool) -> None:
        """Build a bounce frame and continue at ``cs:address``.

        :raises GuestFault: no handler, no stack to put the frame on, or selectors that cannot be loaded.
        """
        state, regs, memory = self.state, self.regs, self.memory
        gpr = regs.gpr
        old_cs = regs.cs
        mask_at = state.vcpu_info + _MASK
        masked = memory.bytes[mask_at]
        if not cs & ~3:
            raise GuestFault(f"no handler to call at eip {regs.rip:#x} ({self._where()})")
        flags = regs.rflags & ~(x86.FLAG_IF | x86.FLAG_IOPL)
        if not masked:
            flags |= x86.FLAG_IF
        if self.architectural_iopl:
            flags |= state.iopl << 12
        words = [] if error_code is None else [error_code & x86.MASK32]
        words += [regs.rip & x86.MASK32, old_cs | masked << 16, flags]
        if old_cs & _OUTER_RING:
            words += [gpr[x86.RSP] & x86.MASK32, regs.ss]
            ss, stack = int(state.kernel_ss), int(state.kernel_sp)
            base = self._stack_base(ss)
        else:
            ss, stack = regs.ss, gpr[x86.RSP]
            base = 0 if ss == KERNEL_SS else regs.segment_base(x86.SS)
        frame = struct.pack(f"<{len(words)}I", *words)
        stack = (stack - len(frame)) & x86.MASK32
        self._push((base + stack) & x86.MASK32, frame)
        if mask_events:
            memory.bytes[mask_at] = 1
        gpr[x86.RSP] = stack
        regs.rip = address
        regs.clear_flags(_CLEARED)
        if self._load(cs, ss) is not None:
            raise GuestFault(f"handler at {cs:#x}:{address:#x} with stack segment {ss:#x} cannot be entered")

    def _stack_base(self, selector: int) -> int:
        """Base of the segment that holds the kernel stack, as Xen loads it to write the frame."""
        if selector == KERNEL_SS:
            return 0
        descriptor = self.area.descriptor(self.vcpu.id, selector, self.vcpu.ldt_entries) if selector & ~3 else 0
        readable = not descriptor & x86.DESC_CODE or descriptor & _READABLE_CODE
        if not descriptor & x86.DESC_P or not descriptor & x86.DESC_S or not readable:
            raise GuestFault(f"kernel stack segment {selector:#x} cannot be loaded ({self._where()})")
        return x86.desc_base(descriptor)

    def bounce(self, address: int, error_code: int | None, mask_events: bool) -> None:
        self.enter(KERNEL_CS, address, error_code, mask_events)

    def inject(self, vector: int, error_code: int = 0, cr2: int | None = None) -> None:
        state = self.state
        if vector == x86.PF:
            if cr2 is None:
                cr2 = self.regs.cr2
            self.memory.dwords[(state.vcpu_info + _CR2) >> 2] = cr2 & x86.MASK32
            error_code &= ~x86.PF_USER
            if self.regs.cs & 3 != 1:
                error_code |= x86.PF_USER
        cs = state.trap_cs[vector]
        if not cs & ~3:
            detail = f" address {cr2:#x}" if cr2 is not None else ""
            what = f"unhandled exception {vector} error {error_code:#x}{detail}"
            raise GuestFault(f"{what} at eip {self.regs.rip:#x} ({self._where()})")
        masks = bool(state.trap_flags[vector] & TI_IF)
        code = error_code if vector in WITH_ERROR_CODE else None
        self.enter(cs, state.trap_address[vector], code, masks)

    def software_interrupt(self, vector: int, length: int) -> None:
        state, regs = self.state, self.regs
        kernel = regs.cs & 3 == 1
        if vector == HYPERCALL_VECTOR and kernel:
            self.hypercall()
            return
        allowed = vector in OPEN_GATES or state.trap_flags[vector] & 3 >= (1 if kernel else 3)
        if allowed and state.trap_cs[vector] & ~3:
            self.enter(state.trap_cs[vector], state.trap_address[vector], None, bool(state.trap_flags[vector] & TI_IF))
        elif vector in (x86.BP, x86.OF):
            self.inject(vector)
        else:
            regs.rip = (regs.rip - length) & x86.MASK32
            self.inject(x86.GP, vector << 3 | 2)

    def user_syscall(self) -> None:
        """`syscall` from compatibility mode: there is none on the model of processor that guests are shown."""
        self.regs.rip = (self.regs.rip - 2) & x86.MASK32
        self.inject(x86.UD)

    def deliver_event(self) -> bool:
        state, data = self.state, self.memory.bytes
        info = state.vcpu_info
        if not data[info + _PENDING] or data[info + _MASK] or not state.event_callback:
            return False
        self.vcpu.blocked = False
        self.vcpu.poll = None
        self.enter(state.event_cs, state.event_callback, None, True)
        return True

    # -- back

    def iret(self) -> None:
        """HYPERVISOR_iret: pop EAX, EIP, CS, EFLAGS and, towards an outer ring, ESP and SS."""
        state, regs = self.state, self.regs
        gpr = regs.gpr
        stack = gpr[x86.RSP] & x86.MASK32
        eax, eip, cs, flags = self._pop(stack, 4)
        if self.architectural_iopl:
            state.iopl = (flags >> 12) & 3
        cs &= 0xFFFF
        ss = regs.ss
        gpr[x86.RAX] = eax
        self.memory.bytes[state.vcpu_info + _MASK] = 0 if flags & x86.FLAG_IF else 1
        regs.rflags = (flags & ~(x86.FLAG_IOPL | x86.FLAG_VM)) | x86.FLAG_IF | 2
        if flags & x86.FLAG_VM:
            self._refuse_vm86(stack)
            return
        if cs & 3 == 0:
            raise GuestFault(f"iret to ring 0 ({cs:#x}:{eip:#x})")
        if cs & 3 == 1:
            gpr[x86.RSP] = (stack + 16) & x86.MASK32
        else:
            gpr[x86.RSP], ss = self._pop(stack + 16, 2)
            ss &= 0xFFFF
        regs.rip = eip
        fault = self._load(cs, ss)
        if fault is not None:
            # As the processor's own iretq would: the fault has the context that was to be entered.
            regs.cs, regs.ss = cs, ss
            self.inject(fault[0], fault[1] & 0xFFFC)

    def _pop(self, at: int, count: int) -> tuple[int, ...]:
        try:
            return struct.unpack(f"<{count}I", self.guest.read(at, 4 * count))
        except XenError as exc:
            raise GuestFault(f"iret with an unreadable stack at {at:#x}") from exc

    def _refuse_vm86(self, stack: int) -> None:
        """There is no virtual 8086 mode: a #GP as of its first instruction, on the frame that is there already."""
        state, regs = self.state, self.regs
        target = (state.kernel_sp - _VM86_FRAME) & x86.MASK32
        try:
            frame = bytearray(self.guest.read(stack, _VM86_FRAME))
            frame[:4] = bytes(4)  # the error code, where EAX was
            self.guest.write(target, bytes(frame))
        except XenError as exc:
            raise GuestFault(f"iret to VM86 mode without a stack at {target:#x}") from exc
        regs.gpr[x86.RSP] = target
        regs.rip = state.trap_address[x86.GP]
        regs.clear_flags(_CLEARED)
        if state.trap_flags[x86.GP] & TI_IF:
            self.memory.bytes[state.vcpu_info + _MASK] = 1
        if self._load(state.trap_cs[x86.GP], state.kernel_ss) is not None:
            raise GuestFault("iret to VM86 mode without a #GP handler")

    # -- segments

    def _load(self, cs: int, ss: int) -> tuple[int, int] | None:
        """Load CS and SS as an `iretq` from ring 0 does; else (vector, selector) of the fault it would raise."""
        found = check_selectors(self.area, self.vcpu, cs, ss)
        if found.fault is None:
            self.engine.load_segment(x86.CS, cs, found.code)
            self.engine.load_segment(x86.SS, ss, found.stack)
            self.state.kernel_mode = 1 if cs & 3 == 1 else 0
        return found.fault


@dataclasses.dataclass(frozen=True, slots=True)
class Selectors:
    """Descriptors of a code and a stack selector; :ivar fault: (vector, selector) when they cannot be loaded."""

    code: int
    stack: int
    fault: tuple[int, int] | None = None


_FLAT_KERNEL = Selectors(KERNEL_CODE, KERNEL_DATA)


def check_selectors(area: XenArea, vcpu: Vcpu, cs: int, ss: int) -> Selectors:
    """What a return to ``cs`` with ``ss`` finds (AMD64 APM vol. 3, IRETQ)."""
    if cs == KERNEL_CS and ss == KERNEL_SS:
        return _FLAT_KERNEL
    ring = cs & 3
    code = area.descriptor(vcpu.id, cs, vcpu.ldt_entries) if cs & ~3 else 0
    dpl = x86.desc_dpl(code)
    level = dpl <= ring if code & _CONFORMING else dpl == ring
    if not code & x86.DESC_S or not code & x86.DESC_CODE or not level:
        return Selectors(0, 0, (x86.GP, cs))
    if not code & x86.DESC_P:
        return Selectors(0, 0, (x86.NP, cs))
    stack = area.descriptor(vcpu.id, ss, vcpu.ldt_entries) if ss & ~3 else 0
    writable = stack & x86.DESC_S and not stack & x86.DESC_CODE and stack & _WRITABLE
    if not writable or ss & 3 != ring or x86.desc_dpl(stack) != ring:
        return Selectors(0, 0, (x86.GP, ss))
    if not stack & x86.DESC_P:
        return Selectors(0, 0, (x86.SSF, ss))
    return Selectors(code, stack)
