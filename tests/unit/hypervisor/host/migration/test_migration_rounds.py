from __future__ import annotations

import os
import random

import pytest

from hypervisor.host.migration import bitmap
from hypervisor.host.migration.rounds import CAPS, SETTLING_MS, Rounds, Verdict
from hypervisor.toolstack.api import MigrationOptions
from hypervisor.types import PAGE_SIZE

MS_PER_PAGE = 0.01


def verdicts(options: MigrationOptions, left: list[int], *, first: int = 65536) -> tuple[Rounds, list[Verdict]]:
    """Rounds that each send what the one before has left, a hundred pages a millisecond."""
    rounds, found, pages = Rounds(options), [], first
    for rest in left:
        found.append(rounds.after(pages * MS_PER_PAGE / 1000, pages, pages * PAGE_SIZE, rest))
        pages = rest
        if found[-1] is Verdict.SWITCH:
            break
    return rounds, found


def test_a_guest_that_is_idle_is_switched_after_one_round() -> None:
    assert verdicts(MigrationOptions(), [5])[1] == [Verdict.SWITCH]


def test_as_long_as_a_round_brings_something_it_goes_on() -> None:
    rounds, found = verdicts(MigrationOptions(downtime_ms=30), [13000, 2600, 500, 100])
    assert found == [Verdict.GO_ON] * 3 + [Verdict.SWITCH]
    assert rounds.estimate_ms == pytest.approx(SETTLING_MS + 1.0)


def test_the_downtime_that_was_asked_for_is_waited_for() -> None:
    _, found = verdicts(MigrationOptions(downtime_ms=10, throttle=False, max_rounds=50), [5000] * 20)
    assert found == [Verdict.GO_ON] * 20
    _, found = verdicts(MigrationOptions(downtime_ms=60, throttle=False), [5000] * 20)
    assert found[-1] is Verdict.SWITCH and len(found) < 4


def test_after_so_many_rounds_it_is_switched_whatever_is_left() -> None:
    _, found = verdicts(MigrationOptions(downtime_ms=1, max_rounds=7, throttle=False), [60000] * 20)
    assert found == [Verdict.GO_ON] * 6 + [Verdict.SWITCH]


def test_a_guest_that_writes_faster_than_it_is_sent_is_slowed_down_more_and_more() -> None:
    rounds, found = verdicts(MigrationOptions(downtime_ms=1, max_rounds=60), [60000] * 40)
    assert found.count(Verdict.SLOWER) == len(CAPS) and rounds.cap == CAPS[-1]
    assert Verdict.SWITCH not in found
    assert found.index(Verdict.SLOWER) >= 2


def test_a_round_of_nothing_says_nothing_of_the_rate() -> None:
    rounds = Rounds(MigrationOptions())
    assert rounds.after(0.0, 0, 0, 0) is Verdict.SWITCH
    assert rounds.estimate_ms == SETTLING_MS
    assert Rounds(MigrationOptions(downtime_ms=1)).after(0.0, 0, 0, 1000) is Verdict.GO_ON


@pytest.mark.parametrize("seed", range(6))
def test_pages_that_hold_something_are_marked(seed: int) -> None:
    chance = random.Random(seed)
    pages = chance.randrange(1, 3000)
    memory = os.memfd_create("memory")
    os.ftruncate(memory, pages * PAGE_SIZE)
    wanted = set()
    for _ in range(chance.randrange(12)):
        start = chance.randrange(pages)
        wanted |= set(range(start, min(pages, start + chance.randrange(1, 70))))
    for page in wanted:
        os.pwrite(memory, b"x", page * PAGE_SIZE + chance.randrange(PAGE_SIZE))
    bits = bitmap.create(pages)
    try:
        assert bitmap.mark_data(bits, memory, pages) == len(wanted)
        content = os.pread(bits, 1 << 20, 0)
        assert len(content) == 2 * ((pages + 7) // 8)
        found = {page for page in range(8 * len(content)) if content[page // 8] >> page % 8 & 1}
        assert found == wanted
    finally:
        os.close(bits)
        os.close(memory)
