"""What host process and domain processes have agreed on about peer links, and how a guest is slowed down."""

from __future__ import annotations

import time
from collections.abc import Callable

SLOTS = 4096
"""Frames of one domain that one neighbour can have mapped at a time, of each kind."""


class Purse:
    """Lets its owner do something `at_once` times, then `per_second` times a second, by making it wait."""

    def __init__(
        self,
        per_second: float,
        at_once: float,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._per_second = per_second
        self._most = float(at_once)
        self._left = float(at_once)
        self._clock = clock
        self._sleep = sleep
        self._seen = clock()

    def spend(self) -> None:
        now = self._clock()
        self._left = min(self._most, self._left + (now - self._seen) * self._per_second)
        self._seen = now
        if self._left < 1:
            self._sleep(1 / self._per_second)
        self._left = max(0.0, self._left - 1)
