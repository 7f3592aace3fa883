"""Comparing and mending when somebody asks for it, beside an agent that may be at work just then.

What differs is looked at twice with a pause between, since an agent that runs mends its own within that time; and
before each change the domains and claims are read once more, so that nothing is taken from a domain that has come
meanwhile.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

from agent.placement.allocations import Allocations, Difference, Mended, compare, row
from agent.placement.errors import PlacementError
from agent.resources import ResourceClaims, Share

SETTLE_SECONDS = 1.0


@dataclasses.dataclass(frozen=True, slots=True)
class Finding:
    """:ivar own: whether the consumer is one that the agents may write. :ivar result: what was done, "" for nothing."""

    difference: Difference
    own: bool
    result: str = ""
    error: PlacementError | None = None

    def to_json(self) -> dict[str, Any]:
        error = self.error.to_json() if self.error is not None else None
        return {**self.difference.to_json(), "own": self.own, "result": self.result, "error": error}


def audit(
    allocations: Allocations, claims: ResourceClaims, pause: Callable[[float], None] = time.sleep
) -> list[Finding]:
    """What is wrong and stays so. :raises PlacementError, ToolstackError, JournalError: one of both does not answer."""
    first = _look(allocations, claims)
    if not first:
        return []
    pause(SETTLE_SECONDS)
    second = _look(allocations, claims)
    return [Finding(item, not allocations.foreign(item)) for item in second if item in first]


def repair(
    allocations: Allocations, claims: ResourceClaims, pause: Callable[[float], None] = time.sleep
) -> list[Finding]:
    """Mend what is provably ours; one that is refused does not keep the others from it."""
    return [_mend(allocations, claims, found) for found in audit(allocations, claims, pause)]


def _look(allocations: Allocations, claims: ResourceClaims) -> list[Difference]:
    return compare(allocations.found(), claims.shares()[1])


def _mend(allocations: Allocations, claims: ResourceClaims, found: Finding) -> Finding:
    item = found.difference
    if not found.own:
        return dataclasses.replace(found, result=Mended.FOREIGN.value)
    if row(claims.shares()[1].get(item.consumer, Share())) != item.wanted:
        return dataclasses.replace(found, result="changed")
    try:
        return dataclasses.replace(found, result=allocations.mend(item).value)
    except PlacementError as exc:
        if exc.fatal:
            raise
        return dataclasses.replace(found, result="failed", error=exc)
