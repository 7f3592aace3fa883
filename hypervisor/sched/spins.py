"""Which vCPU gives way when it spins (`pause`) while others wait for the engine.

A lock holder or an answering CPU can do nothing meanwhile, so a spinner gives way at once. But Linux's locks sleep
(SCHEDOP_poll) after 2^15 fruitless rounds, and each round must not cost a turn: one that has given way `PATIENCE` times
spins unwatched for `SPIN_NS` in its next turn, long enough for those rounds.
"""

from __future__ import annotations

PATIENCE = 3
SPIN_NS = 1_000_000


class Spins:
    """Times are system time in nanoseconds. Nothing of it needs to be saved: it forgets by itself.

    :param count: number of vCPUs.
    """

    __slots__ = ("_given", "_until")

    def __init__(self, count: int) -> None:
        self._given = [0] * count
        self._until = [0] * count  # -1: its next turn begins unwatched

    def gave_way(self, number: int) -> None:
        """It spun and gave way."""
        self._given[number] += 1
        if self._given[number] >= PATIENCE:
            self._given[number], self._until[number] = 0, -1

    def unwatched_until(self, number: int, now: int) -> int:
        """Until when the vCPU that has the engine may spin, 0: it gives way at its next `pause`."""
        until = self._until[number]
        if until < 0:
            until = self._until[number] = now + SPIN_NS
        return until if now < until else 0
