"""Micro-guests on the whole machine, in this process: they run, they end, and they harm nobody but themselves."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator

import harness
import pytest
from harness import GuestRun, running

from hypervisor.memory import layout
from hypervisor.sched.vcpus import SLICE_NS
from hypervisor.toolstack.api import ShutdownReason

pytestmark = pytest.mark.skipif(harness.build.available() is not None, reason=str(harness.build.available()))

ENGINES = pytest.mark.parametrize("public", [False, True], ids=["direct", "public"])

# Cases of traps.c that this engine gets wrong: docs/xen-differences.md tells why.
PUBLIC_ONLY = {
    "FAIL #GP: ss from beyond the GDT",
    "FAIL #PF: write, no table",
    "FAIL #PF: write, not present",
    "FAIL #PF: write to Xen's own area",
    "FAIL user: write to an unmapped page",
    "FAIL #NP: es not present",
    "FAIL #SS: ss not present",
    "FAIL #NP: cs not present",
    "FAIL #GP: a call gate",
    "FAIL #GP: in without IOPL",
    "FAIL #GP: out without IOPL",
    "FAIL #GP: outs without IOPL",
    "FAIL a refused in: rip is the instruction",
    "FAIL a refused in: rax is what it was",
    "FAIL a refused in: the flags are those before it",
    "FAIL user: out at the kernel's IOPL",
}


@pytest.fixture
def runs() -> Iterator[list[GuestRun]]:
    yield from harness.guest_runs()


@ENGINES
def test_hello_talks_to_console_and_xenstore_and_powers_off(runs: list[GuestRun], public: bool) -> None:
    guest = running(runs, "hello", cmdline="greet", public=public)
    guest.wait_text("hello: ready")
    assert "2048 pages" in guest.text and 'cmdline "greet"' in guest.text
    assert "hello: name hello" in guest.text and f"hello: domid {guest.domid}" in guest.text
    guest.type("a line from the host\n")
    guest.wait_text("echo: a line from the host")
    guest.request_shutdown("poweroff")
    assert guest.wait_end() == harness.EXPECTED_POWEROFF
    assert guest.machine.domain.recount() == []


@ENGINES
def test_native_cpuid_shows_the_policy(runs: list[GuestRun], public: bool) -> None:
    guest = running(runs, "cpuid", public=public, cmdline="count=0" if public else "")
    assert guest.wait_end() == harness.EXPECTED_POWEROFF
    assert guest.failures() == [] and "cpuid:" in guest.text, guest.text


def test_a_level_takes_features_and_their_instructions_away(runs: list[GuestRun]) -> None:
    guest = running(runs, "cpuid", cmdline="popcnt=0 count=20000", cpu_policy="x86-64")
    assert guest.wait_end() == harness.EXPECTED_POWEROFF
    assert guest.failures() == [], guest.text
    saved = guest.machine.domain.cpuid.policy.save()
    again = running(runs, "cpuid", cmdline="popcnt=0", cpu_policy=saved)
    assert again.wait_end() == harness.EXPECTED_POWEROFF
    assert again.failures() == [], again.text


@pytest.mark.parametrize(
    ("word", "reason"),
    [("reboot", ShutdownReason.REBOOT), ("crash", ShutdownReason.CRASH), ("halt", ShutdownReason.POWEROFF)],
)
def test_hello_obeys_the_other_words(runs: list[GuestRun], word: str, reason: ShutdownReason) -> None:
    guest = running(runs, "hello")
    guest.wait_text("hello: ready")
    guest.request_shutdown(word)
    assert guest.wait_end().reason is reason


@ENGINES
def test_ticks(runs: list[GuestRun], public: bool) -> None:
    guest = running(runs, "ticks", cmdline="count=5", public=public)
    assert guest.wait_end() == harness.EXPECTED_POWEROFF
    assert guest.failures() == [] and "ticks: OK" in guest.text


@ENGINES
def test_traps(runs: list[GuestRun], public: bool) -> None:
    guest = running(runs, "traps", public=public)
    assert guest.wait_end() == harness.EXPECTED_POWEROFF
    assert set(guest.failures()) == (PUBLIC_ONLY if public else set()), guest.text
    assert guest.machine.domain.recount() == []


@pytest.mark.parametrize("name", ["mmu", "tables", "hypercalls", "memtouch"])
def test_guests_that_judge_for_themselves(runs: list[GuestRun], name: str) -> None:
    guest = running(runs, name)
    assert guest.wait_end() == harness.EXPECTED_POWEROFF
    assert guest.failures() == [] and f"{name}: OK" in guest.text, guest.text[-2000:]
    assert guest.machine.domain.recount() == []


@ENGINES
def test_a_fault_without_a_handler_ends_the_domain(runs: list[GuestRun], public: bool) -> None:
    ended = running(runs, "triple", public=public).wait_end()
    assert ended.reason is ShutdownReason.CRASH
    assert ended.detail.startswith("unhandled exception 6 error 0x0 at rip 0xffffffff8")
    assert "still here" not in runs[0].text


def test_a_trap_without_a_stack_ends_the_domain(runs: list[GuestRun]) -> None:
    ended = running(runs, "stackbomb").wait_end()
    assert ended.reason is ShutdownReason.CRASH
    assert ended.detail.startswith("no stack at 0x5fffffffffc8 for a trap frame at rip 0x")
    assert "still here" not in runs[0].text


def test_a_guest_may_call_itself_crashed(runs: list[GuestRun]) -> None:
    guest = running(runs, "crashme")
    assert guest.wait_end().reason is ShutdownReason.CRASH
    assert "crashme: crashing" in guest.text


def test_hostile_guests_leave_a_neighbour_in_the_same_process_as_it_was(runs: list[GuestRun]) -> None:
    """The neighbour's extent begins where theirs ends; it is alive before, during and after."""
    pages = 1024
    behind = harness.BASE_MFN + layout.total_frames(pages)
    neighbour = running(runs, "hello", base_mfn=behind, domid=8)
    neighbour.wait_text("hello: ready")
    neighbour.machine.pause()
    assert neighbour.call(lambda: neighbour.machine.stats()["paused"])
    memory = neighbour.machine.domain.memory
    before = bytes(memory.bytes)
    for name in ("mmu", "tables", "hypercalls", "traps", "stackbomb", "triple"):
        hostile = running(runs, name, pages=pages, cmdline=f"foreign={behind + 5:#x}")
        hostile.wait_end()
        assert hostile.failures() == []
        if name == "mmu":
            assert "PASS refused: a neighbour's frame" in hostile.text
    assert bytes(memory.bytes) == before
    neighbour.machine.unpause()
    neighbour.type("still there?\n")
    neighbour.wait_text("echo: still there?")


def test_a_guest_that_never_gives_way_can_be_paused_and_stopped(runs: list[GuestRun]) -> None:
    """It spins with events masked; another machine in the process answers all the while."""
    spin = running(runs, "spin")
    spin.wait_text("spin: spinning")
    other = running(runs, "hello", base_mfn=harness.BASE_MFN * 2)
    other.wait_text("hello: ready")
    spin.machine.pause()
    stats = spin.call(spin.machine.stats)
    assert stats["paused"]
    exits, used = stats["exits"], stats["cpu_time_ns"]
    other.type("one\n")
    other.wait_text("echo: one")
    stats = spin.call(spin.machine.stats)
    assert (stats["exits"], stats["cpu_time_ns"]) == (exits, used), "paused, it does not run"
    spin.machine.unpause()
    other.type("two\n")
    other.wait_text("echo: two")
    spin.wait_stats(lambda s: s["cpu_time_ns"] > used, "running again")
    spin.machine.stop()
    assert spin.wait_end().detail == "stopped by the host"
    other.request_shutdown("poweroff")
    assert other.wait_end() == harness.EXPECTED_POWEROFF


@pytest.mark.parametrize("cmdline", ["", "ticking"])
def test_an_idle_guest_costs_nothing(runs: list[GuestRun], cmdline: str) -> None:
    """Between two looks at it, with another guest's work in between, it is entered for the looks at most."""
    idle = running(runs, "idle", cmdline=cmdline)
    idle.wait_text("idle: blocking")
    idle.call(lambda: None)  # behind the console's own event
    while not idle.call(lambda: idle.machine.domain.running.blocked):
        pass
    before = idle.machine.stats()
    ticks = running(runs, "ticks", cmdline="count=10", base_mfn=harness.BASE_MFN * 2)
    ticks.wait_end()
    after = idle.machine.stats()
    assert after["exits"] == before["exits"] and after["cpu_time_ns"] == before["cpu_time_ns"]
    assert idle.machine._alarm.at == 0, "no timer fires for it"


def test_a_guest_that_never_stops_its_tick_costs_nothing_while_nobody_listens(runs: list[GuestRun]) -> None:
    spin = running(runs, "spin")
    spin.wait_text("spin: spinning")
    domain = spin.machine.domain
    assert domain.running.periodic_ns and spin.call(spin.machine._timers.next) == 0


@pytest.mark.parametrize("paused", [False, True])
def test_a_watchdog_that_is_over_ends_the_domain(runs: list[GuestRun], paused: bool) -> None:
    spin = running(runs, "spin")
    spin.wait_text("spin: spinning")
    if paused:
        spin.machine.pause()

    def bite() -> None:
        domain = spin.machine.domain
        domain.watchdogs.set(0, 0, domain.clock.now() + 1_000_000)

    spin.call(bite)
    assert spin.wait_end().reason is ShutdownReason.WATCHDOG


def test_a_guest_s_own_watchdog_ends_it(runs: list[GuestRun]) -> None:
    guest = running(runs, "channels", cmdline="bite")
    assert guest.wait_end().reason is ShutdownReason.WATCHDOG
    assert guest.failures() == [], guest.text[-2000:]
    assert guest.machine.domain.recount() == []


def test_pausing_a_guest_silences_its_alarm(runs: list[GuestRun]) -> None:
    spin = running(runs, "spin")
    spin.wait_text("spin: spinning")
    for _ in range(5):
        spin.machine.pause()
        spin.call(lambda: None)
        spin.call(lambda: None)
        assert spin.machine._alarm.at in (0, -1)
        spin.machine.unpause()
        assert not spin.call(spin.machine.stats)["paused"]
    assert spin.ended is None


@ENGINES
def test_vcpus_that_wait_for_each_other_do_not_wait_out_time_slices(runs: list[GuestRun], public: bool) -> None:
    before = time.process_time_ns()  # not the guest's clock: this machine may have other things to do
    guest = running(runs, "smp", cmdline="count=20" if public else "", vcpus=2, public=public)
    assert guest.wait_end() == harness.EXPECTED_POWEROFF
    assert guest.failures() == [] and "smp: OK" in guest.text, guest.text[-2000:]
    assert guest.machine.domain.recount() == []
    if not public:  # which cannot see `pause`
        handovers = int(re.search(r"(\d+) handovers", guest.text)[1])
        assert guest.machine.stats()["exits"] >= handovers
        assert time.process_time_ns() - before < handovers * SLICE_NS / 2
