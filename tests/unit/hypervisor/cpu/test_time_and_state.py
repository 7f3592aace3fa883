"""What guests read of time, and what of a vCPU outlives its process."""

from __future__ import annotations

import json
import struct
import time

import pytest
from pv_rig import Rig

from hypervisor import abi
from hypervisor.cpu.state import Vcpu
from hypervisor.cpu.time import REFRESH_NS, RUNSTATE_BLOCKED, RUNSTATE_RUNNING, Clock, account
from hypervisor.engines.tsc import TscScale

TIME = struct.Struct("<I4xQQIbBxx")  # version, tsc_timestamp, system_time, mul, shift, flags


class Tsc:
    """A counter of its own frequency over a clock that the test moves."""

    def __init__(self, khz: int) -> None:
        self.khz = khz
        self.nanoseconds = 5_000_000_000

    def __call__(self) -> int:
        return self.nanoseconds * self.khz // 1_000_000


@pytest.fixture
def rig() -> Rig:
    return Rig()


def record(rig: Rig) -> tuple[int, ...]:
    return TIME.unpack(rig.get(rig.state.vcpu_info + abi.VCPU_INFO_TIME, TIME.size))


@pytest.mark.parametrize("khz", [800_000, 1_000_000, 1_999_999, 2_400_000, 4_500_000])
def test_the_guests_formula_gives_system_time(rig: Rig, khz: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """((tsc - tsc_timestamp) << shift) * mul >> 32, plus system_time (public/xen.h)."""
    tsc = Tsc(khz)
    monkeypatch.setattr(time, "monotonic_ns", lambda: tsc.nanoseconds)
    clock = Clock(TscScale.from_khz(khz), tsc, base=2_000_000_000)
    clock.update_vcpu(rig.memory, rig.domain.running)
    version, stamp, system, mul, shift, flags = record(rig)
    assert version % 2 == 0 and version and flags & 1
    assert system == clock.now() == 3_000_000_000
    for elapsed in (0, 1_000, 10_000_000, 10_000_000_000):
        tsc.nanoseconds = 5_000_000_000 + elapsed
        ticks = tsc() - stamp
        scaled = ticks << shift if shift >= 0 else ticks >> -shift
        guest = system + (scaled * mul >> 32)
        assert abs(guest - clock.now()) <= 2 + elapsed // 1_000_000_000 * 5


def test_vcpus_have_one_pair_and_a_new_one_now_and_then(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    tsc = Tsc(2_000_000)
    monkeypatch.setattr(time, "monotonic_ns", lambda: tsc.nanoseconds)
    clock, vcpu, other = Clock(TscScale.from_khz(tsc.khz), tsc, base=0), rig.domain.running, Vcpu(1)
    assert clock.due(vcpu, clock.now())
    clock.update_vcpu(rig.memory, vcpu)
    first = record(rig)[1:3]
    tsc.nanoseconds += REFRESH_NS - 1
    assert not clock.due(vcpu, clock.now()) and clock.due(other, clock.now())
    clock.update_vcpu(rig.memory, vcpu)
    assert record(rig)[1:3] == first
    tsc.nanoseconds += 1
    assert clock.due(vcpu, clock.now())
    clock.update_vcpu(rig.memory, vcpu)
    assert record(rig)[1:3] == (first[0] + 20_000_000, first[1] + REFRESH_NS)


@pytest.mark.parametrize("bad", [1, 7, 8, 100])
def test_a_pair_torn_by_another_process_is_taken_again(rig: Rig, monkeypatch: pytest.MonkeyPatch, bad: int) -> None:
    """The first `bad` looks at the clock take 5 ms longer than the look at the counter before."""
    tsc, torn = Tsc(2_000_000), [0]

    def monotonic() -> int:
        if torn[0]:
            torn[0] -= 1
            tsc.nanoseconds += 5_000_000
        return tsc.nanoseconds

    monkeypatch.setattr(time, "monotonic_ns", monotonic)
    clock, vcpu = Clock(TscScale.from_khz(tsc.khz), tsc, base=0), rig.domain.running
    clock.update_vcpu(rig.memory, vcpu)
    tsc.nanoseconds += REFRESH_NS
    torn[0] = bad
    assert clock.due(vcpu, tsc.nanoseconds) is (bad < 8), "an old pair is better than a torn one"
    torn[0] = 0
    clock.update_vcpu(rig.memory, vcpu)
    _, stamp, system, *_ = record(rig)
    assert stamp == system * 2


def test_each_update_has_a_new_even_version_and_never_goes_back(rig: Rig) -> None:
    before = (0, 0, 0)
    for _ in range(50):
        rig.domain.clock.update_vcpu(rig.memory, rig.domain.running)
        version, stamp, system, *_ = record(rig)
        assert version % 2 == 0 and (version, stamp, system) > before
        assert version > before[0] and stamp >= before[1] and system >= before[2]
        before = (version, stamp, system)


def test_a_version_left_odd_becomes_even(rig: Rig) -> None:
    at = rig.state.vcpu_info + abi.VCPU_INFO_TIME
    rig.put(at, struct.pack("<I", 0xFFFF_FFFF))
    rig.domain.clock.update_vcpu(rig.memory, rig.domain.running)
    assert record(rig)[0] == 0


def test_the_wall_clock_is_the_time_of_day_at_system_time_zero(rig: Rig) -> None:
    clock, at = rig.domain.clock, rig.domain.area.shared_info * 4096
    for offset in (0, 3_600_000_000_000):
        clock.wall_offset_ns = offset
        clock.update_wallclock(rig.memory, rig.domain.area.shared_info)
        seconds = rig.u32(at + abi.SHARED_INFO_WC_SEC) | rig.u32(at + abi.SHARED_INFO_WC_SEC_HI) << 32
        nanoseconds = rig.u32(at + abi.SHARED_INFO_WC_NSEC)
        assert nanoseconds < 1_000_000_000 and rig.u32(at + abi.SHARED_INFO_WC_VERSION) % 2 == 0
        now = seconds * 1_000_000_000 + nanoseconds + clock.now()
        assert abs(now - time.time_ns() - offset) < 1_000_000_000


def test_runstates_add_up() -> None:
    vcpu = Vcpu(0)
    account(vcpu, 100, RUNSTATE_RUNNING)
    account(vcpu, 130, RUNSTATE_BLOCKED)
    account(vcpu, 150, RUNSTATE_RUNNING)
    account(vcpu, 140, RUNSTATE_BLOCKED)
    assert vcpu.runstate_times == [30, 0, 20, 100] and vcpu.runstate == RUNSTATE_BLOCKED


def full_vcpu() -> Vcpu:
    vcpu = Vcpu(3)
    vcpu.up = vcpu.initialised = vcpu.blocked = True
    vcpu.poll, vcpu.poll_deadline = (1, 2), 99
    vcpu.cpu = bytes(range(256))
    vcpu.debug_registers[7] = 0x455
    vcpu.gdt_frames, vcpu.gdt_entries = [4, 5], 600
    vcpu.ldt_frames, vcpu.ldt_base, vcpu.ldt_entries = [6], 0x7000, 3
    vcpu.periodic_ns, vcpu.periodic_next, vcpu.runstate_area, vcpu.time_area = 10, 20, 30, 40
    vcpu.runstate_times = [1, 2, 3, 4]
    vcpu.virq_ports = {0: 5}
    state = vcpu.state
    state.kernel_mode, state.iopl, state.deadline, state.kernel_cr3 = 1, 3, 1 << 62, 0x2000_0000
    state.trap_address[255], state.trap_flags[255], state.trap_cs[0] = (1 << 64) - 1, 7, 0xE033
    return vcpu


def test_a_vcpu_round_trips_through_json() -> None:
    vcpu = full_vcpu()
    saved = json.loads(json.dumps(vcpu.save()))
    copy = Vcpu.restore(saved)
    assert copy.save() == vcpu.save()
    for name in Vcpu.__slots__:
        if name != "state":
            assert getattr(copy, name) == getattr(vcpu, name), name
    assert bytes(copy.state) == bytes(vcpu.state)
    assert Vcpu.restore(Vcpu(1).save()).save() == Vcpu(1).save()


def test_every_field_of_a_vcpu_is_saved() -> None:
    saved = full_vcpu().save()
    assert set(Vcpu.__slots__) == set(saved)


def test_the_state_of_another_layout_is_refused() -> None:
    saved = Vcpu(0).save()
    saved["state"] = saved["state"][:-8]
    with pytest.raises(ValueError, match="another version"):
        Vcpu.restore(saved)
