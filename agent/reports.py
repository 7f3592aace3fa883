"""What the agent tells without being asked: capacity (at start, at intervals, on change), its own life."""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from agent.errors import JournalError
from agent.resources import ResourceClaims
from agent.wire import Report
from hypervisor.errors import ToolstackError
from hypervisor.toolstack.api import DomainEvent, Toolstack

LOG = logging.getLogger(__name__)

SETTLE_SECONDS = 0.2
"""Changes closer together than this make one capacity report."""
AGAIN_SECONDS = 5.0
"""A host that does not answer is asked again after so many seconds."""


class Reporter:
    """:param publish: takes a report; must not block.

    :param interval: seconds between full capacity reports.
    :param lifecycle: takes the driver's events (`agent.lifecycle`).
    """

    def __init__(
        self,
        host: str,
        toolstack: Toolstack,
        claims: ResourceClaims,
        publish: Callable[[Report], None],
        *,
        interval: float = 60.0,
        extra: Callable[[], dict[str, Any]] = dict,
        now: Callable[[], float] = time.time,
        seq: Iterator[int] | None = None,
        lifecycle: Callable[[DomainEvent], None] | None = None,
    ) -> None:
        self._lifecycle = lifecycle
        self._host = host
        self._toolstack = toolstack
        self._claims = claims
        self._publish = publish
        self.interval = interval
        self._extra = extra
        self._now = now
        self._seq = seq or itertools.count(1)
        self._changed = threading.Event()
        self._stop = threading.Event()
        self._last: dict[str, Any] | None = None
        self._unsubscribe: Callable[[], None] = lambda: None
        self._thread = threading.Thread(target=self._main, name="reporter", daemon=True)

    def start(self) -> None:
        self.send("agent", {"event": "started"})
        self._unsubscribe = self._toolstack.subscribe(self._on_event)
        self._thread.start()

    def stop(self) -> None:
        self._unsubscribe()
        self._stop.set()
        self._changed.set()
        if self._thread.is_alive():
            self._thread.join(5)
        self.send("agent", {"event": "stopping"})

    def alive(self) -> bool:
        return self._thread.is_alive()

    def changed(self) -> None:
        """Something happened that may change the capacity."""
        self._changed.set()

    def send(self, kind: str, data: dict[str, Any]) -> None:
        self._publish(Report(kind, self._host, self._now(), next(self._seq), data))

    def capacity(self, *, always: bool) -> bool:
        """Report the capacity if it differs from the last report, or `always`; False when it cannot be read."""
        try:
            data = self._claims.capacity().to_json()
            host = self._toolstack.host_info()
        except (ToolstackError, JournalError) as exc:
            LOG.warning("no capacity report: %s", exc)
            return False
        data |= {"driver": host.driver, "driver_version": host.driver_version, "capabilities": list(host.capabilities)}
        data |= self._extra()
        if always or data != self._last:
            self._last = data
            self.send("capacity", data)
        return True

    def _on_event(self, event: DomainEvent) -> None:
        if self._lifecycle is not None:
            self._lifecycle(event)
        self._changed.set()

    def _main(self) -> None:
        due = 0.0
        while not self._stop.is_set():
            if time.monotonic() >= due:
                read = self.capacity(always=True)
                due = time.monotonic() + (self.interval if read else min(self.interval, AGAIN_SECONDS))
            if self._changed.wait(max(0.0, due - time.monotonic())) and not self._stop.wait(SETTLE_SECONDS):
                self._changed.clear()
                self.capacity(always=False)
