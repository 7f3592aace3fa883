"""No-op instructions a second and their latency, beside an oslo.messaging server that does nothing.

Both sides get the same calls in oslo.messaging's form, through the same RabbitMQ, with the same prefetch and the
same durable queues, from the same sender, one after the other and in turns. The sender is neither side's: plain AMQP,
with a window of calls under way.

Reeve's agent has the fake driver and its durable journal: a call is acknowledged when it is on the disk, carried out
once, its outcome stored, its reply kept until the broker has confirmed it. oslo.messaging's server acknowledges before
it works and keeps nothing.

``reeve_per_s`` and ``oslo_per_s`` are medians of the rounds, ``ratio`` the first by the second. ``p50_ms`` and
``p99_ms`` are Reeve's with calls sent evenly at half of ``reeve_per_s``, counted from when each was due;
``oslo_p50_ms`` and ``oslo_p99_ms`` the same for the other side, at the same rate. Every call is answered exactly once,
or the benchmark fails.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import json
import os
import socket
import statistics
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import amqp
from common import BenchFailed, Result, count, parser, positive, rounded, run, say
from fleet import ROOT, clean_env, lay_plugin

sys.path.insert(0, str(ROOT / "tests" / "integration"))

from oslo_venvs import NEW, OsloMissing, make
from rabbitmq import Rabbit, RabbitMissing, private_broker

EXCHANGE, SERVER = "bench", "node1"
READY_SECONDS = 60.0
SILENCE_SECONDS = 30.0


class Sender:
    """Calls in oslo.messaging's form to one server, and the time until their replies."""

    def __init__(self, rabbit: Rabbit, topic: str) -> None:
        self._connection = amqp.Connection(f"127.0.0.1:{rabbit.port}", "guest", "guest", heartbeat=0)
        self._connection.connect()
        self._connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._channel = self._connection.channel()
        self._topic = f"{topic}.{SERVER}"
        self._reply_q = f"reply_{uuid.uuid4().hex}"
        self._channel.exchange_declare(EXCHANGE, "topic", durable=True, auto_delete=False)
        self._channel.queue_declare(self._reply_q, durable=False, auto_delete=False, arguments={"x-expires": 1800000})
        self._channel.basic_consume(self._reply_q, no_ack=True, callback=self._on_reply)
        self._due: dict[str, float] = {}
        self.latencies: list[float] = []

    def close(self) -> None:
        self._connection.close()

    def send(self, due: float | None = None) -> None:
        msg_id = uuid.uuid4().hex
        request = {
            "method": "noop", "args": {"n": len(self.latencies)}, "version": "1.0", "_msg_id": msg_id,
            "_reply_q": self._reply_q, "_timeout": None, "_unique_id": uuid.uuid4().hex,
            "_context_request_id": f"req-{msg_id}",
        }  # fmt: skip
        body = json.dumps({"oslo.version": "2.0", "oslo.message": json.dumps(request)})
        message = amqp.Message(
            body, content_type="application/json", content_encoding="utf-8", delivery_mode=2, expiration="60000"
        )
        self._due[msg_id] = time.perf_counter() if due is None else due
        self._channel.basic_publish(message, exchange=EXCHANGE, routing_key=self._topic)

    def _on_reply(self, message: Any) -> None:
        reply = json.loads(json.loads(message.body)["oslo.message"])
        if reply["failure"] is not None:
            raise BenchFailed(f"a call failed: {reply['failure']}")
        due = self._due.pop(reply["_msg_id"], None)
        if due is None:
            raise BenchFailed("a call was answered twice")
        self.latencies.append(time.perf_counter() - due)

    def wait(self, seconds: float) -> bool:
        """Take in a reply within `seconds`; False when none came."""
        try:
            self._connection.drain_events(timeout=seconds)
        except TimeoutError:
            return False
        return True

    def until_ready(self) -> None:
        """Call until the server answers; what it never got expires."""
        end = time.monotonic() + READY_SECONDS
        while not self.latencies:
            self.send()
            if not self.wait(1.0) and time.monotonic() > end:
                raise BenchFailed(f"nobody answers on {self._topic}")
        while self.wait(0.5):
            pass
        self._due.clear()

    def flood(self, seconds: float, window: int) -> float:
        """Keep `window` calls under way; replies a second."""
        self.latencies.clear()
        start = time.perf_counter()
        for _ in range(window):
            self.send()
        done = 0
        while time.perf_counter() - start < seconds:
            self._patiently()
            while done < len(self.latencies):
                done += 1
                self.send()
        rate = len(self.latencies) / (time.perf_counter() - start)
        while self._due:
            self._patiently()
        return rate

    def steady(self, seconds: float, rate: float) -> list[float]:
        """Send evenly, whatever comes back; the latency of each call, seconds."""
        self.latencies.clear()
        start, sent = time.perf_counter(), 0
        while sent < seconds * rate:
            due = start + sent / rate
            left = due - time.perf_counter()
            if left > 0:
                self.wait(left)
                continue
            self.send(due)
            sent += 1
        while self._due:
            self._patiently()
        return sorted(self.latencies)

    def _patiently(self) -> None:
        if not self.wait(SILENCE_SECONDS):
            raise BenchFailed(f"{len(self._due)} calls have no reply after {SILENCE_SECONDS:.0f} s")


@dataclasses.dataclass
class Side:
    """A server under test."""

    name: str
    topic: str
    process: subprocess.Popen[bytes]
    rates: list[float] = dataclasses.field(default_factory=list)

    def cpu_seconds(self) -> float:
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextlib.contextmanager
def reeve(folder: Path, rabbit: Rabbit, prefetch: int) -> Iterator[Side]:
    command = [
        sys.executable, "-m", "agent.service", "--agent-state-dir", str(folder / "state"), "--agent-host", SERVER,
        "--log-file", str(folder / "agent.log"), "--broker-url", rabbit.url, "--driver-name", "fake",
        "--broker-prefetch", str(prefetch), "--oslo-exchange", EXCHANGE, "--oslo-topic", "reeve-bench",
    ]  # fmt: skip
    env = clean_env() | {"PYTHONPATH": lay_plugin(folder / "plugin", "noop", "rpc_noop", "Noop")}
    with running(Side, "reeve", "reeve-bench", command, env, folder) as side:
        yield side


@contextlib.contextmanager
def oslo(folder: Path, rabbit: Rabbit, prefetch: int, python: str) -> Iterator[Side]:
    config = folder / "oslo.conf"
    config.write_text(
        f"[DEFAULT]\ntransport_url = rabbit{rabbit.url.removeprefix('amqp')}\ncontrol_exchange = {EXCHANGE}\n"
        f"[oslo_messaging_rabbit]\namqp_durable_queues = true\nrabbit_qos_prefetch_count = {prefetch}\n"
    )
    command = [python, "-W", "ignore", str(ROOT / "bench" / "rpc_oslo_server.py"), str(config), "oslo-bench", SERVER]
    env = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
    with running(Side, "oslo.messaging", "oslo-bench", command, env, folder) as side:
        yield side


@contextlib.contextmanager
def running(
    kind: type[Side], name: str, topic: str, command: list[str], env: dict[str, str], folder: Path
) -> Iterator[Side]:
    with open(folder / f"{topic}.output", "wb") as output:
        process = subprocess.Popen(command, env=env, cwd=folder, stdout=output, stderr=subprocess.STDOUT)
    try:
        yield kind(name, topic, process)
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(10)


def percentile(values: Sequence[float], share: float) -> float:
    """Of sorted seconds, in milliseconds."""
    return rounded(values[min(len(values) - 1, int(len(values) * share))] * 1000)


def measure(options: argparse.Namespace, folder: Path) -> Result:
    broker_folder = folder / "rabbit"
    broker_folder.mkdir()
    try:
        python = options.oslo_python or make(folder / "oslo", (NEW,))[NEW]
        with private_broker(broker_folder) as rabbit:
            return both(options, folder, rabbit, python)
    except (RabbitMissing, OsloMissing) as exc:
        raise BenchFailed(str(exc)) from exc


def both(options: argparse.Namespace, folder: Path, rabbit: Rabbit, python: str) -> Result:
    with contextlib.ExitStack() as stack:
        sides = [
            stack.enter_context(reeve(folder, rabbit, options.prefetch)),
            stack.enter_context(oslo(folder, rabbit, options.prefetch, python)),
        ]
        senders = {side.name: Sender(rabbit, side.topic) for side in sides}
        cpu: dict[str, float] = collections.defaultdict(float)
        for side in sides:
            stack.callback(senders[side.name].close)
            senders[side.name].until_ready()
            senders[side.name].flood(1.0, options.window)
        for number in range(options.rounds):
            for side in sides:
                before = side.cpu_seconds()
                side.rates.append(senders[side.name].flood(options.seconds, options.window))
                cpu[side.name] += side.cpu_seconds() - before
                say(f"round {number + 1}: {side.name} {side.rates[-1]:.0f} a second")
        rate = statistics.median(sides[0].rates)
        steady = {side.name: senders[side.name].steady(options.seconds * 2, rate / 2) for side in sides}
    ours, theirs = (rounded(statistics.median(side.rates)) for side in sides)
    mine, other = steady[sides[0].name], steady[sides[1].name]
    return {
        "reeve_per_s": ours,
        "oslo_per_s": theirs,
        "ratio": rounded(ours / theirs),
        "p50_ms": percentile(mine, 0.5),
        "p99_ms": percentile(mine, 0.99),
        "oslo_p50_ms": percentile(other, 0.5),
        "oslo_p99_ms": percentile(other, 0.99),
        "half_load_per_s": rounded(rate / 2),
        "calls_at_half_load": len(mine),
        "rounds": {side.name: [rounded(rate) for rate in side.rates] for side in sides},
        "cpu_ms_per_call": {
            side.name: rounded(1000 * cpu[side.name] / (sum(side.rates) * options.seconds)) for side in sides
        },
        "prefetch": options.prefetch,
        "window": options.window,
        "oslo_messaging": NEW if not options.oslo_python else options.oslo_python,
    }


def table(result: Result) -> Sequence[Sequence[object]]:
    return [
        ("side", "calls/s", "p50 ms", "p99 ms"),
        ("reeve", result["reeve_per_s"], result["p50_ms"], result["p99_ms"]),
        ("oslo.messaging", result["oslo_per_s"], result["oslo_p50_ms"], result["oslo_p99_ms"]),
    ]


def main() -> int:
    made = parser(__doc__)
    made.add_argument("--rounds", type=count, default=5, help="of each side, in turns (%(default)s)")
    made.add_argument("--seconds", type=positive, default=5.0, help="of each round (%(default)s)")
    made.add_argument("--prefetch", type=count, default=100, help="messages a server holds (%(default)s)")
    made.add_argument("--window", type=count, default=100, help="calls under way in a round (%(default)s)")
    made.add_argument("--oslo-python", metavar="FILE", help="a Python that has oslo.messaging; else one is made")
    return run(made.parse_args(), "rpc", measure, table)


if __name__ == "__main__":
    sys.exit(main())
