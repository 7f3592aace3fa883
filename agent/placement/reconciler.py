"""The thread that keeps Placement as this host is: at the start, on change, and at intervals in full.

It looks at the world each time (domain table and claims here, allocations there) and mends the difference, so that
nothing has to be remembered over a crash. Nobody waits for it: who changes something only sets a flag.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from collections.abc import Callable
from typing import Any, Protocol

from agent.errors import AgentError
from agent.placement import inventory
from agent.placement.allocations import Allocations, Difference, mend_all
from agent.placement.provider import Provider
from agent.resources import ResourceClaims, Share
from hypervisor.errors import ToolstackError
from hypervisor.toolstack.api import Toolstack

LOG = logging.getLogger(__name__)

SETTLE_SECONDS = 0.1
"""Changes closer together than this are told together."""
AGAIN_SECONDS = 2.0
"""After a failure; twice as long after each further one, up to the interval."""
END_SECONDS = 5.0


class Cuts(Protocol):
    """What speaks HTTP."""

    def cut(self) -> None: ...
    def close(self) -> None: ...


@dataclasses.dataclass(frozen=True, slots=True)
class Status:
    """How it stands.

    :ivar error: why the last round failed, "" if it did not. :ivar synced: when one last succeeded, by the clock.
    :ivar mended: allocations written or removed since the start. :ivar foreign: differences that are not ours to mend.
    :ivar left: our own differences that stand: not mended, or only told of. :ivar refused: why the first of them was
        not mended.
    """

    error: str = ""
    refused: str = ""
    synced: float | None = None
    mended: int = 0
    foreign: tuple[Difference, ...] = ()
    left: tuple[Difference, ...] = ()


class Reconciler:
    """:param http: is cut when the agent ends.

    :param write: mend allocations; False: only tell of differences.
    :param interval: seconds between full rounds.
    """

    def __init__(
        self,
        provider: Provider,
        allocations: Allocations,
        claims: ResourceClaims,
        toolstack: Toolstack,
        http: Cuts,
        *,
        write: bool = True,
        interval: float = 60.0,
        aggregates: frozenset[str] = frozenset(),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._provider = provider
        self._allocations = allocations
        self._claims = claims
        self._toolstack = toolstack
        self._http = http
        self.write = write
        self.interval = interval
        self._aggregates = aggregates
        self._clock = clock
        self.status = Status()
        self._due = clock()
        self._failures = 0
        self._soon = False  # something was refused that may be taken soon
        self._told: dict[str, Any] = {}  # the inventory of the last round
        self._changed = threading.Event()
        self._stop = threading.Event()
        self._unsubscribe: Callable[[], None] = lambda: None
        self._thread = threading.Thread(target=self._main, name="placement", daemon=True)

    def start(self) -> None:
        self._unsubscribe = self._toolstack.subscribe(lambda event: self.changed())
        self._thread.start()

    def stop(self) -> None:
        """What changed last is still told, if that is quick."""
        self._unsubscribe()
        self._stop.set()
        self._changed.set()
        if self._thread.is_alive():
            self._thread.join(END_SECONDS)
        self._http.cut()
        if self._thread.is_alive():
            self._thread.join(1)
        self._http.close()

    def alive(self) -> bool:
        return self._thread.is_alive()

    def changed(self) -> None:
        """Something happened that may change what domains have. Returns at once."""
        self._changed.set()

    def wait(self, seconds: float) -> bool:
        """A pause of the client; True when the agent ends."""
        return self._stop.wait(seconds)

    def step(self) -> float:
        """One round, in full if one is due; seconds until the next is."""
        now = self._clock()
        full = now >= self._due
        try:
            self._round(full)
        except (AgentError, ToolstackError) as exc:
            self._failed(exc)
        else:
            if self.status.error:
                LOG.info("Placement knows of this host again")
            self._failures = 0
            self.status = dataclasses.replace(self.status, error="", synced=self._clock())
            if full:
                self._due = now + self.interval
            if self._soon:
                self._due = min(self._due, now + AGAIN_SECONDS)
        return max(0.0, self._due - self._clock())

    def _round(self, full: bool) -> None:
        capacity, shares = self._claims.shares()
        wanted = inventory.inventories(capacity, self._claims.vcpu_ratio)
        if full:
            self._provider.ensure()
        if full or wanted != self._told:
            self._told = {}
            self._provider.set_inventories(wanted)
            self._told = wanted
        if full:
            self._provider.set_traits(inventory.traits(self._toolstack.host_info()))
            self._provider.add_aggregates(self._aggregates)
        self._mend(shares)

    def _mend(self, shares: dict[str, Share]) -> None:
        differences = self._allocations.differences(shares)
        if not self.write:
            foreign = tuple(item for item in differences if self._allocations.foreign(item))
            left = tuple(item for item in differences if item not in foreign)
            self._soon = False
            self.status = dataclasses.replace(self.status, foreign=foreign, left=left, refused="")
            return
        outcome = mend_all(self._allocations, differences)
        # What Placement refuses to one domain does not keep the changes of others waiting.
        refused = outcome.failed[0][1].message if outcome.failed else ""
        if refused and refused != self.status.refused:
            LOG.warning("%d allocations are not mended, the first one: %s", len(outcome.failed), refused)
        self._soon = any(error.retryable for _, error in outcome.failed)
        self.status = dataclasses.replace(
            self.status,
            mended=self.status.mended + len(outcome.mended),
            foreign=tuple(outcome.foreign),
            left=tuple(item for item, _ in outcome.failed),
            refused=refused,
        )

    def _failed(self, exc: AgentError | ToolstackError) -> None:
        if exc.message != self.status.error:
            level = logging.INFO if self._stop.is_set() else logging.WARNING
            LOG.log(level, "Placement is not up to date: %s", exc.message)
        self.status = dataclasses.replace(self.status, error=exc.message)
        pause = min(self.interval, AGAIN_SECONDS * 2 ** min(self._failures, 16))
        self._failures += 1
        self._due = self._clock() + pause

    def _main(self) -> None:
        while not self._stop.is_set():
            left = self.step()
            if self._failures:
                self._stop.wait(left)  # changes do not hurry a Placement that is in trouble
            elif self._changed.wait(left):
                self._stop.wait(SETTLE_SECONDS)
                self._changed.clear()
        if not self._failures:
            self.step()


def gauges(reconciler: Reconciler, clock: Callable[[], float] = time.monotonic) -> dict[str, float]:
    """For /metrics, without the prefix ``reeve_``."""
    status = reconciler.status
    found = {
        "placement_up": 0.0 if status.error or status.synced is None else 1.0,
        "placement_mended": float(status.mended),
        "placement_foreign": float(len(status.foreign)),
        "placement_differences": float(len(status.left)),
    }
    if status.synced is not None:
        found["placement_age_seconds"] = max(0.0, clock() - status.synced)
    return found
