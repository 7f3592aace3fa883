"""How the agent is: its health for probes, metrics over HTTP, and signs of life for systemd's watchdog.

Alive means that going on makes sense: every thread runs and the journal can be read. Ready means that an instruction
sent now would be carried out now: broker and driver answer, there is room, and the agent is not about to end.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Mapping

from agent.conf_observe import HttpSettings
from agent.errors import AgentError
from agent.http import Answer, HttpServer
from agent.metrics import Metrics
from hypervisor import sdnotify
from hypervisor.errors import ToolstackError

LOG = logging.getLogger(__name__)

Check = Callable[[], str]
"""What is wrong, in one line; "" for nothing."""

AGAIN_SECONDS = 60.0
"""A port that is taken is tried again so often."""


class Monitor:
    """:param live: checks by name: without them the agent should be started anew.

    :param ready: further ones: without them it should get no work.
    """

    def __init__(
        self, settings: HttpSettings, metrics: Metrics, live: Mapping[str, Check], ready: Mapping[str, Check]
    ) -> None:
        self._settings = settings
        self._live = dict(live)
        self._ready = dict(ready)
        self._pages = {
            "/metrics": metrics.page,
            "/healthz": lambda: _health(self._live),
            "/readyz": lambda: _health(self._live, self._ready),
        }
        self.http: HttpServer | None = None
        self._tried = float("-inf")
        self._stop = threading.Event()
        self._watchdog = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def start(self) -> None:
        self.listen()
        if sdnotify.watchdog_seconds():
            self._watchdog.start()

    def listen(self) -> None:
        """Offer the pages if they are not offered yet. A port that is taken stops nothing else."""
        given = self._settings
        if self.http is not None or not given.enabled or time.monotonic() < self._tried + AGAIN_SECONDS:
            return
        first, self._tried = self._tried == float("-inf"), time.monotonic()
        server = HttpServer(given.address, given.port, self._pages)
        try:
            server.start()
        except OSError as exc:
            if first:
                LOG.warning(
                    "no metrics and health pages (%s port %d: %s): give another [http] port; it is tried again",
                    given.address,
                    given.port,
                    exc.strerror or exc,
                )
            return
        self.http = server
        LOG.info("metrics and health pages: %s port %d", given.address, server.port)

    def stop(self) -> None:
        self._stop.set()
        if self.http is not None:
            self.http.stop()

    def _watch(self) -> None:
        """Tell systemd twice in its time that all is well, so long as it is."""
        interval = sdnotify.watchdog_seconds() / 2
        while not self._stop.is_set():
            wrong = {name: why for name, why in _run(self._live).items() if why}
            if wrong:
                LOG.error("not well, and the watchdog is not told: %s", wrong)
            else:
                sdnotify.alive()
            self._stop.wait(interval)


def _run(checks: Mapping[str, Check]) -> dict[str, str]:
    found = {}
    for name, check in checks.items():
        try:
            found[name] = check()
        except (AgentError, ToolstackError) as exc:
            found[name] = f"{exc.code}: {exc.message}"
    return found


def _health(live: Mapping[str, Check], ready: Mapping[str, Check] = {}) -> Answer:
    """`degraded`: it goes on, and what is wrong is for others to cure; it takes work again by itself."""
    found = _run(live)
    status = "failing" if any(found.values()) else "ok"
    more = _run(ready)
    if status == "ok" and any(more.values()):
        status = "degraded"
    body = {"status": status, "checks": {name: why or "ok" for name, why in (found | more).items()}}
    return Answer(200 if status == "ok" else 503, json.dumps(body).encode() + b"\n", "application/json")
