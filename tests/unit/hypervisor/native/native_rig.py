"""A machine that is put into one state after another, for the compiled code and for Python's in turn."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import random
from collections.abc import Callable
from typing import Any

import harness
import numpy as np
import pytest

from hypervisor import abi, native
from hypervisor.cpu.state import VcpuState
from hypervisor.domain import MachineConfig
from hypervisor.engines import x86
from hypervisor.engines.tsc import measure_khz
from hypervisor.errors import GuestFault
from hypervisor.machine import Machine
from hypervisor.toolstack import builder
from hypervisor.types import Mfn

PAGES, BASE = 1024, 0x20000
EPOCH = 1000
SYSCALL = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p)

_CODE, _WHY = native.library()
COMPILED = [
    pytest.mark.skipif(_CODE is None, reason=_WHY),
    pytest.mark.skipif(harness.build.available() is not None, reason=str(harness.build.available())),
]


@dataclasses.dataclass(frozen=True)
class State:
    registers: bytes
    vcpu: bytes
    memory: bytes
    frames: bytes
    stamps: bytes
    digests: dict[int, int]


class Rig:
    """A machine at its guest's first instruction, put into one state after another; nothing of the guest runs."""

    def __init__(self) -> None:
        self.memory = harness.make_memory(PAGES)
        uuid = "3f2504e0-4f89-41d3-9a0c-0305e82c3303"
        config = MachineConfig(uuid, "native", 9, BASE, PAGES, PAGES, tsc_khz=measure_khz())
        self.machine = Machine(config, self.memory, notify_host=lambda _port: None, fast_path="on")
        target = builder.BuildMemory(memoryview(self.memory), Mfn(BASE), PAGES)
        kernel = harness._kernel("hello")
        self.boot = builder.build(target, kernel, None, "", shared_info_mfn=Mfn(self.machine.shared_info_mfn))
        self.machine.start(self.boot)
        self.engine: Any = self.machine.engine
        self.domain = self.machine.domain
        self.regs = self.engine.regs
        self.stack = self.boot.rsp & ~0xFFF
        vcpu = self.domain.running
        gdt = 9  # a frame that nothing uses
        words = self.domain.memory.words
        words[gdt * 512 + 5], words[gdt * 512 + 6] = 0x00CF_F300_0000_FFFF, 0x00AF_FB00_0000_FFFF
        words[gdt * 512 + 7], words[gdt * 512 + 8] = 0x00CF_F200_0000_FFFF, 0x00CF_FB00_0000_FFFF
        words[gdt * 512 + 9] = 0x00CF_7300_0000_FFFF  # not present
        self.domain.area.map_gdt(vcpu.id, [gdt])
        assert self.machine._native is not None
        self.fast = self.machine._native

    def snapshot(self) -> State:
        frames = self.domain.frames
        return State(
            self.regs.save(),
            bytes(self.domain.running.state),
            self.memory[:],
            frames.raw(),
            frames.stamp_np.tobytes(),
            dict(self.domain.tables.code._digest),
        )

    def put(self, state: State) -> None:
        domain = self.domain
        self.engine.restore_cpu(state.registers)
        ctypes.memmove(ctypes.addressof(domain.running.state), state.vcpu, ctypes.sizeof(VcpuState))
        self.memory[:] = state.memory
        domain.frames.load_raw(state.frames)
        domain.frames.stamp_np[:] = np.frombuffer(state.stamps, dtype=np.uint64)
        domain.tables.code._digest = dict(state.digests)
        domain.shutdown_code = None
        self.engine._epoch = EPOCH
        self.engine._forgotten()

    def randomise(self, dice: random.Random) -> None:
        """Mostly sane, as from a guest that works; and now and then not."""
        state, regs, memory = self.domain.running.state, self.regs, self.domain.memory
        sane = [self.stack + 0x800, self.stack + 0x808, self.stack + 0xFC0]
        odd = [0, self.stack + 0x10, self.stack + 4, 1 << 47, 0xFFFF_8000_0000_0000, x86.MASK64 - 7, self.boot.entry]

        def stack() -> int:
            return dice.choice(sane if dice.randrange(6) else odd)

        def address() -> int:
            return dice.choice((self.boot.entry, self.boot.entry, self.boot.entry + 64, 0, 1 << 47))

        for number in range(16):
            regs.gpr[number] = dice.getrandbits(64)
        state.kernel_mode = dice.randrange(2)
        root = state.kernel_cr3
        state.user_cr3 = dice.choice((root, root, root, 0))
        state.gs_base_other, regs.gs_base = dice.getrandbits(47), dice.getrandbits(47)
        state.kernel_sp = stack()
        state.syscall_callback, state.event_callback, state.trap_address[14] = address(), address(), address()
        state.syscall_masks, state.trap_flags[14] = dice.randrange(2), dice.choice((0, 4, 7))
        info = state.vcpu_info
        memory.bytes[info + abi.VCPU_INFO_EVTCHN_UPCALL_PENDING] = dice.randrange(2)
        memory.bytes[info + abi.VCPU_INFO_EVTCHN_UPCALL_MASK] = dice.randrange(2)
        regs.gpr[x86.RAX] = dice.choice((abi.HYPERVISOR_iret, abi.HYPERVISOR_iret, abi.HYPERVISOR_stack_switch, 99))
        regs.gpr[x86.RSP] = top = stack()
        regs.rip = dice.choice((self.boot.entry, 0x40_0000, x86.MASK64 & ~0xFFF))
        regs.rflags = dice.getrandbits(22) & ~x86.FLAG_TF | 2
        regs.cr2 = dice.getrandbits(47)
        selectors = dice.choice(((0xE033, 0xE02B), (0x33, 0x2B), (0x33, 0x3B), (0x43, 0x2B), (0x33, 0x4B)))
        self.engine.load_flat64(*selectors[:2])
        if not dice.randrange(8) and not state.kernel_mode:
            self.engine.load_segment(x86.CS, 0x23, 0x00CF_FB00_0000_FFFF)
        self._frame(dice, top)

    def _frame(self, dice: random.Random, top: int) -> None:
        """What an iret at `top` pops."""
        cs, ss = dice.choice(
            ((0xE033, 0xE02B), (0xE030, 0xE028), (0x33, 0x2B), (0x33, 0x3B), (0x43, 0x2B), (0xE023, 0))
        )
        at = self.domain.guest.translate(top)
        if at < 0 or at % 8:
            return
        flags = dice.getrandbits(22) & ~(x86.FLAG_TF if dice.randrange(8) else 0)
        rip = dice.choice((self.boot.entry, 0x40_0000, 1 << 47, x86.MASK64 & ~0xFFF))
        frame = (dice.getrandbits(64), dice.getrandbits(64), dice.getrandbits(64), dice.choice((0, 0x100)), rip, cs)
        words = self.domain.memory.words
        for slot, value in enumerate((*frame, flags, dice.choice((self.stack, 0)), ss)):
            if (at >> 3) + slot < self.domain.memory.frames * 512:
                words[(at >> 3) + slot] = value

    def finish(self) -> str:
        """What became of it; an event that the run loop would deliver next is delivered."""
        error, self.engine._error = self.engine._error, None
        with contextlib.suppress(AttributeError):
            self.engine._stopping = False
        if error is None:
            try:
                self.machine._traps.deliver_event()
            except GuestFault as exc:
                error = exc
        if error is not None and not isinstance(error, GuestFault):
            raise error
        return "the guest crashes" if error is not None else "it goes on"


def compare(rig: Rig, before: State, act: tuple[Any, Any], what: str, level: Callable[[], None] = lambda: None) -> bool:
    """Whether the compiled code did it alone. After a crash only the crash is compared.

    :param level: makes what may differ the same, after either.
    """
    native_act, python_act = act
    done = sum(rig.fast.counts().values())
    native_act()
    alone = sum(rig.fast.counts().values()) > done
    ends = [rig.finish()]
    level()
    after = rig.snapshot()
    rig.put(before)
    python_act()
    ends.append(rig.finish())
    assert ends[0] == ends[1], what
    if ends[0] == "it goes on":
        level()
        other = rig.snapshot()
        # The engine's register block holds the cached translation state too: all of it must agree.
        for field in dataclasses.fields(State):
            name, ours, theirs = field.name, getattr(after, field.name), getattr(other, field.name)
            if name == "digests":
                assert ours == theirs, what
            elif ours != theirs:
                where = next(n for n, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b)
                near = slice(where & ~7, (where & ~7) + 8)
                pytest.fail(f"{name} differ at {where:#x}, {ours[near].hex()} and {theirs[near].hex()}: {what}")
    return alone
