"""The compiled fast path does what Python does: both on the same random states, and whole guests with and without."""

from __future__ import annotations

import contextlib
import ctypes
import random
from collections.abc import Iterator
from typing import Any

import harness
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

CODE, WHY = native.library()
pytestmark = [
    pytest.mark.skipif(CODE is None, reason=WHY),
    pytest.mark.skipif(harness.build.available() is not None, reason=str(harness.build.available())),
]

PAGES, BASE = 1024, 0x20000
STATES = 400
_PF_CODES = (0, 1, 2, 3, 4, 5, 6, 7, 0x10, 0x11, 0x14, 0x15)
_SYSCALL = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p)
_INTERRUPT = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_uint32, ctypes.c_void_p)


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

    def snapshot(self) -> tuple[bytes, bytes, bytes]:
        return self.regs.save(), bytes(self.domain.running.state), self.memory[:]

    def put(self, state: tuple[bytes, bytes, bytes]) -> None:
        registers, vcpu, memory = state
        self.engine.restore_cpu(registers)
        ctypes.memmove(ctypes.addressof(self.domain.running.state), vcpu, ctypes.sizeof(VcpuState))
        self.memory[:] = memory
        self.domain.shutdown_code = None

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


@pytest.fixture(scope="module")
def rig() -> Iterator[Rig]:
    yield Rig()


def compare(rig: Rig, before: tuple[bytes, bytes, bytes], act: tuple[Any, Any], what: str) -> bool:
    """Whether the compiled code did it alone. After a crash only the crash is compared."""
    native_act, python_act = act
    done = sum(rig.fast.counts().values())
    native_act()
    alone = sum(rig.fast.counts().values()) > done
    ends = [rig.finish()]
    after = rig.snapshot()
    rig.put(before)
    python_act()
    ends.append(rig.finish())
    assert ends[0] == ends[1], what
    if ends[0] == "it goes on":
        other = rig.snapshot()
        # The engine's register block holds the cached translation state too: all of it must agree.
        for name, ours, theirs in zip(("registers", "vCPU", "memory"), after, other, strict=True):
            if ours != theirs:
                where = next(n for n, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b)
                pytest.fail(f"{name} differ at {where:#x}: {what}")
    return alone


def test_system_calls_and_returns(rig: Rig) -> None:
    clean = rig.snapshot()
    call = _SYSCALL(rig.fast.syscall)
    alone = 0
    for seed in range(STATES):
        rig.put(clean)
        rig.randomise(random.Random(seed))
        before = rig.snapshot()
        act = (lambda: call(rig.engine._handle, rig.fast.data), lambda: rig.engine._direct_syscall(0, 0))
        alone += compare(rig, before, act, f"seed {seed}")
    rig.put(clean)
    assert alone > STATES // 4, "most plain ones are done by the compiled code"


def test_page_faults(rig: Rig) -> None:
    clean = rig.snapshot()
    call = _INTERRUPT(rig.fast.interrupt)
    layout = rig.engine.layout
    alone = 0
    for seed in range(STATES):
        rig.put(clean)
        dice = random.Random(seed)
        rig.randomise(dice)
        ctypes.c_uint32.from_address(rig.engine._env.value + layout.env_error_code).value = dice.choice(_PF_CODES)
        ctypes.c_uint32.from_address(rig.engine._env.value + layout.env_old_exception).value = 14
        before = rig.snapshot()
        act = (lambda: call(rig.engine._handle, 14, rig.fast.data), lambda: rig.engine._direct_intr(0, 14, 0))
        alone += compare(rig, before, act, f"seed {seed}")
    rig.put(clean)
    assert alone > STATES // 4


def test_no_event_once_the_run_is_being_left(rig: Rig) -> None:
    clean = rig.snapshot()
    state, memory = rig.domain.running.state, rig.domain.memory
    state.kernel_mode, state.user_cr3, state.kernel_sp = 0, state.kernel_cr3, rig.stack + 0x800
    state.syscall_callback = state.event_callback = rig.boot.entry
    state.syscall_masks = 0
    memory.bytes[state.vcpu_info + abi.VCPU_INFO_EVTCHN_UPCALL_PENDING] = 1
    memory.bytes[state.vcpu_info + abi.VCPU_INFO_EVTCHN_UPCALL_MASK] = 0
    rig.fast.leaving(True)
    _SYSCALL(rig.fast.syscall)(rig.engine._handle, rig.fast.data)
    rig.fast.leaving(False)
    assert memory.bytes[state.vcpu_info + abi.VCPU_INFO_EVTCHN_UPCALL_MASK] == 0
    rig.put(clean)


def test_it_is_off_while_the_guest_has_its_own_iopl(rig: Rig) -> None:
    assert rig.fast.context.on
    rig.domain.traps.architectural_iopl = True
    assert not rig.fast.context.on
    rig.domain.traps.architectural_iopl = False
    assert rig.fast.context.on


@pytest.mark.parametrize("mode", ["on", "off"])
def test_guests_get_on_with_it_and_without(mode: str) -> None:
    """`traps` checks what it sees after each of its exceptions, system calls and returns."""
    run = harness.GuestRun("traps", fast_path=mode)
    try:
        run.start()
        run.wait_end()
        assert run.failures() == [] and "0 failed" in run.text
        assert (run.machine.stats()["native"] > 100) == (mode != "off")
    finally:
        run.close()


def test_on_without_compiled_code_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "library", lambda: (None, "it was not compiled: install a C compiler"))
    config = MachineConfig("3f2504e0-4f89-41d3-9a0c-0305e82c3304", "x", 9, BASE, PAGES, PAGES, tsc_khz=measure_khz())
    with pytest.raises(native.Unavailable, match="C compiler"):
        Machine(config, harness.make_memory(PAGES), notify_host=lambda _port: None, fast_path="on")
    machine = Machine(config, harness.make_memory(PAGES), notify_host=lambda _port: None)
    assert machine.stats()["native"] == 0


def test_code_that_changes_through_another_mapping_is_run_as_it_is() -> None:
    run = harness.GuestRun("alias", fast_path="on")
    try:
        run.start()
        run.wait_end()
        assert run.failures() == [] and "0 failed" in run.text
        tables = run.machine._native.tables  # type: ignore[union-attr]
        assert tables.switches > 100
        assert tables.blocks and not tables.lost
    finally:
        run.close()
