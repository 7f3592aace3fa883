"""What a core dump says of a machine besides its memory: where things lie, and each vCPU's context.

The contexts are those that XEN_DOMCTL_getvcpucontext gives (arch_get_info_guest in
xen/arch/x86/domctl.c).
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from typing import Any, TypeVar

from hypervisor import abi
from hypervisor.abi import structs
from hypervisor.cpu.state import Vcpu
from hypervisor.domain import Domain
from hypervisor.domain32 import Domain32
from hypervisor.engines import x86
from hypervisor.errors import HostFailure
from hypervisor.machine import Machine
from hypervisor.memory.xenarea32 import XenArea32

TIMEOUT_S = 5.0
SETTLE_S = 60.0
"""For a guest that began from a template: its memory is copied then."""

_T = TypeVar("_T")

_CR0 = 0x8005_0033
"""PE, MP, ET, NE, WP, AM and PG: what a PV guest's kernel finds itself under."""

_REGISTERS = ("ax", "cx", "dx", "bx", "sp", "bp", "si", "di")
_HIGH_REGISTERS = ("r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15")
_SEGMENTS = ("cs", "ss", "ds", "es", "fs", "gs")


class CoreState:
    """:param machine: paused, or ended. `ended` is to be called once its run loop has returned."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._over = threading.Event()

    def ended(self) -> None:
        self._over.set()

    def describe(self) -> dict[str, Any]:
        """After this all of its memory is in its descriptor. :raises HostFailure: it cannot be brought there.

        ``bits``, ``vcpus``, ``base_mfn``, ``pages`` (of guest memory), and byte offsets in the domain's memory:
        ``shared_info``, ``m2p`` (entry of the first own frame).
        """
        domain = self._machine.domain
        self._look(domain.memory.settle, SETTLE_S)
        memory, area = domain.memory, domain.area
        return {
            "bits": self._machine.config.bits,
            "vcpus": len(domain.vcpus),
            "base_mfn": memory.base_mfn,
            "pages": memory.max_pages,
            "shared_info": area.shared_info * 4096,
            "m2p": area.m2p_offset(memory.base_mfn),
        }

    def context(self, number: int) -> bytes:
        """``struct vcpu_guest_context`` of the guest's word size; any thread.

        :raises HostFailure: no such vCPU, or the run loop does not answer.
        """
        machine = self._machine
        if not 0 <= number < len(machine.domain.vcpus):
            raise HostFailure(f"there is no vCPU {number}")
        vcpu = machine.domain.vcpus[number]
        return self._look(lambda: bytes(vcpu_context(machine.domain, vcpu)), TIMEOUT_S)

    def _look(self, function: Callable[[], _T], seconds: float) -> _T:
        """In the run loop's thread, as long as there is one. :raises HostFailure: it does not answer, or fails."""
        if self._over.is_set():
            return function()
        found: list[_T] = []
        done = threading.Event()

        def look() -> None:
            try:
                found.append(function())
            finally:
                done.set()

        self._machine.post(look)
        if not done.wait(seconds) or not found:
            raise HostFailure("the machine does not tell what it holds: see domain.log")
        return found[0]


def vcpu_context(domain: Domain, vcpu: Vcpu) -> Any:
    """``struct vcpu_guest_context`` of the guest's word size, with machine frame numbers. In the run loop's thread."""
    engine = domain.engine
    narrow = isinstance(domain, Domain32)
    context: Any = structs.VcpuGuestContextCompat() if narrow else structs.VcpuGuestContext()
    if not vcpu.initialised:
        return context
    running = None
    if vcpu is not domain.running:
        running = engine.save_cpu()
        engine.restore_cpu(vcpu.cpu)
    try:
        _fill_registers(context, engine.regs, vcpu, narrow=narrow)
        ctypes.memmove(ctypes.addressof(context.fpu_ctxt), engine.save_fpu(), ctypes.sizeof(context.fpu_ctxt))
    finally:
        if running is not None:
            engine.restore_cpu(running)
    _fill_rest(context, vcpu, narrow=narrow)
    for slot, index in enumerate(vcpu.gdt_frames[: len(context.gdt_frames)]):
        context.gdt_frames[slot] = domain.memory.mfn(index)
    if narrow:
        area = domain.area
        assert isinstance(area, XenArea32)
        root = area.guest_root(vcpu.id)
        context.ctrlreg[3] = (root << 12 | root >> 20) & 0xFFFF_FFFF  # xen_pfn_to_cr3 of 32-bit guests
    else:
        context.ctrlreg[3], context.ctrlreg[1] = vcpu.state.kernel_cr3, vcpu.state.user_cr3
    return context


def _fill_registers(context: Any, regs: Any, vcpu: Vcpu, *, narrow: bool) -> None:
    user_regs, prefix = context.user_regs, "e" if narrow else "r"
    for number, name in enumerate(_REGISTERS):
        setattr(user_regs, prefix + name, regs.gpr[number] & (0xFFFF_FFFF if narrow else x86.MASK64))
    setattr(user_regs, prefix + "ip", regs.rip)
    flags = regs.rflags & ~x86.FLAG_IOPL | vcpu.state.iopl << 12 | x86.FLAG_IF
    setattr(user_regs, prefix + "flags", flags)
    for name in _SEGMENTS:
        setattr(user_regs, name, getattr(regs, name))
    context.ctrlreg[0] = _CR0 | (x86.CR0_TS if regs.task_switched else 0)
    context.ctrlreg[2] = regs.cr2
    if narrow:
        return
    for number, name in enumerate(_HIGH_REGISTERS, 8):
        setattr(user_regs, name, regs.gpr[number])
    context.fs_base = regs.fs_base
    bases = (regs.gs_base, vcpu.state.gs_base_other)
    context.gs_base_kernel, context.gs_base_user = bases if vcpu.state.kernel_mode else reversed(bases)


def _fill_rest(context: Any, vcpu: Vcpu, *, narrow: bool) -> None:
    state = vcpu.state
    context.flags = abi.VGCF_i387_valid | (
        (abi.VGCF_in_kernel if state.kernel_mode else 0)
        | (abi.VGCF_online if vcpu.up else 0)
        | (abi.VGCF_failsafe_disables_events if state.failsafe_masks else 0)
        | (abi.VGCF_syscall_disables_events if state.syscall_masks else 0)
    )
    for vector, trap in enumerate(context.trap_ctxt):
        trap.vector, trap.flags = vector, state.trap_flags[vector]
        trap.cs, trap.address = state.trap_cs[vector], state.trap_address[vector]
    context.ldt_base, context.ldt_ents = vcpu.ldt_base, vcpu.ldt_entries
    context.gdt_ents = vcpu.gdt_entries
    context.kernel_ss, context.kernel_sp = state.kernel_ss, state.kernel_sp
    for number, value in enumerate(vcpu.debug_registers):
        context.debugreg[number] = value
    context.event_callback_eip, context.failsafe_callback_eip = state.event_callback, state.failsafe_callback
    if narrow:
        context.event_callback_cs, context.failsafe_callback_cs = state.event_cs, state.failsafe_cs
    else:
        context.syscall_callback_eip = state.syscall_callback
