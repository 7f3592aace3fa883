"""A running guest moves to another machine: memory while it runs, then the rest; it notices nothing."""

from __future__ import annotations

import array
import base64
import collections
import json
import os
import struct
import time
from collections.abc import Callable, Iterator
from typing import Any

import harness
import numpy as np
import pytest
from harness import GuestRun, running
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hypervisor import moving
from hypervisor.errors import MigrationFailed, ToolstackError, WrongState
from hypervisor.host.dirty_log import Unavailable, WriteLog
from hypervisor.hotcode import HotCode
from hypervisor.moving import _HEADER, MovingState

pytestmark = pytest.mark.skipif(harness.build.available() is not None, reason=str(harness.build.available()))


@pytest.fixture
def runs() -> Iterator[list[GuestRun]]:
    yield from harness.guest_runs()


@pytest.fixture
def log() -> Iterator[WriteLog]:
    try:
        made = WriteLog()
    except Unavailable as exc:
        pytest.skip(str(exc))
    yield made
    made.stop()
    made.close()


def there(runs: list[GuestRun], name: str, first: GuestRun, **options: Any) -> GuestRun:
    """A machine that waits for the guest; not started."""
    run = GuestRun(name, arriving=first, **options)
    runs.append(run)
    return run


def arrive(first: GuestRun, second: GuestRun) -> None:
    """All at once: the guest stands still, memory and state go over, and it goes on there."""
    first.moving.freeze()
    state = first.moving.give()
    second.memory[:] = first.memory[:]
    second.moving.take(state)
    second.start()


@pytest.mark.parametrize("public", [False, True], ids=["direct", "public"])
def test_a_guest_goes_on_elsewhere(runs: list[GuestRun], public: bool) -> None:
    first = running(runs, "onward", public=public, cmdline="count=40")
    first.wait_text("onward: tick 10")
    second = there(runs, "onward", first, public=public)
    arrive(first, second)
    assert second.wait_end() == harness.EXPECTED_POWEROFF
    assert second.failures() == [] and first.failures() == []
    assert "onward: tick 40" in second.text and "onward: tick 5\n" not in second.text
    assert second.machine.domain.recount() == []


def test_several_vcpus_go(runs: list[GuestRun]) -> None:
    first = running(runs, "channels", vcpus=2)
    first.wait(lambda: first.text.count("PASS") > 5, "tests")
    second = there(runs, "channels", first, vcpus=2)
    arrive(first, second)
    second.wait_end()
    assert second.failures() == [] and first.failures() == [], second.text
    assert "0 failed" in second.text


def test_a_32_bit_guest_goes(runs: list[GuestRun]) -> None:
    first = running(runs, "fuzz32")
    first.wait_stats(lambda stats: stats["hypercalls"] > 2000, "hypercalls")
    second = there(runs, "fuzz32", first)
    first.moving.freeze()
    second.memory[:] = first.memory[:]
    second.moving.take(first.moving.give(early=True))
    arrive(first, second)
    second.wait_stats(lambda stats: stats["hypercalls"] > 2000, "hypercalls")
    assert second.call(second.machine.domain.recount) == []


def test_memory_goes_while_the_guest_runs(runs: list[GuestRun], log: WriteLog) -> None:
    first = running(runs, "onward", cmdline="count=200")
    first.wait_text("onward: tick 5")
    second = there(runs, "onward", first)
    pages, there_pages = (np.frombuffer(run.memory, dtype=np.uint64).reshape(-1, 512) for run in (first, second))
    first.moving.punched = collections.deque()
    log.start(first.moving.address, first.moving.pages * 4096)
    there_pages[:] = pages
    for _ in range(3):
        said = first.text.count("tick")
        first.wait(lambda said=said: first.text.count("tick") > said, "tick")
        written = log.take()
        assert 0 < np.count_nonzero(written) < len(pages) // 2
        there_pages[written] = pages[written]
        second.moving.take(first.moving.give(early=True))
    first.moving.freeze()
    state = first.moving.give()
    written = log.take()
    there_pages[written] = pages[written]
    assert (there_pages == pages).all()
    second.moving.take(state)
    second.start()
    assert second.wait_end() == harness.EXPECTED_POWEROFF
    assert second.failures() == [] and "onward: tick 200" in second.text


def test_a_frozen_guest_does_nothing_and_goes_on(runs: list[GuestRun], log: WriteLog) -> None:
    first = running(runs, "onward", cmdline="count=40")
    first.wait_text("onward: tick 5")
    first.moving.freeze()
    first.moving.freeze()
    log.start(first.moving.address, first.moving.pages * 4096)
    first.machine.notify(harness.CONSOLE_PORT)
    said, end = first.text, time.monotonic() + 0.1
    while time.monotonic() < end:  # ten of the guest's timers are due meanwhile
        assert first.text == said and not log.take().any()
    first.moving.thaw()
    first.moving.thaw()
    assert first.wait_end() == harness.EXPECTED_POWEROFF
    assert first.failures() == []


def blocks_of(run: GuestRun) -> set[int]:
    return set(run.machine.engine.ahead.known()[0])


@pytest.fixture
def marks() -> Iterator[int]:
    fd = os.memfd_create("marks")
    yield fd
    os.close(fd)


def test_code_is_translated_before_the_guest_arrives(runs: list[GuestRun], marks: int) -> None:
    first = running(runs, "onward", cmdline="count=40")
    if first.machine.engine.ahead is None:
        pytest.skip("the engine is on its public path")
    first.wait_text("onward: tick 10")
    second = there(runs, "onward", first)
    second.memory[:] = first.memory[:]
    early = first.moving.give(early=True)
    known = blocks_of(first)
    assert len(known) > 100 and not known & blocks_of(second)
    os.pwrite(marks, b"\1" * first.moving.pages, 0)
    second.moving.take(early, marks)
    ready = blocks_of(second)
    assert len(ready & known) > 0.9 * len(known)
    assert os.pread(marks, first.moving.pages, 0) == bytes(first.moving.pages)
    # The rest of memory comes; a page of code was written once more.
    first.moving.freeze()
    second.memory[:] = first.memory[:]
    page = min(ready) >> 12
    frame = second.machine.domain.kernel_view(first.machine.domain.vcpus[0]).translate(page << 12) >> 12
    os.pwrite(marks, b"\1", frame)
    in_page = {block for block in ready if block >> 12 == page}
    assert in_page and in_page != ready
    second.moving.take(first.moving.give(), marks)
    assert not blocks_of(second) & in_page and len(blocks_of(second) & ready) > 0.8 * len(ready - in_page)
    second.start()
    assert second.wait_end() == harness.EXPECTED_POWEROFF
    assert second.failures() == []


def test_without_the_last_marks_nothing_translated_ahead_stays(runs: list[GuestRun], marks: int) -> None:
    first = running(runs, "onward", cmdline="count=30")
    if first.machine.engine.ahead is None:
        pytest.skip("the engine is on its public path")
    first.wait_text("onward: tick 5")
    second = there(runs, "onward", first)
    second.memory[:] = first.memory[:]
    second.moving.take(first.moving.give(early=True), marks)
    ready = blocks_of(second) & blocks_of(first)
    assert ready
    arrive(first, second)
    assert second.wait_end() == harness.EXPECTED_POWEROFF and second.failures() == []


def test_only_what_the_guest_could_run_is_translated(runs: list[GuestRun]) -> None:
    first = running(runs, "onward", cmdline="count=40")
    if first.machine.engine.ahead is None:
        pytest.skip("the engine is on its public path")
    first.wait_text("onward: tick 5")
    second = there(runs, "onward", first)
    first.moving.freeze()
    second.memory[:] = first.memory[:]
    known, mode = first.machine.engine.ahead.known()

    def offer(addresses: list[int]) -> int:
        domain = second.machine.domain
        return second.moving.call(lambda: HotCode(domain).translate(array.array("Q", addresses), mode, 5.0))

    assert offer(list(known)) == 0, "no frame table has come: there are no roots"
    second.moving.take(first.moving.give(early=True))
    stack = first.machine.engine.regs.gpr[4] & ~0xFFF
    nonsense = [0, 1 << 47, (1 << 64) - 1, 0xFFFF_8000_0000_0000, stack, 0xDEAD_0000_0000]
    assert offer(nonsense) == 0
    assert 0 < offer(list(known)) <= len(known)


def test_system_time_goes_on_by_what_passed(runs: list[GuestRun], monkeypatch: pytest.MonkeyPatch) -> None:
    def shift(apart_ns: int) -> int:
        first = running(runs, "idle")
        second = there(runs, "idle", first)
        first.moving.freeze()
        second.memory[:] = first.memory[:]
        before = first.machine.domain.clock.now()
        state = first.moving.give()
        real = time.time_ns
        with monkeypatch.context() as patch:
            patch.setattr(moving.time, "time_ns", lambda: real() + apart_ns)
            second.moving.take(state)
        return second.machine.domain.clock.now() - before

    second = 1_000_000_000
    assert 3 * second <= shift(3 * second) < 5 * second
    for unlikely in (-3 * second, 3600 * second):  # clocks that are not of one mind are not believed
        assert 0 <= shift(unlikely) < 2 * second


def test_what_cannot_be_moved(runs: list[GuestRun]) -> None:
    first = running(runs, "idle")
    with pytest.raises(WrongState, match="not frozen"):
        first.moving.give()
    second = there(runs, "idle", first)
    with pytest.raises(WrongState, match="not frozen"):
        second.moving.give(early=True)
    first.moving.freeze()
    with pytest.raises(WrongState, match="has a guest"):
        first.moving.take(first.moving.give())
    first.moving.thaw()
    first.machine.stop()
    first.wait_end()
    with pytest.raises(WrongState, match="ended"):
        first.moving.give(early=True)


Change = Callable[[dict[str, Any]], object]


def changed(state: bytes, change: Change) -> bytes:
    """The state with another JSON part."""
    magic, version, flags, size, packed = _HEADER.unpack_from(state)
    said = json.loads(state[_HEADER.size : _HEADER.size + size])
    change(said)
    text = json.dumps(said).encode()
    return _HEADER.pack(magic, version, flags, len(text), packed) + text + state[_HEADER.size + size :]


def vcpu_state(said: dict[str, Any], at: int, value: int) -> None:
    """Overwrite a 64-bit field of vCPU 0's `VcpuState`."""
    vcpu = said["state"]["vcpus"][0]
    raw = bytearray(base64.b64decode(vcpu["state"]))
    struct.pack_into("<Q", raw, 8 * at, value)
    vcpu["state"] = base64.b64encode(raw).decode()


BAD: list[tuple[Change, str]] = [
    (lambda s: s["state"].update(version=2), "version 2"),
    (lambda s: s["state"].update(engine="other"), "engine other"),
    (lambda s: s["state"]["config"].update(domid=9), "domid 9"),
    (lambda s: s["state"].pop("clock"), "clock"),
    (lambda s: s["state"].update(vm_assist="1"), "vm_assist"),
    (lambda s: s["state"].update(limit=-1), "out of range"),
    (lambda s: s["state"]["clock"].update(now="now"), "clock|concatenate|int"),
    (lambda s: s.update(boot={}), "another guest"),
    (lambda s: s.update(wall_ns=None), "times"),
    (lambda s: s["state"]["vcpus"][0].update(id=1), "in the place of 0"),
    (lambda s: s["state"]["vcpus"][0].update(gdt_frames=[1 << 40]), "frames"),
    (lambda s: s["state"]["vcpus"][0].update(runstate=4), "runstate"),
    (lambda s: s["state"]["vcpus"][0].update(up="yes"), "neither up nor down"),
    (lambda s: s["state"]["vcpus"][0].update(runstate_area=1 << 60), "addresses"),
    (lambda s: s["state"]["vcpus"][0].update(cpu="AAAA"), "another build"),
    (lambda s: vcpu_state(s, 6, 1 << 40), "vcpu_info"),
    (lambda s: vcpu_state(s, 6, 4096 - 8), "crosses"),
    (lambda s: vcpu_state(s, 3, 1 << 60), "page table"),
    (lambda s: vcpu_state(s, 0, 2), "mode"),
]


@pytest.mark.parametrize(("change", "why"), BAD, ids=[why for _, why in BAD])
def test_a_state_that_makes_no_sense_is_refused(runs: list[GuestRun], change: Change, why: str) -> None:
    first = running(runs, "idle")
    second = there(runs, "idle", first)
    first.moving.freeze()
    second.memory[:] = first.memory[:]
    with pytest.raises(MigrationFailed, match=why):
        second.moving.take(changed(first.moving.give(), change))
    assert second.moving.incoming


def test_memory_that_does_not_belong_to_the_state_is_noticed(runs: list[GuestRun]) -> None:
    first = running(runs, "idle")
    second = there(runs, "idle", first)
    first.moving.freeze()
    second.memory[:] = first.memory[:]
    second.moving.take(first.moving.give(early=True))
    domain = first.machine.domain
    root = domain.vcpus[0].state.kernel_cr3 - domain.memory.base_mpa
    second.memory[root + 8 : root + 16] = struct.pack("<Q", (harness.BASE_MFN + 5) << 12 | 7)
    with pytest.raises(MigrationFailed, match="do not belong together"):
        second.moving.take(first.moving.give())


def test_what_the_library_trusts_in_the_registers_is_not_taken_over(runs: list[GuestRun]) -> None:
    first = running(runs, "idle")
    if first.machine.engine.layout is None:
        pytest.skip("the engine is on its public path")
    layout, regs = first.machine.engine.layout, first.machine.engine.regs
    first.moving.freeze()
    honest = bytearray(regs.save())
    assert regs.checked(bytes(honest)) == bytes(honest)
    lying = bytearray(honest)
    lying[layout.env_breakpoints : layout.env_breakpoints + 32] = b"\x41" * 32
    struct.pack_into("<I", lying, layout.env_fpstt, 0xDEADBEEF)
    struct.pack_into("<I", lying, layout.env_hflags, struct.unpack_from("<I", lying, layout.env_hflags)[0] | 1 << 20)
    found = regs.checked(bytes(lying))
    assert found[layout.env_breakpoints : layout.env_breakpoints + 32] == bytes(32)
    assert struct.unpack_from("<I", found, layout.env_fpstt)[0] < 8
    assert found[layout.env_hflags : layout.env_hflags + 4] == honest[layout.env_hflags : layout.env_hflags + 4]
    struct.pack_into("<I", lying, layout.env_hflags, struct.unpack_from("<I", lying, layout.env_hflags)[0] & ~3)
    with pytest.raises(ValueError, match="privilege level 0"):
        regs.checked(bytes(lying))


@pytest.fixture(scope="module")
def one_state() -> Iterator[tuple[bytes, MovingState]]:
    """A whole state, and a machine that may be offered anything."""
    guests = [GuestRun("idle")]
    guests.append(GuestRun("idle", arriving=guests[0]))
    guests[0].moving.freeze()
    guests[1].memory[:] = guests[0].memory[:]
    target = guests[1].moving
    target.thaw = lambda: None  # it takes one state after the other
    yield guests[0].moving.give(), target
    del target.thaw
    for guest in guests:
        guest.close()


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_states_give_one_error(one_state: tuple[bytes, MovingState], data: st.DataObject) -> None:
    state, target = one_state
    damaged = bytearray(state)
    if data.draw(st.booleans(), label="cut"):
        damaged = damaged[: data.draw(st.integers(0, len(state) - 1))]
    else:
        # The frame table's own bytes may be any: only its counts are compared with the memory.
        at = data.draw(st.integers(0, len(state) - 1))
        damaged[at] ^= 1 << data.draw(st.integers(0, 7))
    try:
        target.take(bytes(damaged))
    except ToolstackError as exc:
        assert isinstance(exc, MigrationFailed) and "\n" not in exc.message
    else:
        # A bit of a number that may be anything (a register, a time): then it is a state, too.
        target.incoming = True
