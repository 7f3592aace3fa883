"""What happens to domains, told to every process of this host that listens: nodes under ``/tool/reeve/events``."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable

from hypervisor.errors import ToolstackError
from hypervisor.toolstack.api import DomainEvent
from hypervisor.toolstack.drivers.xl.store import XenstoreClient

LOG = logging.getLogger(__name__)

EVENTS = "/tool/reeve/events"
KEPT = 64

Listener = Callable[[DomainEvent], None]


class Events:
    def __init__(self, store: XenstoreClient) -> None:
        self._store = store

    def publish(self, kind: str, uuid: str, detail: str = "") -> None:
        """Tell all; what fails is logged, as the verb itself has been done."""
        now = time.time_ns()
        try:
            self._store.write(f"{EVENTS}/{now:020}-{os.getpid()}", json.dumps([kind, uuid, now / 1e9, detail[:500]]))
            for name in sorted(self._store.names(EVENTS))[:-KEPT]:
                self._store.remove(f"{EVENTS}/{name}")
        except ToolstackError as exc:
            LOG.warning("%s of %s was not told: %s", kind, uuid, exc)

    def subscribe(self, listener: Listener) -> Callable[[], None]:
        began = f"{time.time_ns():020}"

        def changed(path: str) -> None:
            name = path.removeprefix(EVENTS + "/")
            value = self._store.read(path) if name != path and name > began else None
            if value is None:
                return  # removed, or from before
            try:
                kind, uuid, when, detail = json.loads(value)
                event = DomainEvent(str(kind), str(uuid), float(when), str(detail))
            except (ValueError, TypeError):
                LOG.warning("event node %s holds %r", path, value[:80])
                return
            listener(event)

        return self._store.watch(EVENTS, changed)
