"""The alarm that interrupts the engine: a POSIX timer that calls C, here a function of this test."""

from __future__ import annotations

import collections
import ctypes
import gc
import threading
import time
import weakref
from collections.abc import Iterator

import pytest

from hypervisor.sched import alarm as alarm_module
from hypervisor.sched.alarm import Alarm

DEADLINE = 30.0
LONG = 3_600_000_000_000


class Target:
    """Counts the calls; waits for one more without sleeping."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.calls: list[int] = []
        self.callback = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(self._called)

    def _called(self, _argument: int | None) -> None:
        with self.changed:
            self.calls.append(time.monotonic_ns())
            self.changed.notify_all()

    @property
    def pair(self) -> tuple[int, int, object]:
        return ctypes.cast(self.callback, ctypes.c_void_p).value or 0, 0, self.callback

    def wait(self, count: int) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: len(self.calls) >= count, DEADLINE), self.calls


@pytest.fixture
def target() -> Target:
    return Target()


@pytest.fixture
def alarm(target: Target) -> Iterator[Alarm]:
    made = Alarm(target.pair)
    yield made
    made.close()


def test_it_fires_at_its_deadline_and_goes_on(target: Target, alarm: Alarm) -> None:
    """A stop that falls between two runs of the engine is lost; the next one comes a millisecond later."""
    deadline = time.monotonic_ns() + 3_000_000
    alarm.set(deadline)
    target.wait(4)
    assert min(target.calls) >= deadline


def test_a_deadline_in_the_past_fires_at_once(target: Target, alarm: Alarm) -> None:
    alarm.set(1)
    target.wait(1)


def test_now_overrides_a_later_deadline_and_set_overrides_now(target: Target, alarm: Alarm) -> None:
    later = time.monotonic_ns() + LONG
    alarm.set(later)
    assert target.calls == []
    alarm.now()
    target.wait(2)
    alarm.set(later)
    assert alarm.at == later
    settle(target)


def settle(target: Target) -> None:
    """Nothing is to come any more: another timer that is started now fires ten times meanwhile."""
    other = Target()
    beat = Alarm(other.pair)
    beat.now()
    other.wait(5)  # what was under way has arrived
    seen = len(target.calls)
    other.wait(20)
    beat.close()
    assert len(target.calls) <= seen + 1


@pytest.mark.parametrize("how", ["quiet", "zero", "close"])
def test_it_can_be_silenced(target: Target, alarm: Alarm, how: str) -> None:
    alarm.now()
    target.wait(1)
    if how == "quiet":
        alarm.quiet()
    elif how == "zero":
        alarm.set(0)
    else:
        alarm.close()
        alarm.close()
    settle(target)


def test_a_deadline_centuries_ahead_is_no_error(target: Target, alarm: Alarm) -> None:
    alarm.set((1 << 63) - 1 + (1 << 62))
    alarm.set(1)
    target.wait(1)


def test_a_timer_that_cannot_be_made_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hypervisor.sched.alarm._CLOCK_MONOTONIC", 9999)
    with pytest.raises(OSError, match="timer_create"):
        Alarm((0, 0, None))


class Library:
    """Stands for what the C function works on."""


def test_what_the_call_works_on_outlives_the_alarm(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """A call may have begun when the alarm is closed: an engine that had gone by then was a crash of the process."""
    monkeypatch.setattr(alarm_module, "_retired", collections.deque())
    monkeypatch.setattr(alarm_module, "GRACE_S", 0.0)
    library = Library()
    there = weakref.ref(library)
    made = Alarm((*target.pair[:2], library))
    made.now()
    target.wait(1)
    made.close()
    del made, library
    gc.collect()
    assert there() is not None
    Alarm(target.pair).close()
    gc.collect()
    assert there() is None, "the time of grace is over"


def test_a_closed_alarm_stays_silent(target: Target) -> None:
    """Its timer's number may be another one's by now."""
    made = Alarm(target.pair)
    made.close()
    made.now()
    made.set(1)
    made.close()
    assert made.at == 0
