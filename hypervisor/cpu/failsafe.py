"""Data segments of a vCPU that comes back to the processor, and the failsafe callback (load_segments in x86/domain.c).

Its descriptor tables may have changed meanwhile. A selector that cannot be loaded any more becomes a null one, and the
guest's failsafe callback gets all four as they were. A return to code or stack that cannot be loaded is no matter of
this: that is an exception of the guest's (`Traps.iret`).
"""

from __future__ import annotations

import struct

from hypervisor import abi
from hypervisor.cpu.traps import Traps
from hypervisor.cpu.traps32 import KERNEL_CS, KERNEL_SS, Traps32
from hypervisor.engines import x86
from hypervisor.errors import GuestFault, XenError

_INDEXES = (x86.DS, x86.ES, x86.FS, x86.GS)
_READABLE, _CONFORMING = 1 << 41, 1 << 42  # of a code descriptor
_MASK = abi.VCPU_INFO_EVTCHN_UPCALL_MASK
_CLEARED = x86.FLAG_VM | x86.FLAG_RF | x86.FLAG_NT | x86.FLAG_IOPL | x86.FLAG_TF

Selectors = tuple[int, int, int, int]


def reload_segments(traps: Traps) -> None:
    """Load DS, ES, FS and GS of the vCPU that was just put on the engine.

    :raises GuestFault: there is no stack for the failsafe callback.
    """
    regs, engine = traps.regs, traps.engine
    selectors = regs.ds, regs.es, regs.fs, regs.gs
    if not any(selector & ~3 for selector in selectors):
        return  # 64-bit kernels and programs have null ones
    wide = not isinstance(traps, Traps32)
    bases = regs.fs_base, regs.gs_base
    lost = False
    for index, selector in zip(_INDEXES, selectors, strict=True):
        if not selector & ~3:
            continue
        descriptor = traps.area.descriptor(traps.vcpu.id, selector, traps.vcpu.ldt_entries)
        if _loads(descriptor, selector & 3):
            engine.load_segment(index, selector, descriptor)
        else:
            engine.load_segment(index, 0, 0)
            lost = True
    if wide:  # where these two lie is not the descriptors' to say
        regs.fs_base, regs.gs_base = bases
    if lost:
        _call64(traps, selectors) if wide else _call32(traps, selectors)


def _loads(descriptor: int, level: int) -> bool:
    """Whether a data segment register takes it from ring 0, as Xen loads it (AMD64 APM vol. 2, 4.10)."""
    if not descriptor & x86.DESC_P or not descriptor & x86.DESC_S:
        return False
    if descriptor & x86.DESC_CODE:
        if not descriptor & _READABLE:
            return False
        if descriptor & _CONFORMING:
            return True
    return level <= x86.desc_dpl(descriptor)


def _flags(traps: Traps) -> tuple[int, int]:
    """RFLAGS as the frame shows them, and the event mask, which then is set if the guest asked for that."""
    state, memory = traps.state, traps.memory
    at = state.vcpu_info + _MASK
    masked = memory.bytes[at]
    flags = traps.regs.rflags & ~(x86.FLAG_IF | x86.FLAG_IOPL) | (0 if masked else x86.FLAG_IF)
    if traps.architectural_iopl:
        flags |= state.iopl << 12
    if state.failsafe_masks:
        memory.bytes[at] = 1
    return flags, masked


def _push(traps: Traps, stack: int, frame: bytes) -> None:
    try:
        traps.guest.write(stack, frame)
    except XenError as exc:
        raise GuestFault(f"no stack at {stack:#x} for the failsafe callback at rip {traps.regs.rip:#x}") from exc


def _call64(traps: Traps, selectors: Selectors) -> None:
    state, regs = traps.state, traps.regs
    gpr, cs = regs.gpr, regs.cs
    rsp, ss, rip = gpr[x86.RSP], regs.ss, regs.rip
    stack = rsp
    if state.kernel_mode:
        cs &= ~3
    else:
        traps.to_kernel()
        stack = state.kernel_sp
    flags, masked = _flags(traps)
    frame = struct.pack("<11Q", gpr[x86.RCX], gpr[x86.R11], *selectors, rip, cs | masked << 32, flags, rsp, ss)
    stack = ((stack & ~15) - len(frame)) & x86.MASK64
    _push(traps, stack, frame)
    gpr[x86.RSP] = stack
    regs.rip = state.failsafe_callback
    traps.engine.load_flat64(abi.FLAT_KERNEL_CS64, abi.FLAT_KERNEL_SS64)
    regs.clear_flags(_CLEARED | x86.FLAG_AC)


def _call32(traps: Traps, selectors: Selectors) -> None:
    state, regs, engine = traps.state, traps.regs, traps.engine
    gpr, cs = regs.gpr, regs.cs
    inner = cs & 3 == 1
    flags, masked = _flags(traps)
    words = [*selectors, regs.rip & x86.MASK32, cs | masked << 16, flags]
    stack = gpr[x86.RSP] if inner else state.kernel_sp
    if not inner:
        words += [gpr[x86.RSP] & x86.MASK32, regs.ss]
    stack = (stack - 4 * len(words)) & x86.MASK32
    _push(traps, stack, struct.pack(f"<{len(words)}I", *words))
    gpr[x86.RSP] = stack
    regs.rip = state.failsafe_callback
    for index, selector in ((x86.CS, KERNEL_CS), (x86.SS, KERNEL_SS)):
        engine.load_segment(index, selector, traps.area.descriptor(traps.vcpu.id, selector, 0))
    state.kernel_mode = 1
    regs.clear_flags(_CLEARED)
