"""Traps, callbacks, descriptor tables, segment bases, debug registers, FPU switching, iopl, vm_assist."""

from __future__ import annotations

import struct

from hypervisor import abi
from hypervisor.abi import errno
from hypervisor.cpu.emulate import set_debug_register
from hypervisor.domain import Domain
from hypervisor.engines import x86
from hypervisor.errors import XenError
from hypervisor.hypercalls.registry import hypercall

_TRAP = struct.Struct("<BBH4xQ")
_CALLBACK = struct.Struct("<HH4xQ")
_U32 = struct.Struct("<I")
MAX_TRAPS = 257  # 256 entries and the terminator

_ASSISTS = frozenset(
    (
        abi.VMASST_TYPE_4gb_segments,
        abi.VMASST_TYPE_4gb_segments_notify,
        abi.VMASST_TYPE_writable_pagetables,
        abi.VMASST_TYPE_pae_extended_cr3,
        abi.VMASST_TYPE_architectural_iopl,
        abi.VMASST_TYPE_runstate_update_flag,
        abi.VMASST_TYPE_m2p_strict,
    )
)


_CALLBACKS = frozenset(
    (
        abi.CALLBACKTYPE_event,
        abi.CALLBACKTYPE_failsafe,
        abi.CALLBACKTYPE_syscall,
        abi.CALLBACKTYPE_syscall32,
        abi.CALLBACKTYPE_sysenter,
    )
)


def fix_code_selector(selector: int) -> int:
    """A guest handler runs in ring 3 (fixup_guest_code_selector)."""
    return selector | 3


@hypercall(abi.HYPERVISOR_set_trap_table)
def set_trap_table(domain: Domain, traps: int, _2: int, _3: int, _4: int, _5: int, _6: int) -> int:
    state = domain.running.state
    if traps == 0:
        for vector in range(256):
            state.trap_address[vector] = state.trap_flags[vector] = state.trap_cs[vector] = 0
        return 0
    for number in range(MAX_TRAPS):
        vector, flags, cs, address = _TRAP.unpack(domain.guest.read(traps + number * _TRAP.size, _TRAP.size))
        if address == 0:
            return 0
        if not x86.is_canonical(address):
            raise XenError(errno.EINVAL, f"handler of {vector} at {address:#x}")
        state.trap_flags[vector] = flags
        state.trap_cs[vector] = fix_code_selector(cs)
        state.trap_address[vector] = address
    return 0


@hypercall(abi.HYPERVISOR_set_callbacks)
def set_callbacks(domain: Domain, event: int, failsafe: int, syscall: int, _4: int, _5: int, _6: int) -> int:
    state = domain.running.state
    for address in (event, failsafe, syscall):
        if not x86.is_canonical(address):
            raise XenError(errno.EINVAL, f"callback at {address:#x}")
    state.event_callback, state.failsafe_callback, state.syscall_callback = event, failsafe, syscall
    return 0


@hypercall(abi.HYPERVISOR_callback_op)
def callback_op(domain: Domain, command: int, argument: int, _3: int, _4: int, _5: int, _6: int) -> int:
    state = domain.running.state
    if command == abi.CALLBACKOP_unregister:
        (kind,) = struct.unpack("<H", domain.guest.read(argument, 2))
        if kind == abi.CALLBACKTYPE_nmi:
            return 0
        known = kind in _CALLBACKS
        raise XenError(errno.EINVAL if known else errno.ENOSYS, f"callback {kind} cannot be unregistered")
    if command == abi.CALLBACKOP_register:
        kind, flags, address = _CALLBACK.unpack(domain.guest.read(argument, _CALLBACK.size))
        if not x86.is_canonical(address):
            raise XenError(errno.EINVAL, f"callback at {address:#x}")
    else:
        raise XenError(errno.ENOSYS, f"callback_op {command}")
    masks = 1 if flags & abi.CALLBACKF_mask_events else 0
    if kind == abi.CALLBACKTYPE_event:
        state.event_callback = address
    elif kind == abi.CALLBACKTYPE_failsafe:
        state.failsafe_callback, state.failsafe_masks = address, masks
    elif kind == abi.CALLBACKTYPE_syscall:
        state.syscall_callback, state.syscall_masks = address, masks
    elif kind == abi.CALLBACKTYPE_syscall32:
        state.syscall32_callback, state.syscall32_masks = address, masks
    elif kind == abi.CALLBACKTYPE_sysenter:
        state.sysenter_callback, state.sysenter_masks = address, masks
    elif kind == abi.CALLBACKTYPE_nmi:
        pass  # accepted, as nothing here raises an NMI
    else:
        raise XenError(errno.ENOSYS, f"callback type {kind}")
    return 0


@hypercall(abi.HYPERVISOR_set_gdt)
def set_gdt(domain: Domain, frames: int, entries: int, _3: int, _4: int, _5: int, _6: int) -> int:
    entries &= 0xFFFF_FFFF
    if entries > 14 * 512:
        raise XenError(errno.EINVAL, f"GDT with {entries} entries")
    count = (entries + 511) // 512
    mfns = list(struct.unpack(f"<{count}Q", domain.guest.read(frames, 8 * count)))
    domain.set_gdt(domain.running, mfns, entries)
    return 0


@hypercall(abi.HYPERVISOR_stack_switch)
def stack_switch(domain: Domain, ss: int, sp: int, _3: int, _4: int, _5: int, _6: int) -> int:
    state = domain.running.state
    state.kernel_ss, state.kernel_sp = ss | 3, sp
    return 0


@hypercall(abi.HYPERVISOR_fpu_taskswitch)
def fpu_taskswitch(domain: Domain, on: int, _2: int, _3: int, _4: int, _5: int, _6: int) -> int:
    domain.engine.regs.task_switched = bool(on)
    return 0


@hypercall(abi.HYPERVISOR_set_segment_base)
def set_segment_base(domain: Domain, which: int, base: int, _3: int, _4: int, _5: int, _6: int) -> int:
    which &= 0xFFFF_FFFF
    regs, state = domain.engine.regs, domain.running.state
    if which == abi.SEGBASE_GS_USER_SEL:
        selector = base & 0xFFFF
        state.gs_base_other = 0
        descriptor = domain.area.descriptor(domain.running.id, selector, domain.running.ldt_entries)
        if selector & ~3 and not descriptor & x86.DESC_P:
            selector, descriptor = 0, 0
        kernel_base = regs.gs_base
        regs.gs = selector
        state.gs_base_other = x86.desc_base(descriptor) if descriptor else 0
        regs.gs_base = kernel_base
        return 0
    if not x86.is_canonical(base):
        raise XenError(errno.EINVAL, f"segment base {base:#x}")
    if which == abi.SEGBASE_FS:
        regs.fs_base = base
    elif which == abi.SEGBASE_GS_USER:
        state.gs_base_other = base
    elif which == abi.SEGBASE_GS_KERNEL:
        regs.gs_base = base
    else:
        raise XenError(errno.EINVAL, f"segment base {which}")
    return 0


@hypercall(abi.HYPERVISOR_set_debugreg)
def set_debugreg(domain: Domain, number: int, value: int, _3: int, _4: int, _5: int, _6: int) -> int:
    number &= 0xFFFF_FFFF
    number = number + 2 if number in (4, 5) else number
    if number > 7:
        raise XenError(errno.EINVAL, f"debug register {number}")
    if not set_debug_register(domain.running.debug_registers, number, value):
        raise XenError(errno.EPERM, f"debug register {number} to {value:#x}")
    return 0


@hypercall(abi.HYPERVISOR_get_debugreg)
def get_debugreg(domain: Domain, number: int, _2: int, _3: int, _4: int, _5: int, _6: int) -> int:
    number &= 0xFFFF_FFFF
    number = number + 2 if number in (4, 5) else number
    if number > 7:
        raise XenError(errno.EINVAL, f"debug register {number}")
    return domain.running.debug_registers[number]


@hypercall(abi.HYPERVISOR_physdev_op)
def physdev_op(domain: Domain, command: int, argument: int, _3: int, _4: int, _5: int, _6: int) -> int:
    command &= 0xFFFF_FFFF
    if command == abi.PHYSDEVOP_set_iopl:
        (level,) = _U32.unpack(domain.guest.read(argument, 4))
        if level > 3:
            raise XenError(errno.EINVAL, f"iopl {level}")
        domain.running.state.iopl = level
        return 0
    if command == abi.PHYSDEVOP_set_iobitmap:
        _bitmap, ports = struct.unpack("<QI", domain.guest.read(argument, 12))
        if ports > 65536:
            raise XenError(errno.EINVAL, f"I/O bitmap of {ports} ports")
        return 0  # no port is there to be reached
    raise XenError(errno.ENOSYS, f"physdev_op {command}: this domain has no devices")


@hypercall(abi.HYPERVISOR_vm_assist)
def vm_assist(domain: Domain, command: int, kind: int, _3: int, _4: int, _5: int, _6: int) -> int:
    kind &= 0xFFFF_FFFF
    if kind not in _ASSISTS:
        raise XenError(errno.EINVAL, f"vm_assist type {kind}")
    if command == abi.VMASST_CMD_enable:
        domain.vm_assist |= 1 << kind
    elif command == abi.VMASST_CMD_disable:
        domain.vm_assist &= ~(1 << kind)
    else:
        raise XenError(errno.ENOSYS, f"vm_assist command {command}")
    domain.traps.architectural_iopl = bool(domain.vm_assist & 1 << abi.VMASST_TYPE_architectural_iopl)
    return 0


@hypercall(abi.HYPERVISOR_nmi_op)
def nmi_op(_domain: Domain, command: int, _2: int, _3: int, _4: int, _5: int, _6: int) -> int:
    if command in (0, 1):  # XENNMI_register_callback, XENNMI_unregister_callback
        return 0
    raise XenError(errno.ENOSYS, f"nmi_op {command}")
