"""Where a guest's downtime goes."""

from __future__ import annotations

import time


class Steps:
    """Milliseconds by name of step, in order; what runs side by side is counted in the step that waits for it."""

    def __init__(self) -> None:
        self.times: dict[str, float] = {}
        self.started = self._last = time.monotonic()

    def done(self, name: str) -> None:
        now = time.monotonic()
        self.times[name] = self.times.get(name, 0.0) + round((now - self._last) * 1000, 3)
        self._last = now

    @property
    def total_ms(self) -> float:
        return round((time.monotonic() - self.started) * 1000, 3)
