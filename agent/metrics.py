"""The agent's numbers in Prometheus's text format. docs/observing.md lists them.

Counters are kept as things happen; what journal and driver know is read when somebody asks, at most once in
`FRESH_SECONDS`, by one asker at a time: the others get what was read last. Labels take few values: a verb that is
not installed counts as ``unknown``.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Container, Iterable, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, Summary
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from agent.errors import AgentError
from agent.http import Answer
from agent.wire import Reply
from hypervisor.errors import ToolstackError
from hypervisor.toolstack.api import DomainInfo, Toolstack

LOG = logging.getLogger(__name__)

FRESH_SECONDS = 1.0
BUCKETS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 300, 1800)
MAX_DOMAINS = 1000
"""Domains with series of their own."""

_DEVICES = {
    ("disk", "read_bytes"): ("reeve_domain_disk_read_bytes", "Bytes the domain read from its disks."),
    ("disk", "write_bytes"): ("reeve_domain_disk_written_bytes", "Bytes the domain wrote to its disks."),
    ("nic", "rx_bytes"): ("reeve_domain_network_received_bytes", "Bytes the domain received."),
    ("nic", "tx_bytes"): ("reeve_domain_network_sent_bytes", "Bytes the domain sent."),
}


class Metrics:
    """:param verbs: the verbs there are.

    :param gauges: what is read when asked: name to value, for ``reeve_<name>``.
    :param toolstack: whose domains are counted.
    """

    def __init__(
        self, verbs: Container[str], gauges: Callable[[], Mapping[str, float]], toolstack: Toolstack, version: str
    ) -> None:
        self._verbs = verbs
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self._ended = Counter(
            "reeve_instructions", "Instructions that ended.", ["verb", "outcome"], registry=self.registry
        )
        self._seconds = Histogram(
            "reeve_instruction_seconds",
            "From an instruction's acceptance to its outcome.",
            ["verb"],
            buckets=BUCKETS,
            registry=self.registry,
        )
        self._steps = Summary("reeve_step_seconds", "How long steps ran.", ["verb", "step"], registry=self.registry)
        self._messages = Counter(
            "reeve_messages", "Messages taken in, by what they were.", ["outcome"], registry=self.registry
        )
        self._refused = Counter(
            "reeve_messages_refused", "Messages refused, by the code of the error.", ["code"], registry=self.registry
        )
        self.registry.register(_Node(gauges, toolstack, version))

    def ended(self, reply: Reply) -> None:
        """An instruction's outcome is durable."""
        verb = reply.verb if reply.verb in self._verbs else "unknown"
        self._ended.labels(verb, "done" if reply.ok else "failed").inc()
        self._seconds.labels(verb).observe(max(0.0, reply.finished - reply.accepted))
        for step in reply.steps:
            self._steps.labels(verb, step["name"]).observe(step["seconds"])

    def message(self, outcome: str, code: str = "") -> None:
        """A message was taken in. :param code: of the error, for one that was refused."""
        self._messages.labels(outcome).inc()
        if code:
            self._refused.labels(code).inc()

    def page(self) -> Answer:
        return Answer(200, generate_latest(self.registry), CONTENT_TYPE_LATEST)


class _Node:
    """What is read when somebody asks; a collector of `prometheus_client`."""

    def __init__(self, gauges: Callable[[], Mapping[str, float]], toolstack: Toolstack, version: str) -> None:
        self._gauges = gauges
        self._toolstack = toolstack
        self._version = version
        self._lock = threading.Lock()
        self._read = float("-inf")
        self._last: list[Metric] = []

    def describe(self) -> Iterable[Metric]:
        """Nothing beforehand, or the registry would ask the driver."""
        return []

    def collect(self) -> Iterable[Metric]:
        if self._lock.acquire(blocking=not self._last):
            try:
                if time.monotonic() - self._read >= FRESH_SECONDS:
                    self._last = [*self._agent(), *self._domains()]
                    self._read = time.monotonic()
            finally:
                self._lock.release()
        return self._last

    def _agent(self) -> Iterable[Metric]:
        info = GaugeMetricFamily("reeve_info", "The agent's version and driver.", labels=["version", "driver"])
        info.add_metric([self._version, self._toolstack.name], 1)
        yield info
        for name, value in self._gauges().items():
            kind = CounterMetricFamily if name.endswith("_total") else GaugeMetricFamily
            yield kind(f"reeve_{name}", f"See docs/observing.md: {name}.", value=value)

    def _domains(self) -> Iterable[Metric]:
        up = GaugeMetricFamily("reeve_driver_up", "Whether the driver answers.")
        try:
            domains = self._toolstack.list_domains()
        except ToolstackError as exc:
            LOG.debug("no numbers of domains: %s", exc)
            up.add_metric([], 0)
            return [up]
        up.add_metric([], 1)
        states = GaugeMetricFamily("reeve_domains", "Domains on the host, by state.", labels=["state"])
        counts: dict[str, int] = {}
        for domain in domains:
            counts[domain.state.value] = counts.get(domain.state.value, 0) + 1
        for state, count in sorted(counts.items()):
            states.add_metric([state], count)
        return [up, states, *self._each(domains[:MAX_DOMAINS])]

    def _each(self, domains: Iterable[DomainInfo]) -> list[Metric]:
        labels = ["uuid", "name"]
        cpu = CounterMetricFamily("reeve_domain_cpu_seconds", "CPU time of the domain.", labels=labels)
        memory = GaugeMetricFamily("reeve_domain_memory_bytes", "Memory the domain has.", labels=labels)
        vcpus = GaugeMetricFamily("reeve_domain_vcpus", "vCPUs of the domain.", labels=labels)
        devices = {key: CounterMetricFamily(*about, labels=labels) for key, about in _DEVICES.items()}
        for info in domains:
            try:
                stats: Mapping[str, Any] = self._toolstack.stats(info.uuid)
            except (ToolstackError, AgentError):
                stats = {}  # foreign, or gone meanwhile
            values = [info.uuid, info.name]
            cpu.add_metric(values, stats.get("cpu_time_ns", info.cpu_time_ns) / 1e9)
            memory.add_metric(values, info.memory_mib << 20)
            vcpus.add_metric(values, info.vcpus)
            for (kind, name), family in devices.items():
                found = [item for item in stats.get("devices") or () if item.get("kind") == kind]
                family.add_metric(values, sum(int((item.get("stats") or {}).get(name, 0)) for item in found))
        return [cpu, memory, vcpus, *devices.values()]
