"""In which order a domain's vCPUs get its engine: round robin, with a step ahead for those that were woken.

Sees vCPU numbers, the time and whether they can run, nothing else. A woken
vCPU runs next, within `WOKEN_NS`: not at once, for who wakes another one is
often inside a lock that the other wants, or in an interrupt handler (Xen's
credit schedulers have their rate limit of 1 ms for it). After `BOOST_LIMIT`
such steps in a row the round goes on: two vCPUs that wake each other cannot
starve a third. Who was interrupted by them has the rest of its turn left.

A turn is system time, had or not. With CPU time a round of 32 vCPUs takes
seconds on a host that has far more to do than CPUs, and a kernel that calls
its CPUs one by one then believes that one is stuck.
"""

from __future__ import annotations

import collections
from collections.abc import Callable
from typing import Any

SLICE_NS = 3_000_000
"""Time one vCPU may keep the engine while another could run, nanoseconds."""
WOKEN_NS = 1_000_000
"""Time it may still keep it when another one was woken, nanoseconds."""
HOLD_NS = 2_000_000
"""Time it may still keep it when its slice ends inside an interrupt handler or the like, nanoseconds."""
HOLDS = 4
"""In so many parts, each of which may find it out of there."""
BOOST_LIMIT = 4


class VcpuQueue:
    """Times are system time in nanoseconds.

    :param count: number of vCPUs.
    :ivar slice_end: until when the vCPU picked last may run; 0: no end, nobody else could.
    """

    __slots__ = ("_boosted", "_current", "_extensions", "_in_a_row", "_left", "_order", "_turn_end", "slice_end")

    def __init__(self, count: int) -> None:
        self._order = collections.deque(range(count))
        self._boosted: collections.deque[int] = collections.deque()
        self._in_a_row = 0
        self._current: int | None = None
        self._turn_end = 0  # of a vCPU that has its turn; 0: it has a step ahead
        self._left: tuple[int, int] | None = None  # whose turn was interrupted, and what is left of it
        self._extensions = 0
        self.slice_end = 0

    def woken(self, number: int, now: int) -> None:
        """The vCPU had to wait and can run now."""
        if number not in self._boosted:
            self._boosted.append(number)
        soon = now + WOKEN_NS
        if not self.slice_end or soon < self.slice_end:
            self.slice_end = soon

    def yielded(self, number: int) -> None:
        """The vCPU gives way: all others have their turn before it."""
        self._order.remove(number)
        self._order.append(number)
        self._current = None

    def pick(self, now: int, runnable: Callable[[int], bool], *, hold: bool = False) -> int | None:
        """The vCPU to run until `slice_end`, or None when all wait.

        :param hold: the one picked last takes no events now; others may wait for what it holds.
        """
        current, self._current = self._current, None
        if current is not None and runnable(current):
            if now < self.slice_end:
                self._current = current
                return current
            if hold and self.slice_end and self._extensions:
                self._extensions -= 1
                self.slice_end = now + HOLD_NS // HOLDS
                self._current = current
                return current
            if now < self._turn_end:
                self._left = current, self._turn_end - now
                self._order.remove(current)
                self._order.appendleft(current)
        self._current = number = self._next(runnable)
        if number is None:
            return None
        length = SLICE_NS
        if not self._in_a_row:
            if self._left and self._left[0] == number:
                length = self._left[1]
            self._left = None
        self.slice_end = now + length
        self._extensions = HOLDS
        self._turn_end = 0 if self._in_a_row else self.slice_end
        return number

    def _next(self, runnable: Callable[[int], bool]) -> int | None:
        while self._boosted and self._in_a_row < BOOST_LIMIT:
            number = self._boosted.popleft()
            if runnable(number):
                self._in_a_row += 1
                return number
        self._in_a_row = 0
        for _ in range(len(self._order)):
            number = self._order[0]
            self._order.rotate(-1)
            if runnable(number):
                if number in self._boosted:
                    self._boosted.remove(number)
                return number
        return None

    def save(self) -> dict[str, Any]:
        return {"order": list(self._order), "boosted": list(self._boosted), "in_a_row": self._in_a_row}

    @classmethod
    def restore(cls, state: dict[str, Any]) -> VcpuQueue:
        queue = cls(0)
        queue._order = collections.deque(state["order"])
        queue._boosted = collections.deque(state["boosted"])
        queue._in_a_row = state["in_a_row"]
        return queue
