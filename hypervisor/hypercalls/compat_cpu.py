"""Traps, callbacks, descriptor tables, versions, ports and assists of 32-bit guests (arch/x86/pv/callback.c, others).

Handlers have a code selector of their own here, made the guest's by its privilege level.
"""

from __future__ import annotations

import ctypes
import struct

from hypervisor import abi
from hypervisor.abi import errno
from hypervisor.domain import Domain
from hypervisor.errors import XenError
from hypervisor.hypercalls.compat_registry import compat, guest_of, native
from hypervisor.hypercalls.xlat import Pair
from hypervisor.memory.segdesc32 import fix_selector

_TRAP = struct.Struct("<BBHI")
_REGISTER = struct.Struct("<HHII")  # callback_register
_MAX_TRAPS = 257
_MAX_GDT_ENTRIES = 14 * 512
_IOBITMAP = Pair("physdev_set_iobitmap")
_FIXED_CALLBACKS = (abi.CALLBACKTYPE_event, abi.CALLBACKTYPE_failsafe)


@compat(abi.HYPERVISOR_set_trap_table)
def set_trap_table(domain: Domain, traps: int, _2: int, _3: int, _4: int, _5: int, _6: int) -> int:
    state = domain.running.state
    if traps == 0:
        for array in (state.trap_address, state.trap_flags, state.trap_cs):
            ctypes.memset(array, 0, ctypes.sizeof(array))
        return 0
    for number in range(_MAX_TRAPS):
        vector, flags, cs, address = _TRAP.unpack(domain.guest.read(traps + number * _TRAP.size, _TRAP.size))
        if address == 0:
            return 0
        state.trap_flags[vector] = flags
        state.trap_cs[vector] = fix_selector(cs)
        state.trap_address[vector] = address
    return 0


def _register(domain: Domain, kind: int, flags: int, cs: int, address: int) -> None:
    state = domain.running.state
    masks = 1 if flags & abi.CALLBACKF_mask_events else 0
    cs = fix_selector(cs & 0xFFFF)
    if kind == abi.CALLBACKTYPE_event:
        state.event_cs, state.event_callback = cs, address
    elif kind == abi.CALLBACKTYPE_failsafe:
        state.failsafe_cs, state.failsafe_callback, state.failsafe_masks = cs, address, masks
    elif kind == abi.CALLBACKTYPE_syscall32:
        state.syscall32_cs, state.syscall32_callback, state.syscall32_masks = cs, address, masks
    elif kind == abi.CALLBACKTYPE_sysenter:
        state.sysenter_cs, state.sysenter_callback, state.sysenter_masks = cs, address, masks
    elif kind != abi.CALLBACKTYPE_nmi:  # accepted, as nothing here raises an NMI
        raise XenError(errno.ENOSYS, f"callback type {kind}")


@compat(abi.HYPERVISOR_set_callbacks)
def set_callbacks(domain: Domain, event_cs: int, event: int, failsafe_cs: int, failsafe: int, _5: int, _6: int) -> int:
    _register(domain, abi.CALLBACKTYPE_event, 0, event_cs, event)
    _register(domain, abi.CALLBACKTYPE_failsafe, 0, failsafe_cs, failsafe)
    return 0


@compat(abi.HYPERVISOR_callback_op)
def callback_op(domain: Domain, command: int, argument: int, _3: int, _4: int, _5: int, _6: int) -> int:
    if command == abi.CALLBACKOP_register:
        _register(domain, *_REGISTER.unpack(domain.guest.read(argument, _REGISTER.size)))
    elif command == abi.CALLBACKOP_unregister:
        (kind,) = struct.unpack("<H", domain.guest.read(argument, 2))
        if kind in _FIXED_CALLBACKS or kind > abi.CALLBACKTYPE_syscall32 or kind == abi.CALLBACKTYPE_syscall:
            raise XenError(errno.EINVAL, f"callback {kind} cannot be unregistered")
        _register(domain, kind, 0, 0, 0)
    else:
        raise XenError(errno.ENOSYS, f"callback_op {command}")
    return 0


@compat(abi.HYPERVISOR_stack_switch)
def stack_switch(domain: Domain, ss: int, sp: int, _3: int, _4: int, _5: int, _6: int) -> int:
    state = domain.running.state
    state.kernel_ss, state.kernel_sp = fix_selector(ss & 0xFFFF), sp
    return 0


@compat(abi.HYPERVISOR_set_gdt)
def set_gdt(domain: Domain, frames: int, entries: int, _3: int, _4: int, _5: int, _6: int) -> int:
    if entries > _MAX_GDT_ENTRIES:
        raise XenError(errno.EINVAL, f"GDT with {entries} entries")
    count = (entries + 511) // 512
    mfns = list(struct.unpack(f"<{count}I", domain.guest.read(frames, 4 * count)))
    domain.set_gdt(domain.running, mfns, entries)
    return 0


@compat(abi.HYPERVISOR_physdev_op)
def physdev_op(domain: Domain, command: int, argument: int, _3: int, _4: int, _5: int, _6: int) -> int:
    if command == abi.PHYSDEVOP_set_iobitmap:
        guest = guest_of(domain)
        argument = guest.put(bytes(_IOBITMAP.read(guest, argument)))
    return native(abi.HYPERVISOR_physdev_op)(domain, command, argument, 0, 0, 0, 0)


@compat(abi.HYPERVISOR_vm_assist)
def vm_assist(domain: Domain, command: int, kind: int, _3: int, _4: int, _5: int, _6: int) -> int:
    if kind >= 32:
        raise XenError(errno.EINVAL, f"vm_assist type {kind}")
    return native(abi.HYPERVISOR_vm_assist)(domain, command, kind, 0, 0, 0, 0)


@compat(abi.HYPERVISOR_nmi_op)
def nmi_op(domain: Domain, command: int, _2: int, _3: int, _4: int, _5: int, _6: int) -> int:
    return native(abi.HYPERVISOR_nmi_op)(domain, command, 0, 0, 0, 0, 0)


@compat(abi.HYPERVISOR_xen_version)
def xen_version(domain: Domain, command: int, argument: int, _3: int, _4: int, _5: int, _6: int) -> int:
    if command == abi.XENVER_platform_parameters:
        domain.guest.write_u32(argument, abi.COMPAT_HYPERVISOR_VIRT_START)
        return 0
    result = native(abi.HYPERVISOR_xen_version)(domain, command, argument, 0, 0, 0, 0)
    if command == abi.XENVER_get_features and domain.vm_assist & 1 << abi.VMASST_TYPE_pae_extended_cr3:
        submap, features = struct.unpack("<2I", domain.guest.read(argument, 8))
        if submap == 0:
            domain.guest.write_u32(argument + 4, features | 1 << abi.XENFEAT_pae_pgdir_above_4gb)
    return result
