"""The most CPU time a domain gets (sched-credit's ``cap``).

A domain may run for `cap` per cent of each `PERIOD_NS`, on average: what it did not use it may catch up
within one period, and when its time is used up it waits until it has a fair slice of it again.
"""

from __future__ import annotations

PERIOD_NS = 100_000_000
SLICE_NS = 10_000_000
"""Of wall time: how long one that has used up its share waits at least."""


class Cap:
    """Times in nanoseconds of one clock.

    :ivar percent: of one CPU; 0 is no cap, and what is above 100 is none for a domain that runs on one CPU.
    """

    __slots__ = ("_left", "_resume", "_seen", "percent")

    def __init__(self) -> None:
        self.percent = 0
        self._left = 0.0  # nanoseconds it may run
        self._seen = 0
        self._resume = 0

    @property
    def active(self) -> bool:
        return 0 < self.percent < 100

    def set(self, percent: int, now: int) -> None:
        self.percent = percent
        self._left = SLICE_NS * percent / 100
        self._seen, self._resume = now, 0

    def ran(self, duration: int) -> None:
        self._left -= duration

    def wait_until(self, now: int) -> int:
        """0 if it may run now; else when it may again."""
        if not self.active:
            return 0
        share = self.percent / 100
        self._left = min(PERIOD_NS * share, self._left + max(0, now - self._seen) * share)
        self._seen = now
        if self._left <= 0:
            self._resume = now + int((SLICE_NS * share - self._left) / share)
        elif now >= self._resume:
            self._resume = 0
        return self._resume

    def run_until(self, now: int) -> int:
        """When its time is used up if it runs from `now` on; 0: never."""
        return now + max(1, int(self._left)) if self.active else 0

    def save(self) -> dict[str, int]:
        return {"percent": self.percent}

    @classmethod
    def restore(cls, state: dict[str, int], now: int) -> Cap:
        cap = cls()
        cap.set(int(state["percent"]), now)
        return cap
