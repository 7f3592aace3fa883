from __future__ import annotations

import pytest

from hypervisor.sched.cap import PERIOD_NS, SLICE_NS, Cap

MS = 1_000_000


def run(cap: Cap, until: int, step: int = MS) -> int:
    """A guest that always wants to run, on a clock of steps; how long it ran."""
    now = ran = 0
    while now < until:
        wait = cap.wait_until(now)
        if wait:
            assert wait > now
            now = wait
            continue
        end = cap.run_until(now)
        length = min(step, end - now) if end else step
        cap.ran(length)
        now += length
        ran += length
    return ran


@pytest.mark.parametrize("percent", [1, 10, 25, 50, 99])
def test_a_share_of_the_time(percent: int) -> None:
    cap = Cap()
    cap.set(percent, 0)
    total = 10_000 * MS
    assert run(cap, total) / total == pytest.approx(percent / 100, rel=0.02)


@pytest.mark.parametrize("percent", [0, 100, 3200])
def test_no_cap(percent: int) -> None:
    cap = Cap()
    cap.set(percent, 0)
    assert run(cap, 1000 * MS) == 1000 * MS
    assert cap.run_until(5) == 0


def test_an_idle_domain_catches_up_within_a_period_and_no_more() -> None:
    cap = Cap()
    cap.set(50, 0)
    assert cap.wait_until(3600 * 1000 * MS) == 0
    assert cap.run_until(0) == PERIOD_NS // 2


def test_who_overran_waits_for_it_and_for_a_slice() -> None:
    cap = Cap()
    cap.set(50, 0)
    cap.ran(SLICE_NS)  # twice of what it had
    wait = cap.wait_until(0)
    assert wait == 2 * SLICE_NS
    assert cap.wait_until(wait - 1) == wait
    assert cap.wait_until(wait) == 0


def test_save_and_restore() -> None:
    cap = Cap()
    cap.set(30, 0)
    again = Cap.restore(cap.save(), 7)
    assert again.percent == 30 and again.wait_until(7) == 0
