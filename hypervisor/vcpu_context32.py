"""Bringing up a vCPU of a 32-bit guest from its `struct vcpu_guest_context` (arch_set_info_guest).

See `hypervisor.vcpu_context`.
"""

from __future__ import annotations

import ctypes
from typing import cast

from hypervisor import abi
from hypervisor.abi import errno, structs
from hypervisor.cpu.compat import mfn_of
from hypervisor.cpu.emulate import set_debug_register
from hypervisor.cpu.state import Vcpu
from hypervisor.cpu.traps32 import KERNEL_CS, KERNEL_SS, check_selectors
from hypervisor.domain import Domain
from hypervisor.engines import x86
from hypervisor.errors import XenError
from hypervisor.memory.frames import L3
from hypervisor.memory.segdesc32 import fix_selector
from hypervisor.memory.xenarea32 import XenArea32
from hypervisor.types import PAGE_SIZE

MAX_GDT_FRAMES = 14
_REGISTERS = ("eax", "ecx", "edx", "ebx", "esp", "ebp", "esi", "edi")
_DATA_SEGMENTS = ((x86.DS, "ds"), (x86.ES, "es"), (x86.FS, "fs"), (x86.GS, "gs"))


def read_context(domain: Domain, address: int) -> structs.VcpuGuestContextCompat:
    """Copy a context in. :raises XenError: EFAULT."""
    size = ctypes.sizeof(structs.VcpuGuestContextCompat)
    return structs.VcpuGuestContextCompat.from_buffer_copy(domain.guest.read(address, size))


def initialise(domain: Domain, vcpu: Vcpu, context: structs.VcpuGuestContextCompat) -> None:
    """VCPUOP_initialise: the vCPU stays down until VCPUOP_up. :raises XenError: nothing changed."""
    if vcpu.initialised:
        raise XenError(errno.EEXIST, f"vCPU {vcpu.id} has a context")
    if context.ldt_base & (PAGE_SIZE - 1) or context.ldt_ents > 8192:
        raise XenError(errno.EINVAL, "bad LDT in the context")
    if context.gdt_ents > MAX_GDT_FRAMES * 512:
        raise XenError(errno.EINVAL, f"GDT with {context.gdt_ents} entries")
    frames = [int(context.gdt_frames[number]) for number in range((context.gdt_ents + 511) // 512)]
    root = domain.tables.owned_index(mfn_of(context.ctrlreg[3]))
    domain.tables.get_type(root, L3)
    try:
        domain.set_gdt(vcpu, frames, int(context.gdt_ents))
    except XenError:
        domain.tables.put_type(root)
        raise
    _fill_state(vcpu, context)
    cast(XenArea32, domain.area).set_guest_root(vcpu.id, domain.memory.mfn(root))
    vcpu.cpu = registers(domain, vcpu, context)
    vcpu.initialised = True


def _fill_state(vcpu: Vcpu, context: structs.VcpuGuestContextCompat) -> None:
    state = vcpu.state
    state.kernel_mode = 1 if fix_selector(context.user_regs.cs) & 3 == 1 else 0
    state.kernel_ss, state.kernel_sp = fix_selector(context.kernel_ss & 0xFFFF), context.kernel_sp
    state.event_cs, state.event_callback = fix_selector(context.event_callback_cs & 0xFFFF), context.event_callback_eip
    state.failsafe_cs = fix_selector(context.failsafe_callback_cs & 0xFFFF)
    state.failsafe_callback = context.failsafe_callback_eip
    state.iopl = (context.user_regs.eflags >> 12) & 3
    for vector, trap in enumerate(context.trap_ctxt):
        state.trap_address[vector] = trap.address
        state.trap_flags[vector] = trap.flags
        state.trap_cs[vector] = fix_selector(trap.cs)
    for number in (0, 1, 2, 3, 6, 7):
        set_debug_register(vcpu.debug_registers, number, context.debugreg[number])


def registers(domain: Domain, vcpu: Vcpu, context: structs.VcpuGuestContextCompat) -> bytes:
    """The engine's form of the registers, made by loading them for a moment. The state must have been filled before."""
    engine, user_regs = domain.engine, context.user_regs
    running = engine.save_cpu()
    try:
        regs = engine.regs
        engine.load_cr3(vcpu.state.kernel_cr3)
        engine.set_gdt(domain.area.gdt_va(vcpu.id), 0xFFFF)
        domain.load_ldt(vcpu)
        for number in range(16):
            regs.gpr[number] = getattr(user_regs, _REGISTERS[number]) if number < len(_REGISTERS) else 0
        regs.rip = user_regs.eip
        regs.rflags = (user_regs.eflags & ~(x86.FLAG_IOPL | x86.FLAG_VM)) | x86.FLAG_IF
        _load_segments(domain, vcpu, user_regs)
        regs.task_switched = bool(context.ctrlreg[0] & x86.CR0_TS)
        if context.flags & abi.VGCF_i387_valid:
            engine.load_fpu(bytes(context.fpu_ctxt))
        return bytes(engine.save_cpu())
    finally:
        engine.restore_cpu(running)


def _load_segments(domain: Domain, vcpu: Vcpu, user_regs: structs.CpuUserRegsCompat) -> None:
    """Selectors of code and stack that cannot be used become the flat ones of ring 1: the vCPU starts there."""
    engine, area = domain.engine, domain.area
    cs, ss = fix_selector(user_regs.cs), fix_selector(user_regs.ss)
    found = check_selectors(area, vcpu, cs, ss)
    if found.fault is not None:
        cs, ss, found = KERNEL_CS, KERNEL_SS, check_selectors(area, vcpu, KERNEL_CS, KERNEL_SS)
    engine.load_segment(x86.CS, cs, found.code)
    engine.load_segment(x86.SS, ss, found.stack)
    for index, name in _DATA_SEGMENTS:
        selector = getattr(user_regs, name)
        descriptor = area.descriptor(vcpu.id, selector, vcpu.ldt_entries) if selector & ~3 else 0
        if not descriptor & x86.DESC_P or not descriptor & x86.DESC_S:
            selector = descriptor = 0
        engine.load_segment(index, selector, descriptor)
