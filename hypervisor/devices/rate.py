"""How fast a guest may make the host work."""

from __future__ import annotations

from collections.abc import Callable


class Bucket:
    """A token bucket. Taking is always possible, into debt; `delay` says when the debt is paid.

    :param rate: tokens that come back in a second.
    :param burst: tokens in the full bucket.
    :param clock: seconds, monotonic.
    """

    __slots__ = ("_burst", "_clock", "_level", "_rate", "_seen")

    def __init__(self, rate: float, burst: float, clock: Callable[[], float]) -> None:
        self._rate = rate
        self._burst = burst
        self._clock = clock
        self._level = burst
        self._seen = clock()

    def take(self, amount: float = 1.0) -> None:
        self._refill()
        self._level -= amount

    def delay(self) -> float:
        """Seconds until the debt is paid; 0.0 when there is none."""
        self._refill()
        return max(0.0, -self._level / self._rate)

    def _refill(self) -> None:
        now = self._clock()
        self._level = min(self._burst, self._level + max(0.0, now - self._seen) * self._rate)
        self._seen = now
