"""A domain saved while its guest runs, and restored on another machine: the guest notices nothing."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from typing import Any

import harness
import pytest
from harness import GuestRun, running

pytestmark = pytest.mark.skipif(harness.build.available() is not None, reason=str(harness.build.available()))
MARK = struct.pack("<2Q", 0x7A7A75667A7A7566, 0x21646C726F77206F)
BATCHES = 16 + 24
"""Offset in the box of fuzz32.c."""


@pytest.fixture
def runs() -> Iterator[list[GuestRun]]:
    yield from harness.guest_runs()


Saved = tuple[dict[str, Any], bytes, Any]


def save(guest: GuestRun) -> Saved:
    """Its state and its memory, taken between two instructions; then it is gone."""

    def take() -> tuple[dict[str, Any], bytes]:
        return guest.machine.domain.save(), bytes(guest.memory)

    state, memory = guest.call(take)
    guest.close()
    return json.loads(json.dumps(state)), memory, guest.boot


@pytest.mark.parametrize("public", [False, True], ids=["direct", "public"])
def test_a_guest_goes_on_in_another_machine(runs: list[GuestRun], public: bool) -> None:
    first = running(runs, "onward", public=public, cmdline="count=40")
    first.wait_text("onward: tick 10")
    second = running(runs, "onward", public=public, resumed=save(first))
    assert second.wait_end() == harness.EXPECTED_POWEROFF
    assert second.failures() == [] and first.failures() == []
    assert "onward: tick 40" in second.text and "onward: tick 5\n" not in second.text
    assert "passed, 0 failed" in second.text
    assert second.machine.domain.recount() == []


def test_it_can_be_saved_again_and_again(runs: list[GuestRun]) -> None:
    guest = running(runs, "onward", cmdline="count=60")
    guest.wait_text("onward: tick 5")
    for tick in (20, 35, 50):
        guest = running(runs, "onward", resumed=save(guest))
        guest.wait_text(f"onward: tick {tick}")
    assert guest.wait_end() == harness.EXPECTED_POWEROFF
    assert guest.failures() == []


def test_several_vcpus_and_what_they_do(runs: list[GuestRun]) -> None:
    first = running(runs, "channels", vcpus=2)
    first.wait(lambda: first.text.count("PASS") > 5, "tests")
    second = running(runs, "channels", vcpus=2, resumed=save(first))
    second.wait_end()
    assert second.failures() == [] and first.failures() == [], second.text
    assert "0 failed" in second.text


def test_a_32_bit_guest_goes_on(runs: list[GuestRun]) -> None:
    first = running(runs, "fuzz32")
    at = first.memory.find(MARK)

    def batches(guest: GuestRun) -> int:
        return int(struct.unpack_from("<Q", guest.memory, at + BATCHES)[0])

    first.wait_stats(lambda _stats: batches(first) > 20, "batches")
    saved = save(first)
    (done,) = struct.unpack_from("<Q", saved[1], at + BATCHES)
    second = running(runs, "fuzz32", resumed=saved)
    second.wait_stats(lambda _stats: batches(second) > done + 20, "batches")
    assert second.call(second.machine.domain.recount) == []


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda s: s.update(version=2), "version 2"),
        (lambda s: s.update(engine="other"), "engine other"),
        (lambda s: s["config"].update(base_mfn=1), "base_mfn 1"),
        (lambda s: s["config"].update(cpu_policy={}), "cpu policy"),
        (lambda s: s["vcpus"].clear(), "other vCPUs"),
        (lambda s: s["vcpus"][0].update(cpu=None), "no registers"),
        (lambda s: s.update(area=1 << 30), "frames taken"),
        (lambda s: s.update(watchdogs=[1]), "watchdogs"),
        (lambda s: s["frames"].update(ram=100), "frame table"),
    ],
)
def test_a_state_that_does_not_fit_is_refused(runs: list[GuestRun], change: Any, why: str) -> None:
    state, memory, boot = save(running(runs, "idle"))
    change(state)
    with pytest.raises(ValueError, match=why):
        GuestRun("idle", resumed=(state, memory, boot))


def test_memory_that_does_not_belong_to_the_state_is_noticed(runs: list[GuestRun]) -> None:
    guest = running(runs, "idle")
    state, memory, boot = save(guest)
    changed = bytearray(memory)
    domain = guest.machine.domain
    root = domain.vcpus[0].state.kernel_cr3 - domain.memory.base_mpa
    changed[root + 8 : root + 16] = struct.pack("<Q", (harness.BASE_MFN + 5) << 12 | 7)
    with pytest.raises(ValueError, match="do not belong together"):
        GuestRun("idle", resumed=(state, bytes(changed), boot))
