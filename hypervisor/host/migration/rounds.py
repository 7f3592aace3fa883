"""How long to go on copying: until what is left takes no longer than the guest may stand still. Pure."""

from __future__ import annotations

import dataclasses
import enum

from hypervisor.toolstack.api import MigrationOptions
from hypervisor.types import PAGE_SIZE

SETTLING_MS = 6.0
"""What a switch takes besides its pages: devices, the machine's state, two hosts' records. Measured by
``bench/migration.py``."""
GOOD_ROUND = 0.7
"""A round that leaves more than this share of what the one before left has brought nothing."""
PATIENCE = 2
"""So many rounds that brought nothing, before something is done about it."""
CAPS = (60, 40, 25, 15, 10)
"""Per cent of one CPU, one after the other."""


class Verdict(enum.Enum):
    GO_ON = "go on"
    SLOWER = "slower"  # let the guest have less of its CPU, and go on
    SWITCH = "switch"


@dataclasses.dataclass(slots=True)
class Rounds:
    """:ivar cap: of the guest's CPU, per cent of one; 0: none of ours.

    :ivar estimate_ms: of the downtime, if it were now.
    """

    options: MigrationOptions
    cap: int = 0
    estimate_ms: float = 0.0
    _done: int = 0
    _left: int | None = None
    _in_vain: int = 0

    def after(self, seconds: float, pages: int, carried: int, left: int) -> Verdict:
        """:param seconds: the round took. :param pages: that went over, `carried` bytes they took on the network.

        :param left: pages that the guest has written meanwhile.
        """
        self._done += 1
        self.estimate_ms = self._estimate(seconds, pages, left)
        improved = self._left is None or left < self._left * GOOD_ROUND
        self._left = left
        self._in_vain = 0 if improved else self._in_vain + 1
        if self._done >= self.options.max_rounds:
            return Verdict.SWITCH
        if self.estimate_ms <= self.options.downtime_ms:
            # One more is cheap as long as it brings something, and what it brings need not be waited for.
            return Verdict.GO_ON if improved and self._done > 1 and left * PAGE_SIZE > _LITTLE else Verdict.SWITCH
        if self._in_vain < PATIENCE or not self.options.throttle:
            return Verdict.GO_ON
        lower = [cap for cap in CAPS if not self.cap or cap < self.cap]
        if not lower:
            return Verdict.GO_ON
        self.cap, self._in_vain = lower[0], 0
        return Verdict.SLOWER

    def _estimate(self, seconds: float, pages: int, left: int) -> float:
        if not left:
            return SETTLING_MS
        if pages < _MEANINGFUL or seconds <= 0:
            return SETTLING_MS + left * _PAGE_MS
        return SETTLING_MS + left * seconds * 1000 / pages


_LITTLE = 1 << 20
_MEANINGFUL = 64
_PAGE_MS = 0.01
"""Of one page, where too few went over to say."""
