"""Bringing up a vCPU from a `struct vcpu_guest_context` (arch_set_info_guest in xen/arch/x86/domain.c).

For a guest that asks for one, and for one that comes from a saved image.
"""

from __future__ import annotations

import ctypes

from hypervisor import abi
from hypervisor.abi import errno, structs
from hypervisor.cpu.emulate import set_debug_register
from hypervisor.cpu.state import Vcpu
from hypervisor.domain import Domain
from hypervisor.engines import x86
from hypervisor.errors import XenError
from hypervisor.memory.frames import L4
from hypervisor.types import PAGE_SIZE

MAX_GDT_FRAMES = 14

_REGISTERS = (
    "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15",
)  # fmt: skip
_CANONICAL = (
    "kernel_sp",
    "fs_base",
    "gs_base_kernel",
    "gs_base_user",
    "event_callback_eip",
    "syscall_callback_eip",
    "failsafe_callback_eip",
)


def initialise(domain: Domain, vcpu: Vcpu, context: structs.VcpuGuestContext) -> None:
    """VCPUOP_initialise: the vCPU stays down until VCPUOP_up. An LDT is the caller's to set before.

    Without VGCF_i387_valid the FPU starts as the calling vCPU's; a guest initialises its own.

    :raises XenError: EINVAL; nothing changed.
    """
    _check(context)
    kernel_root = domain.tables.owned_index(context.ctrlreg[3] >> 12)
    user_mfn = context.ctrlreg[1] >> 12
    entries = int(context.gdt_ents)
    frames = [int(context.gdt_frames[i]) for i in range((entries + 511) // 512)]
    domain.tables.get_type(kernel_root, L4)
    try:
        user_root = domain.tables.owned_index(user_mfn) if user_mfn else 0
        if user_mfn:
            domain.tables.get_type(user_root, L4)
        try:
            domain.set_gdt(vcpu, frames, entries)
        except XenError:
            if user_mfn:
                domain.tables.put_type(user_root)
            raise
    except XenError:
        domain.tables.put_type(kernel_root)
        raise
    _fill_state(vcpu, context)
    vcpu.state.kernel_cr3 = domain.memory.mpa(kernel_root)
    vcpu.state.user_cr3 = user_mfn << 12
    vcpu.cpu = registers(domain, vcpu, context)
    vcpu.initialised = True


def _check(context: structs.VcpuGuestContext) -> None:
    addresses = [getattr(context, name) for name in _CANONICAL]
    addresses += [context.user_regs.rip, context.user_regs.rsp, *(trap.address for trap in context.trap_ctxt)]
    if not all(x86.is_canonical(address) for address in addresses):
        raise XenError(errno.EINVAL, "an address of the context is not canonical")
    if context.ldt_base & (PAGE_SIZE - 1) or context.ldt_ents > 8192:
        raise XenError(errno.EINVAL, "bad LDT in the context")
    if context.gdt_ents > MAX_GDT_FRAMES * 512:
        raise XenError(errno.EINVAL, f"GDT with {context.gdt_ents} entries")
    if not context.flags & abi.VGCF_in_kernel and not context.ctrlreg[1]:
        raise XenError(errno.EINVAL, "a user-mode context without a user page table")


def _fill_state(vcpu: Vcpu, context: structs.VcpuGuestContext) -> None:
    state = vcpu.state
    state.kernel_mode = 1 if context.flags & abi.VGCF_in_kernel else 0
    state.kernel_ss, state.kernel_sp = context.kernel_ss | 3, context.kernel_sp
    state.event_callback = context.event_callback_eip
    state.failsafe_callback = context.failsafe_callback_eip
    state.syscall_callback = context.syscall_callback_eip
    state.failsafe_masks = 1 if context.flags & abi.VGCF_failsafe_disables_events else 0
    state.syscall_masks = 1 if context.flags & abi.VGCF_syscall_disables_events else 0
    state.iopl = (context.user_regs.rflags >> 12) & 3
    for vector, trap in enumerate(context.trap_ctxt):
        state.trap_address[vector] = trap.address
        state.trap_flags[vector] = trap.flags
        state.trap_cs[vector] = trap.cs | 3
    kernel, user = context.gs_base_kernel, context.gs_base_user
    state.gs_base_other = user if state.kernel_mode else kernel
    for number in (0, 1, 2, 3, 6, 7):
        set_debug_register(vcpu.debug_registers, number, context.debugreg[number])


def registers(domain: Domain, vcpu: Vcpu, context: structs.VcpuGuestContext) -> bytes:
    """The engine's form of the registers, made by loading them for a moment. The state must have been filled before."""
    engine, state = domain.engine, vcpu.state
    running = engine.save_cpu()
    try:
        regs, user_regs = engine.regs, context.user_regs
        engine.load_cr3(state.kernel_cr3 if state.kernel_mode else state.user_cr3)
        engine.set_gdt(domain.area.gdt_va(vcpu.id), 0xFFFF)
        domain.load_ldt(vcpu)
        for number, name in enumerate(_REGISTERS):
            regs.gpr[number] = getattr(user_regs, name)
        regs.rip = user_regs.rip
        regs.rflags = (user_regs.rflags & ~(x86.FLAG_IOPL | x86.FLAG_VM)) | x86.FLAG_IF
        _load_code(domain, vcpu, user_regs)
        for index, selector in ((x86.DS, user_regs.ds), (x86.ES, user_regs.es), (x86.FS, user_regs.fs)):
            engine.load_segment(index, selector, domain.area.descriptor(vcpu.id, selector, vcpu.ldt_entries))
        gs = domain.area.descriptor(vcpu.id, user_regs.gs, vcpu.ldt_entries)
        engine.load_segment(x86.GS, user_regs.gs, gs)
        regs.fs_base = context.fs_base
        regs.gs_base = context.gs_base_kernel if state.kernel_mode else context.gs_base_user
        regs.task_switched = bool(context.ctrlreg[0] & x86.CR0_TS)
        if context.flags & abi.VGCF_i387_valid:
            engine.load_fpu(bytes(context.fpu_ctxt))
        return bytes(engine.save_cpu())
    finally:
        engine.restore_cpu(running)


def _load_code(domain: Domain, vcpu: Vcpu, user_regs: structs.CpuUserRegs) -> None:
    """Code and stack of a program that is not a flat 64-bit one are what its selectors name, if they can be loaded."""
    engine, area = domain.engine, domain.area
    cs, ss = user_regs.cs | 3, user_regs.ss | 3
    if not vcpu.state.kernel_mode and (cs, ss) != (abi.FLAT_RING3_CS64, abi.FLAT_RING3_SS64):
        code = area.descriptor(vcpu.id, cs, vcpu.ldt_entries)
        stack = area.descriptor(vcpu.id, ss, vcpu.ldt_entries)
        kinds = x86.DESC_P | x86.DESC_S | x86.DESC_CODE
        usable = code & kinds == kinds and stack & kinds == x86.DESC_P | x86.DESC_S
        if usable and x86.desc_dpl(code) == x86.desc_dpl(stack) == 3:
            engine.load_segment(x86.CS, cs, code)
            engine.load_segment(x86.SS, ss, stack)
            return
    engine.load_flat64(abi.FLAT_RING3_CS64, abi.FLAT_RING3_SS64)


def read_context(domain: Domain, address: int) -> structs.VcpuGuestContext:
    """Copy a context in. :raises XenError: EFAULT."""
    return structs.VcpuGuestContext.from_buffer_copy(
        domain.guest.read(address, ctypes.sizeof(structs.VcpuGuestContext))
    )
