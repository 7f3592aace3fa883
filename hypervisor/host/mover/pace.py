"""A bandwidth limit: how long to wait before more may be sent."""

from __future__ import annotations

import time
from collections.abc import Callable

BURST_S = 0.05
"""What may be sent at once after a pause, in seconds of the limit."""


class Pace:
    """:param rate: bytes a second; 0: no limit. :param clock: seconds, monotonic."""

    def __init__(self, rate: int = 0, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._debt = 0.0
        self._at = clock()
        self.rate = rate

    def set(self, rate: int) -> None:
        self.wait()
        self.rate = rate
        self._debt = 0.0

    def sent(self, count: int) -> None:
        self._debt += count

    def wait(self) -> float:
        """Seconds until the next byte may go; 0: now."""
        now = self._clock()
        passed, self._at = now - self._at, now
        if not self.rate:
            self._debt = 0.0
            return 0.0
        self._debt = max(-self.rate * BURST_S, self._debt - passed * self.rate)
        return max(0.0, self._debt / self.rate)
