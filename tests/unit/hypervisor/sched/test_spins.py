"""Who spins gives way, but not for ever."""

from __future__ import annotations

from hypervisor.sched.spins import PATIENCE, SPIN_NS, Spins


def test_a_spinner_gives_way_until_its_patience_ends() -> None:
    spins = Spins(2)
    for _ in range(PATIENCE):
        assert spins.unwatched_until(1, 100) == 0
        spins.gave_way(1)
    assert spins.unwatched_until(1, 200) == 200 + SPIN_NS
    assert spins.unwatched_until(1, 200 + SPIN_NS - 1) == 200 + SPIN_NS
    assert spins.unwatched_until(1, 200 + SPIN_NS) == 0
    assert spins.unwatched_until(0, 200) == 0, "another vCPU is not concerned"


def test_the_count_begins_anew_after_it() -> None:
    spins = Spins(1)
    for _ in range(PATIENCE):
        spins.gave_way(0)
    spins.unwatched_until(0, 5)
    spins.gave_way(0)
    assert spins.unwatched_until(0, 5 + SPIN_NS) == 0
