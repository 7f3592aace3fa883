"""Many agents on one broker for a while: are they steady, and do their reports come on time.

``--agents`` agents with the fake driver, ``--per-process`` in a process, on one private RabbitMQ, each with its own
journal and connections, for ``--minutes``. First each gets a domain; then ``--rate`` instructions a second go round
among them, pause and unpause, which change no capacity: so the reports that come are those of the interval.

``lateness_ms`` is of capacity reports: when one arrived here, less when the one before was sent, less ``--interval``.
``missing`` are those that never came. ``latency_ms`` is of instructions, from when each was due to its answer.
``memory`` is of all agents' processes together: ``slope`` is KiB for each agent and minute, the first fifth left out.
``connections_changed`` counts connections that were not there at the beginning of the measured time, or not at its end.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import itertools
import json
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import amqp
from common import BenchFailed, Result, count, parser, positive, rounded, run, say
from fleet import ROOT, clean_env, rss_kib, slope

sys.path.insert(0, str(ROOT / "tests" / "integration"))

from rabbitmq import Rabbit, RabbitMissing, private_broker

READY_SECONDS = 300.0
SAMPLE_SECONDS = 5.0
REPLY_SECONDS = 60.0
ESTABLISHED = "01"


class Fleet:
    """The processes with the agents."""

    def __init__(self, folder: Path, rabbit: Rabbit, options: argparse.Namespace) -> None:
        self.processes: list[subprocess.Popen[bytes]] = []
        self._folder = folder
        self._rabbit = rabbit
        self._options = options

    def start(self) -> None:
        """:raises BenchFailed: not all came up."""
        options = self._options
        for first in range(0, options.agents, options.per_process):
            number = min(options.per_process, options.agents - first)
            command = [
                sys.executable, str(ROOT / "bench" / "agents_host.py"), self._rabbit.url, str(self._folder),
                str(first), str(number), str(options.interval),
            ]  # fmt: skip
            with open(self._folder / f"agents{first}.output", "wb") as output:
                self.processes.append(
                    subprocess.Popen(
                        command,
                        env=clean_env(),
                        cwd=self._folder,
                        stdin=subprocess.PIPE,
                        stdout=subprocess.PIPE,
                        stderr=output,
                    )
                )
        for process in self.processes:
            assert process.stdout is not None
            if process.stdout.readline() != b"ready\n":
                raise BenchFailed("the agents did not come up; --keep keeps their output")

    def rss_kib(self) -> int:
        return sum(rss_kib(process.pid) for process in self.processes)

    def stop(self) -> None:
        for process in self.processes:
            assert process.stdin is not None
            process.stdin.close()
        for process in self.processes:
            try:
                process.wait(READY_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(10)

    def ended(self) -> int:
        return sum(process.poll() is not None for process in self.processes)


class Watch:
    """Hears all reports and answers, and sends instructions at an even rate."""

    def __init__(self, rabbit: Rabbit, options: argparse.Namespace, kernel: Path) -> None:
        self._options = options
        self._kernel = str(kernel)
        self._connection = amqp.Connection(f"127.0.0.1:{rabbit.port}", "guest", "guest", heartbeat=0)
        self._connection.connect()
        self._connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        channel = self._channel = self._connection.channel()
        self._reply_q = f"reeve.reply.{uuid.uuid4().hex}"
        channel.exchange_declare("reeve.reports", "topic", durable=True, auto_delete=False)
        channel.queue_declare(self._reply_q, durable=False, exclusive=True, auto_delete=True)
        reports = channel.queue_declare("", durable=False, exclusive=True, auto_delete=True).queue
        channel.queue_bind(reports, "reeve.reports", "capacity.#")
        channel.basic_consume(reports, no_ack=True, callback=self._on_report)
        channel.basic_consume(self._reply_q, no_ack=True, callback=self._on_reply)
        self.reports: dict[str, list[tuple[float, float]]] = collections.defaultdict(list)  # (sent, came)
        self.latencies: list[float] = []
        self.failures: list[str] = []
        self._due: dict[str, tuple[float, int]] = {}
        self._domains: dict[int, str] = {}
        self._sent = 0

    def close(self) -> None:
        self._connection.close()

    def _on_report(self, message: Any) -> None:
        report = json.loads(message.body)
        self.reports[report["host"]].append((report["time"], time.time()))

    def _on_reply(self, message: Any) -> None:
        reply = json.loads(message.body)
        due, node = self._due.pop(reply["id"])
        self.latencies.append(time.perf_counter() - due)
        if not reply["ok"]:
            self.failures.append(str(reply["error"])[:200])
        elif reply["verb"] == "create":
            self._domains[node] = reply["result"]["domain"]["uuid"]

    def drain(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            self._connection.drain_events(timeout=max(0.001, seconds))

    def instruct(self, due: float) -> None:
        """Create a domain on the next node; if it has one, pause it or let it run on, which no report tells."""
        node = self._sent % self._options.agents
        turn, self._sent = self._sent // self._options.agents, self._sent + 1
        if (known := self._domains.get(node)) is None:
            self._send(due, node, "create", {"name": "web", "memory_mib": 64, "kernel": self._kernel})
        else:
            self._send(due, node, "pause" if turn % 2 else "unpause", {"uuid": known})

    def _send(self, due: float, node: int, verb: str, args: dict[str, Any]) -> None:
        ident, host = str(uuid.uuid4()), f"node{node}"
        body = {"reeve": "1.0", "id": ident, "verb": verb, "host": host, "reply_to": self._reply_q, "args": args}
        self._due[ident] = (due, node)
        message = amqp.Message(json.dumps(body), content_type="application/json", delivery_mode=2)
        self._channel.basic_publish(message, exchange="", routing_key=f"reeve.{host}")

    def waiting(self) -> int:
        return len(self._due)

    def forget(self) -> None:
        """What came until now is not measured."""
        self.reports.clear()
        self.latencies.clear()


def connections(rabbit: Rabbit) -> set[str]:
    """The far ends of the broker's connections (proc_net_tcp(5): local address, remote address, state)."""
    found = set()
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        _, local, remote, state = line.split()[:4]
        if state == ESTABLISHED and int(local.rpartition(":")[2], 16) == rabbit.port:
            found.add(remote)
    return found


def measure(options: argparse.Namespace, folder: Path) -> Result:
    broker_folder = folder / "rabbit"
    broker_folder.mkdir()
    try:
        with private_broker(broker_folder) as rabbit, watched(options, folder, rabbit) as (fleet, watch):
            return steady(options, rabbit, fleet, watch)
    except RabbitMissing as exc:
        raise BenchFailed(str(exc)) from exc


@contextlib.contextmanager
def watched(options: argparse.Namespace, folder: Path, rabbit: Rabbit) -> Iterator[tuple[Fleet, Watch]]:
    kernel = folder / "vmlinuz"
    kernel.write_bytes(b"\x7fELF" + bytes(1000))
    with contextlib.ExitStack() as stack:
        watch = Watch(rabbit, options, kernel)
        stack.callback(watch.close)
        fleet = Fleet(folder, rabbit, options)
        stack.callback(fleet.stop)
        say(f"starting {options.agents} agents")
        starter = threading.Thread(target=fleet.start, daemon=True)
        starter.start()
        end = time.monotonic() + READY_SECONDS
        while len(watch.reports) < options.agents:
            watch.drain(1.0)
            if time.monotonic() > end or fleet.ended():
                raise BenchFailed(f"only {len(watch.reports)} of {options.agents} agents report")
        starter.join(READY_SECONDS)
        yield fleet, watch


def steady(options: argparse.Namespace, rabbit: Rabbit, fleet: Fleet, watch: Watch) -> Result:
    for _ in range(options.agents):
        watch.instruct(time.perf_counter())
    end = time.monotonic() + READY_SECONDS  # all journals are on one disk here, which this many syncs keep busy
    while watch.waiting() and time.monotonic() < end:
        watch.drain(1.0)
    if watch.waiting() or watch.failures:
        raise BenchFailed(f"{watch.waiting()} agents have made no domain: {watch.failures[:3]}")
    settle = time.monotonic() + options.interval * 2
    while time.monotonic() < settle:
        watch.drain(settle - time.monotonic())
    watch.forget()
    at_first = connections(rabbit)
    started = time.perf_counter()
    sampled: list[tuple[float, float]] = []
    sent, seconds = 0, options.minutes * 60
    next_sample, next_word = 0.0, 60.0
    while (now := time.perf_counter() - started) < seconds:
        if now >= next_sample:
            next_sample += SAMPLE_SECONDS
            sampled.append((now / 60, fleet.rss_kib() / options.agents))
            if fleet.ended():
                raise BenchFailed(f"{fleet.ended()} processes with agents have ended")
        if now >= next_word:
            next_word += 60.0
            say(f"{now / 60:.0f} minutes, {sum(map(len, watch.reports.values()))} reports, {sent} instructions")
        if now >= sent / options.rate:
            watch.instruct(started + sent / options.rate)
            sent += 1
        else:
            watch.drain(min(next_sample, sent / options.rate) - now)
    at_last = connections(rabbit)
    end = time.monotonic() + REPLY_SECONDS
    while watch.waiting() and time.monotonic() < end:
        watch.drain(1.0)
    if watch.waiting() or watch.failures:
        raise BenchFailed(f"{watch.waiting()} instructions without an answer, failed: {watch.failures[:3]}")
    late, missing = lateness(watch, options)
    latencies = sorted(watch.latencies)
    return {
        "agents": options.agents,
        "per_process": options.per_process,
        "minutes": options.minutes,
        "interval_s": options.interval,
        "reports": len(late),
        "missing": missing,
        "lateness_ms": spread(late),
        "instructions": sent,
        "latency_ms": spread(latencies),
        "connections": len(at_last),
        "connections_changed": len(at_first ^ at_last),
        "memory": {
            "first_mib_each": rounded(sampled[0][1] / 1024),
            "peak_mib_each": rounded(max(kib for _, kib in sampled) / 1024),
            "slope": rounded(slope(sampled[len(sampled) // 5 :])),
            "slope_last_half": rounded(slope(sampled[len(sampled) // 2 :])),
        },
    }


def lateness(watch: Watch, options: argparse.Namespace) -> tuple[list[float], int]:
    """Of each report, seconds, sorted; and how many did not come."""
    late, missing = [], 0
    for node in range(options.agents):
        seen = watch.reports.get(f"node{node}", [])
        gaps = [came - sent - options.interval for (sent, _), (_, came) in itertools.pairwise(seen)]
        late += [max(0.0, gap) for gap in gaps]
        missing += sum(int(gap / options.interval) for gap in gaps)
        if not gaps:
            missing += max(1, int(options.minutes * 60 / options.interval) - 1)
    return sorted(late), missing


def spread(values: Sequence[float]) -> Result:
    """Of sorted seconds, milliseconds."""
    if not values:
        return {}
    return {
        name: rounded(values[min(len(values) - 1, int(len(values) * share))] * 1000)
        for name, share in (("p50", 0.5), ("p99", 0.99), ("max", 1.0))
    }


def table(result: Result) -> Sequence[Sequence[object]]:
    late, latency = result["lateness_ms"], result["latency_ms"]
    return [
        ("", "number", "p50 ms", "p99 ms", "max ms"),
        ("reports' lateness", result["reports"], late.get("p50"), late.get("p99"), late.get("max")),
        ("instructions", result["instructions"], latency.get("p50"), latency.get("p99"), latency.get("max")),
    ]


def main() -> int:
    made = parser(__doc__)
    made.add_argument("--agents", type=count, default=200, help="(%(default)s)")
    made.add_argument("--per-process", type=count, default=20, metavar="N", help="agents in a process (%(default)s)")
    made.add_argument("--minutes", type=positive, default=10.0, help="measured, after settling (%(default)s)")
    made.add_argument("--interval", type=count, default=10, help="seconds between two reports (%(default)s)")
    made.add_argument("--rate", type=positive, default=5.0, help="instructions a second, in all (%(default)s)")
    return run(made.parse_args(), "agents", measure, table)


if __name__ == "__main__":
    sys.exit(main())
