"""What happens to domains, from the driver's events into the journal's outbox: at least once.

Events of the driver live in memory only, and none comes while the agent or the host process is away. So along with
each batch it is journalled which domains there are and how; what is found otherwise at the start, or at an
interval, is told as an event that nobody saw (detail `UNSEEN`).
"""

from __future__ import annotations

import json
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterable, Mapping

from agent.errors import JournalError
from agent.journal import Journal
from agent.notices import Notices
from hypervisor.errors import ToolstackError
from hypervisor.toolstack.api import DomainEvent, DomainState, Toolstack

LOG = logging.getLogger(__name__)

KEY = "domains"
UNSEEN = "found so; it happened unseen"
SETTLE_SECONDS = 0.3
AGAIN_SECONDS = 2.0
MAX_WAITING = 100_000
"""Rows of the outbox beyond which events are dropped: a broker that is away for days must not fill the disk."""

Known = Mapping[str, list[object]]
"""UUID to [domid, state]."""

_KINDS = {
    DomainState.PAUSED: "paused",
    DomainState.RUNNING: "unpaused",
    DomainState.SHUTDOWN: "shutdown",
    DomainState.CRASHED: "crashed",
}


class Lifecycle:
    """:param stored: called when there is something in the outbox.

    :param interval: seconds between two looks for what was not seen.
    """

    def __init__(
        self,
        toolstack: Toolstack,
        journal: Journal,
        notices: Notices,
        stored: Callable[[], None],
        *,
        interval: float = 60.0,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._toolstack = toolstack
        self._journal = journal
        self._notices = notices
        self._stored = stored
        self._interval = interval
        self._now = now
        self._events: queue.SimpleQueue[DomainEvent | None] = queue.SimpleQueue()
        self._stopping = False
        self._thread = threading.Thread(target=self._main, name="lifecycle", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def happened(self, event: DomainEvent) -> None:
        """Take an event of the driver; does not wait."""
        self._events.put(event)

    def stop(self) -> None:
        """Store what came, then end."""
        self._stopping = True
        self._events.put(None)
        if self._thread.is_alive():
            self._thread.join(5)

    def _main(self) -> None:
        batch: list[DomainEvent] = []
        due = 0.0
        while not self._stopping or batch:
            batch += self._take(0.0 if batch else max(0.0, due - time.monotonic()))
            look = time.monotonic() >= due
            if look and not self._stopping:
                batch += self._take(SETTLE_SECONDS)
            try:
                self.store(batch, look=look and not self._stopping)
            except (JournalError, ToolstackError) as exc:
                LOG.warning("%d events of domains wait: %s", len(batch), exc)
                if self._stopping:
                    return
                due = time.monotonic() + AGAIN_SECONDS
                batch = batch[-MAX_WAITING:]
                batch += self._take(AGAIN_SECONDS)
                continue
            batch = []
            if look:
                due = time.monotonic() + self._interval

    def store(self, events: Iterable[DomainEvent], *, look: bool) -> int:
        """Journal events and how domains are now; with `look` also what nobody saw. How many events in all.

        :raises JournalError: nothing is stored. :raises ToolstackError: the same, if it was to look.
        """
        told = list(events)
        if not told and not look:
            return 0
        before = self._known()
        after: Known | None
        try:
            after = _now(self._toolstack, before or {})
        except ToolstackError:
            if look:
                raise
            after = None  # the next look sees
        if look and before is not None and after is not None:
            seen = {event.uuid for event in told}
            told += [event for event in unseen(before, after, self._now()) if event.uuid not in seen]
        if told and self._journal.counts()["outbox"] > MAX_WAITING:
            LOG.error("%d events of domains are dropped: the outbox is full, is the broker there?", len(told))
            told = []
        if told or (after is not None and after != before):
            messages = [message for event in told for message in self._notices.happened(event)]
            self._journal.remember(KEY, json.dumps(after) if after is not None else None, messages)
        if told:
            self._stored()
        return len(told)

    def _known(self) -> Known | None:
        text = self._journal.recall(KEY)
        return None if text is None else dict(json.loads(text))

    def _take(self, seconds: float) -> list[DomainEvent]:
        """What comes within `seconds`; returns soon after the first."""
        found: list[DomainEvent] = []
        try:
            item = self._events.get(timeout=seconds) if seconds > 0 else self._events.get_nowait()
            while True:
                if item is not None:
                    found.append(item)
                item = self._events.get_nowait()
        except queue.Empty:
            return found


def _now(toolstack: Toolstack, before: Known) -> Known:
    """One that cannot be read just now counts as it was: unknown is not stopped."""
    found = {}
    for info in toolstack.list_domains():
        state = info.state.value
        if info.state is DomainState.UNKNOWN and info.uuid in before:
            state = str(before[info.uuid][1])
        found[info.uuid] = [int(info.domid), state]
    return found


def unseen(before: Known, after: Known, now: float) -> list[DomainEvent]:
    """What must have happened between two looks."""
    found = []
    for uuid, (domid, state) in after.items():
        old = before.get(uuid)
        kinds = []
        if old is None:
            kinds.append("created")
        elif old[0] != domid:
            kinds.append("rebooted")
        if (old is None or old[1] != state) and state != DomainState.RUNNING.value:
            kinds.append(_KINDS.get(DomainState(str(state)), ""))
        elif old is not None and old[1] != state and old[0] == domid:
            kinds.append("unpaused")
        found += [DomainEvent(kind, uuid, now, UNSEEN) for kind in kinds if kind]
    found += [DomainEvent("destroyed", uuid, now, UNSEEN) for uuid in before if uuid not in after]
    return found
