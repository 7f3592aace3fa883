"""A flood of instructions onto one agent: is its memory flat, is each done once, is each answered.

Everything is sent at once, as fast as the broker takes it, to the queue of one agent (fake driver, real RabbitMQ on
loopback, durable journal). Each instruction adds a mark to a file that only grows; one in ``--repeat-every`` is sent
twice with the same id. ``--kills`` times the agent is killed by SIGKILL on the way, and started again.

Counted at the end, or the benchmark fails: every instruction has its mark, once, and its row in the journal, finished;
every id has an answer, several of one id agree; queue, outbox and quarantine are empty. ``memory`` is the agent's
anonymous memory, twice a second: ``slope`` is KiB for each 1000 answers, the first tenth left out.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import os
import sqlite3
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import amqp
from common import BenchFailed, Result, count, parser, rounded, run, say
from fleet import ROOT, Sampler, clean_env, lay_plugin, until

sys.path.insert(0, str(ROOT / "tests" / "integration"))

from rabbitmq import Rabbit, RabbitMissing, private_broker

HOST = "node1"
QUEUE = f"reeve.{HOST}"
READY_SECONDS = 60.0
SILENCE_SECONDS = 60.0
END_SECONDS = 30.0
SAY_SECONDS = 10.0
NAMESPACE = uuid.UUID("6f2f3a0e-6f0a-4f6e-9d0e-5b9b8d0c0a11")


class Agent:
    """The agent under the flood."""

    def __init__(self, folder: Path, rabbit: Rabbit, options: argparse.Namespace) -> None:
        self._folder = folder
        self._env = clean_env() | {"PYTHONPATH": lay_plugin(folder / "plugin", "tally", "flood_tally", "Tally")}
        self._command = [
            sys.executable, "-m", "agent.service", "--agent-state-dir", str(folder / "state"), "--agent-host", HOST,
            "--log-file", str(folder / "agent.log"), "--broker-url", rabbit.url, "--driver-name", "fake",
            "--broker-prefetch", str(options.prefetch), "--oslo-noenabled",
        ]  # fmt: skip
        self.process: subprocess.Popen[bytes]

    @property
    def journal(self) -> Path:
        return self._folder / "state" / "agent" / "journal.sqlite"

    def start(self) -> None:
        with open(self._folder / "agent.output", "ab") as output:
            self.process = subprocess.Popen(
                self._command, env=self._env, cwd=self._folder, stdout=output, stderr=subprocess.STDOUT
            )

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(10)

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            self.kill()

    def cpu_seconds(self) -> float:
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Flood:
    """Who sends, and who counts the answers: two connections, so that neither waits for the other."""

    def __init__(self, rabbit: Rabbit, total: int, repeat_every: int, marks: Path) -> None:
        self._rabbit = rabbit
        self._total = total
        self._repeat_every = repeat_every
        self._marks = marks
        self.sent = 0
        self.send_seconds = 0.0
        self.failure: Exception | None = None
        self.answers: collections.Counter[str] = collections.Counter()
        self.first: dict[str, int] = {}  # hash of the first answer to each id
        self.received = 0
        self._listening = self._connect()
        self._reply_q = f"reeve.reply.{uuid.uuid4().hex}"
        channel = self._listening.channel()
        channel.queue_declare(QUEUE, durable=True, auto_delete=False)
        channel.queue_declare(self._reply_q, durable=False, exclusive=True, auto_delete=True)
        channel.basic_qos(0, 500, False)
        channel.basic_consume(self._reply_q, no_ack=True, callback=self._on_reply)
        self._channel = channel

    def _connect(self) -> amqp.Connection:
        made = amqp.Connection(f"127.0.0.1:{self._rabbit.port}", "guest", "guest", heartbeat=0)
        made.connect()
        return made

    def close(self) -> None:
        self._listening.close()

    def send_all(self) -> None:
        """For a thread of its own."""
        try:
            start = time.perf_counter()
            connection = self._connect()
            channel = connection.channel()
            for number in range(self._total):
                message = self._message(number)
                repeats = 2 if number % self._repeat_every == 0 else 1
                for _ in range(repeats):
                    channel.basic_publish(message, exchange="", routing_key=QUEUE)
                    self.sent += 1
            connection.close()  # answered by the broker after all that was sent before
            self.send_seconds = time.perf_counter() - start
        except Exception as exc:
            self.failure = exc

    def _message(self, number: int) -> amqp.Message:
        body = {
            "reeve": "1.0", "id": ident(number), "verb": "tally", "host": HOST, "reply_to": self._reply_q,
            "args": {"n": number, "file": str(self._marks)},
        }  # fmt: skip
        return amqp.Message(json.dumps(body), content_type="application/json", delivery_mode=2)

    def _on_reply(self, message: Any) -> None:
        reply = json.loads(message.body)
        if not reply["ok"]:
            raise BenchFailed(f"an instruction failed: {reply['error']}")
        self.received += 1
        self.answers[reply["id"]] += 1
        if self.first.setdefault(reply["id"], hash(message.body)) != hash(message.body):
            raise BenchFailed(f"instruction {reply['id']} has two different answers")

    def wait(self, seconds: float) -> bool:
        """Take in a reply within `seconds`; False when none came."""
        if self.failure is not None:
            raise BenchFailed(f"sending failed: {self.failure}")
        try:
            self._listening.drain_events(timeout=seconds)
        except TimeoutError:
            return False
        return True

    def consumers(self) -> int:
        return int(self._channel.queue_declare(QUEUE, passive=True).consumer_count)

    def left_in_queue(self) -> int:
        return int(self._channel.queue_declare(QUEUE, passive=True).message_count)


def ident(number: int) -> str:
    return str(uuid.uuid5(NAMESPACE, str(number)))


def measure(options: argparse.Namespace, folder: Path) -> Result:
    broker_folder = folder / "rabbit"
    broker_folder.mkdir()
    try:
        with private_broker(broker_folder) as rabbit:
            return flooded(options, folder, rabbit)
    except RabbitMissing as exc:
        raise BenchFailed(str(exc)) from exc


def flooded(options: argparse.Namespace, folder: Path, rabbit: Rabbit) -> Result:
    marks = folder / "marks"
    total = options.count
    messages = total + len(range(0, total, options.repeat_every))
    agent = Agent(folder, rabbit, options)
    with contextlib.ExitStack() as stack:
        flood = Flood(rabbit, total, options.repeat_every, marks)
        stack.callback(flood.close)
        agent.start()
        stack.callback(agent.stop)
        if not until(lambda: flood.consumers() or agent.process.poll() is not None, READY_SECONDS):
            raise BenchFailed(f"the agent took no instructions within {READY_SECONDS:.0f} s")
        if agent.process.poll() is not None:
            raise BenchFailed(f"the agent ended with {agent.process.returncode}; --keep keeps its output")
        sender = threading.Thread(target=flood.send_all, name="sender", daemon=True)
        sampler = stack.enter_context(Sampler(lambda: agent.process.pid, lambda: flood.received / 1000))
        cpu, start = agent.cpu_seconds(), time.perf_counter()
        sender.start()
        deepest = receive(flood, agent, total, options.kills)
        seconds = time.perf_counter() - start
        used = agent.cpu_seconds() - cpu
        sender.join(END_SECONDS)
        until(lambda: flood.left_in_queue() == 0, END_SECONDS)
        left = flood.left_in_queue()
        memory = sampler.result()
        agent.stop()  # what still waits to be sent is
    counted = audit(agent.journal, marks, total, flood)
    wrong = [name for name, value in counted.items() if name in MUST_BE_NONE and value]
    if left or wrong or counted["marks"] != total or counted["finished"] != total:
        raise BenchFailed(f"not once each: {counted}, {left} messages left in the queue")
    return {
        "instructions": total,
        "messages": messages,
        "seconds": rounded(seconds),
        "per_s": rounded(messages / seconds),
        "send_per_s": rounded(messages / flood.send_seconds),
        "deepest_queue": deepest,
        "kills": options.kills,
        "prefetch": options.prefetch,
        "memory": memory,
        "cpu_ms_each": None if options.kills else rounded(1000 * used / messages),
        "journal_mib": rounded(agent.journal.stat().st_size / 2**20),
    } | counted


def receive(flood: Flood, agent: Agent, total: int, kills: int) -> int:
    """Until every instruction has an answer; the agent is killed on the way. Most messages that lay in the queue."""
    at = collections.deque(total * (n + 1) // (kills + 1) for n in range(kills))
    silent_since, said, deepest = time.monotonic(), time.monotonic(), 0
    while len(flood.answers) < total:
        if flood.wait(1.0):
            silent_since = time.monotonic()
        elif agent.process.poll() is not None:
            raise BenchFailed(f"the agent has ended: {agent.process.returncode}")
        elif time.monotonic() - silent_since > SILENCE_SECONDS:
            raise BenchFailed(f"{total - len(flood.answers)} instructions have no answer after {SILENCE_SECONDS:.0f} s")
        if at and flood.received >= at[0]:
            at.popleft()
            agent.kill()
            agent.start()
            say(f"killed and started again after {flood.received} answers")
        if time.monotonic() - said >= SAY_SECONDS:
            said = time.monotonic()
            depth = flood.left_in_queue()
            deepest = max(deepest, depth)
            say(f"{flood.received} answers, {flood.sent} sent, {depth} in the queue")
    return deepest


MUST_BE_NONE = ("lost", "twice", "unanswered", "unfinished", "outbox", "quarantine")


def audit(journal: Path, marks: Path, total: int, flood: Flood) -> Result:
    """What the file of marks, the journal and the answers say, each counted on its own."""
    seen = collections.Counter(int(line) for line in marks.read_bytes().split())
    db = sqlite3.connect(journal)
    try:
        finished, unfinished = (
            db.execute(f"SELECT count(*) FROM instructions WHERE finished IS {what} NULL").fetchone()[0]
            for what in ("NOT", "")
        )
        outbox, quarantine = (
            db.execute(f"SELECT count(*) FROM {table}").fetchone()[0] for table in ("outbox", "quarantine")
        )
        steps = db.execute("SELECT count(*) FROM steps WHERE state = 'done'").fetchone()[0]
    finally:
        db.close()
    return {
        "marks": sum(seen.values()),
        "lost": sum(1 for number in range(total) if number not in seen),
        "twice": sum(times - 1 for times in seen.values()),
        "finished": finished,
        "steps_done": steps,
        "unfinished": unfinished,
        "outbox": outbox,
        "quarantine": quarantine,
        "unanswered": sum(1 for number in range(total) if ident(number) not in flood.answers),
        "answers": flood.received,
    }


def table(result: Result) -> Sequence[Sequence[object]]:
    memory = result["memory"]
    return [
        ("instructions", "a second", "lost", "twice", "peak MiB", "KiB for 1000"),
        (
            result["instructions"], result["per_s"], result["lost"], result["twice"], memory.get("peak_mib"),
            memory.get("slope"),
        ),
    ]  # fmt: skip


def many(text: str) -> int:
    """An option's value: a whole number from 1 to 10 million."""
    value = int(text)
    if not 1 <= value <= 10_000_000:
        raise argparse.ArgumentTypeError(f"{text}: give 1 to 10000000")
    return value


def few(text: str) -> int:
    """An option's value: a whole number from 0 to 100."""
    return 0 if text == "0" else count(text)


def main() -> int:
    made = parser(__doc__)
    made.add_argument("--count", type=many, default=100_000, help="instructions (%(default)s)")
    made.add_argument("--prefetch", type=count, default=100, help="messages the agent holds (%(default)s)")
    made.add_argument("--kills", type=few, default=0, help="SIGKILLs of the agent on the way (%(default)s)")
    made.add_argument("--repeat-every", type=many, default=100, metavar="N", help="one in N comes twice (%(default)s)")
    return run(made.parse_args(), "flood", measure, table)


if __name__ == "__main__":
    sys.exit(main())
