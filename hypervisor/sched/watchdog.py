"""A guest's watchdogs: it is shut down unless it sets them anew in time (xen/common/sched/core.c)."""

from __future__ import annotations

from typing import Any

from hypervisor.abi import errno
from hypervisor.errors import XenError

WATCHDOGS = 2
"""Of one domain (NR_DOMAIN_WATCHDOG_TIMERS)."""
_SECOND_NS = 1_000_000_000


class Watchdogs:
    """The timers of one domain. Times are system time in nanoseconds."""

    __slots__ = ("_deadlines",)

    def __init__(self) -> None:
        self._deadlines: list[int | None] = [None] * WATCHDOGS

    def set(self, number: int, timeout: int, now: int) -> int:
        """SCHEDOP_watchdog.

        :param number: 0: one that is not in use, whose number 1..`WATCHDOGS` is the result; else that one, result 0.
        :param timeout: seconds from `now`; 0 stops a watchdog in use, which is then not in use any more.
        :raises XenError: ENOSPC all are in use, EINVAL there is no such one in use.
        """
        deadline = now + timeout * _SECOND_NS
        if number == 0:
            if None not in self._deadlines:
                raise XenError(errno.ENOSPC, "all watchdogs are in use")
            number = self._deadlines.index(None) + 1
            self._deadlines[number - 1] = deadline
            return number
        if number > WATCHDOGS or self._deadlines[number - 1] is None:
            raise XenError(errno.EINVAL, f"watchdog {number} is not in use")
        self._deadlines[number - 1] = deadline if timeout else None
        return 0

    @property
    def next(self) -> int:
        """When the next one is over; 0: none is in use."""
        return min((max(1, deadline) for deadline in self._deadlines if deadline is not None), default=0)

    def over(self, now: int) -> bool:
        return 0 < self.next <= now

    # -- save and restore

    def save(self) -> list[int | None]:
        return list(self._deadlines)

    def restore(self, data: list[Any]) -> None:
        """:raises ValueError: that is no state of watchdogs."""
        if len(data) != WATCHDOGS or any(not (d is None or (isinstance(d, int) and 0 <= d < 1 << 64)) for d in data):
            raise ValueError(f"watchdogs: {data!r}")
        self._deadlines = list(data)
