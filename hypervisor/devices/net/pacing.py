"""How fast a nic may send or receive: bytes and packets a second (`hypervisor.toolstack.devices.Limits`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from hypervisor.devices.rate import Bucket


class Pace:
    """:param limits: JSON of `Limits`. :param clock: seconds, monotonic.

    A frame is always let through when nothing is owed, whatever its size, so that no limit is below one frame.
    """

    def __init__(self, limits: Mapping[str, Any], clock: Callable[[], float]) -> None:
        seconds = float(limits.get("burst_seconds", 1.0))
        self._bytes = _bucket(limits.get("bytes_per_second", 0), seconds, clock)
        self._packets = _bucket(limits.get("iops", 0), seconds, clock)

    @property
    def limited(self) -> bool:
        return self._bytes is not None or self._packets is not None

    def take(self, size: int) -> None:
        """Note a frame of `size` bytes."""
        if self._bytes is not None:
            self._bytes.take(size)
        if self._packets is not None:
            self._packets.take()

    def delay(self) -> float:
        """Seconds until the next frame may pass."""
        return max((bucket.delay() for bucket in (self._bytes, self._packets) if bucket is not None), default=0.0)


def _bucket(rate: float, seconds: float, clock: Callable[[], float]) -> Bucket | None:
    """None: no limit. What is saved up in `seconds` lets the rate be twice as high for as long."""
    return Bucket(rate, rate * seconds, clock) if rate else None
