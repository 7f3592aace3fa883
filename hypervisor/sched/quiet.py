"""Notices that a domain does little, so that what made it fast can be given back.

Translated code of a booted Linux takes 40 MB and more; a domain that idles
needs almost none of it. Translating anew what it still runs costs it some ten
milliseconds, so that is only done when much was translated since.
"""

from __future__ import annotations

from collections.abc import Callable

WINDOW_NS = 10_000_000_000
"""Over which time "little" is judged."""
LITTLE = 0.03
"""Of one CPU."""
MUCH_NS = 1_000_000_000
"""CPU time since the last time, from which it is worth while."""
FIRST_NS = 50_000_000
"""The same for the first time: a domain that began from a template has done little, but all of it for its beginning."""


class QuietDomain:
    """:param release: gives the memory back."""

    __slots__ = ("_cpu_ns", "_release", "_released_at_cpu_ns", "_since")

    def __init__(self, release: Callable[[], None]) -> None:
        self._release = release
        self._since = 0
        self._cpu_ns = 0
        self._released_at_cpu_ns = FIRST_NS - MUCH_NS

    def look(self, now: int, cpu_ns: int) -> None:
        """The domain goes idle at `now` (ns) with `cpu_ns` of CPU time used in all."""
        if not self._since:
            self._since, self._cpu_ns = now, cpu_ns
        window = now - self._since
        if window < WINDOW_NS:
            return
        used = cpu_ns - self._cpu_ns
        self._since, self._cpu_ns = now, cpu_ns
        if used < window * LITTLE and cpu_ns - self._released_at_cpu_ns > MUCH_NS:
            self._released_at_cpu_ns = cpu_ns
            self._release()
