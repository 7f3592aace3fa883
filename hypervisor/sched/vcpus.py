"""In which order a domain's vCPUs get its engine: round robin, with a step ahead for those that were woken.

Sees vCPU numbers and whether they can run, nothing else. A woken vCPU runs
next, so an IPI is answered at once, but after `BOOST_LIMIT` such steps in a
row the round goes on: two vCPUs that wake each other cannot starve a third.
"""

from __future__ import annotations

import collections
from collections.abc import Callable
from typing import Any

SLICE_NS = 3_000_000
"""Time one vCPU may keep the engine while another could run, nanoseconds."""
BOOST_LIMIT = 4


class VcpuQueue:
    """:param count: number of vCPUs."""

    __slots__ = ("_boosted", "_in_a_row", "_order")

    def __init__(self, count: int) -> None:
        self._order = collections.deque(range(count))
        self._boosted: collections.deque[int] = collections.deque()
        self._in_a_row = 0

    def woken(self, number: int) -> None:
        """The vCPU had to wait and can run now."""
        if number not in self._boosted:
            self._boosted.append(number)

    def yielded(self, number: int) -> None:
        """The vCPU gives way: all others have their turn before it."""
        self._order.remove(number)
        self._order.append(number)

    def pick(self, runnable: Callable[[int], bool]) -> int | None:
        """The next vCPU to run, or None when all wait."""
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
