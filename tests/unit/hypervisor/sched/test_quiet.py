"""When an idle domain gives its translations back."""

from __future__ import annotations

from hypervisor.sched.quiet import QuietDomain

SECOND = 1_000_000_000


def released(looks: list[tuple[float, float]]) -> list[int]:
    """Indexes of the (time, CPU time) looks, in seconds, at which memory was given back."""
    done: list[int] = []
    quiet = QuietDomain(lambda: done.append(number))
    for number, (now, cpu) in enumerate(looks):  # noqa: B007  read by the lambda
        quiet.look(int(now * SECOND), int(cpu * SECOND))
    return done


def test_once_after_a_busy_start_and_a_quiet_window() -> None:
    assert released([(5, 4.9), (11, 5), (15, 5.0), (22, 5.1), (33, 5.2), (44, 5.3)]) == [2]


def test_not_while_it_works() -> None:
    assert released([(11, 5), (22, 10), (33, 12)]) == []


def test_not_for_a_domain_that_never_did_much() -> None:
    assert released([(11, 0.01), (22, 0.02), (33, 0.03)]) == []


def test_a_short_beginning_counts_once_and_not_before_a_window_has_passed() -> None:
    assert released([(11, 0.2), (12, 0.2), (22, 0.25), (33, 0.3), (44, 0.5)]) == [2]


def test_again_after_it_worked_again() -> None:
    assert released([(11, 5), (22, 5.1), (33, 15), (44, 15.1), (55, 15.2)]) == [1, 3]
