"""How much of a disk a guest may use: bytes and requests a second, with a burst."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from hypervisor.devices.rate import Bucket

_SHORTEST = 1e-6
"""Seconds: what is less is rounding, and no timer waits for that."""


class Throttle:
    """Two token buckets. A request is always done whole; the ring is left alone until the debt is paid.

    :param limits: JSON form of `hypervisor.toolstack.devices.Limits`.
    """

    def __init__(self, limits: Mapping[str, Any], clock: Callable[[], float] = time.monotonic) -> None:
        burst = float(limits.get("burst_seconds", 1.0))
        self._bytes = self._bucket(int(limits.get("bytes_per_second", 0)), burst, clock)
        self._requests = self._bucket(int(limits.get("iops", 0)), burst, clock)

    @staticmethod
    def _bucket(rate: int, burst: float, clock: Callable[[], float]) -> Bucket | None:
        # While tokens come in at the rate and go out at twice of it, rate x burst of them last for `burst` seconds.
        return Bucket(rate, rate * burst, clock) if rate > 0 else None

    @property
    def limited(self) -> bool:
        return self._bytes is not None or self._requests is not None

    def take(self, size: int) -> None:
        """A request of so many bytes is done."""
        if self._bytes is not None:
            self._bytes.take(size)
        if self._requests is not None:
            self._requests.take()

    def delay(self) -> float:
        """Seconds until the next request may be looked at."""
        delay = max((bucket.delay() for bucket in (self._bytes, self._requests) if bucket is not None), default=0.0)
        return delay if delay >= _SHORTEST else 0.0
