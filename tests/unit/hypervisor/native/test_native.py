"""The compiled fast path does what Python does: both on the same random states, and whole guests with and without."""

from __future__ import annotations

import ctypes
import random
from collections.abc import Iterator

import harness
import pytest
from native_rig import BASE, COMPILED, PAGES, SYSCALL, Rig, compare

from hypervisor import abi, native
from hypervisor.domain import MachineConfig
from hypervisor.engines.tsc import measure_khz
from hypervisor.machine import Machine

pytestmark = COMPILED

STATES = 400
_PF_CODES = (0, 1, 2, 3, 4, 5, 6, 7, 0x10, 0x11, 0x14, 0x15)
_INTERRUPT = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_uint32, ctypes.c_void_p)


@pytest.fixture(scope="module")
def rig() -> Iterator[Rig]:
    yield Rig()


def test_system_calls_and_returns(rig: Rig) -> None:
    clean = rig.snapshot()
    call = SYSCALL(rig.fast.syscall)
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
    SYSCALL(rig.fast.syscall)(rig.engine._handle, rig.fast.data)
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
