"""The agent on a real RabbitMQ: what production runs on."""

from __future__ import annotations

import json
import os
import threading
import time
import uuid
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import kombu
import pytest
from agent_process import HOST, AgentProcess
from authority import Authority
from rabbitmq import Rabbit

from agent import conf, wire
from agent.cli.main import main
from agent.errors import BrokerError
from agent.journal import Journal
from agent.rpc import connection as broker
from agent.rpc.client import Client
from agent.rpc.publisher import Publisher
from agent.service import Service
from hypervisor.toolstack.api import DomainState
from hypervisor.toolstack.drivers.fake import FakeToolstack

WAIT = 30.0
QUEUE = wire.queue_name(HOST)


def until(condition: Callable[[], Any], seconds: float = WAIT) -> Any:
    end = time.monotonic() + seconds
    while not (got := condition()):
        assert time.monotonic() < end, f"did not happen within {seconds} s"
        threading.Event().wait(0.05)
    return got


@pytest.fixture
def url(rabbit: Rabbit) -> Iterator[str]:
    """The broker with an empty instruction queue."""
    with broker.connect(rabbit.url) as connection:
        broker.instruction_queue(HOST)(connection.channel()).delete()
    yield rabbit.url


@pytest.fixture
def service(tmp_path: Path, url: str) -> Iterator[Service]:
    options = ["--agent-state-dir", str(tmp_path / "state"), "--agent-host", HOST, "--broker-url", url]
    made = Service(conf.load([], [*options, "--broker-prefetch", "4"]), FakeToolstack(None))
    made.start()
    until(made.consumer.connected.is_set)
    yield made
    made.close()


@pytest.fixture
def client(url: str) -> Iterator[Client]:
    with Client(url, HOST) as made:
        yield made


@pytest.fixture
def agent(tmp_path: Path, url: str) -> Iterator[AgentProcess]:
    made = AgentProcess(tmp_path, url)
    yield made
    if made.process is not None:
        made.stop()


def kernel(tmp_path: Path) -> str:
    path = tmp_path / "vmlinuz"
    if not path.exists():  # an instruction may be reading it
        path.write_bytes(b"\x7fELF" + bytes(1000))
    return str(path)


def depth(url: str, queue: str) -> tuple[int, int]:
    """(messages ready, consumers) of a queue."""
    with broker.connect(url) as connection:
        declared = kombu.Queue(queue, channel=connection.channel()).queue_declare(passive=True)
        return declared.message_count, declared.consumer_count


def test_the_life_of_a_domain(service: Service, client: Client, tmp_path: Path) -> None:
    reply = client.call("create", {"name": "web", "memory_mib": 64, "kernel": kernel(tmp_path)}, timeout=WAIT)
    assert reply.ok and reply.result is not None, reply.error
    domain = {"uuid": reply.result["domain"]["uuid"]}
    for verb in ("pause", "unpause", "reboot", "show", "console_log", "shutdown"):
        assert client.call(verb, domain, timeout=WAIT).ok, verb
    assert service.toolstack.list_domains() == []
    assert service.journal.counts()["unfinished"] == 0


def test_the_same_id_gets_the_same_answer(service: Service, client: Client, tmp_path: Path) -> None:
    args = {"name": "web", "memory_mib": 64, "kernel": kernel(tmp_path)}
    ident = client.send("create", args)
    first = client.wait(ident, WAIT)
    for _ in range(3):
        client.send("create", args, instruction_id=ident)
        assert client.wait(ident, WAIT) == first
    assert len(service.toolstack.list_domains()) == 1


def test_reports_by_topic(service: Service, client: Client, tmp_path: Path) -> None:
    seen: list[wire.Report] = []
    client.listen(seen.append, f"*.{HOST}")
    client.call("create", {"name": "web", "memory_mib": 64, "kernel": kernel(tmp_path)}, timeout=WAIT)

    def reported() -> bool:
        client.drain(0.05)
        kinds = {report.data.get("event") for report in seen if report.kind == "lifecycle"}
        return "created" in kinds and any(r.kind == "capacity" and r.data["domains"] == 1 for r in seen)

    until(reported)


BAD = [
    (b"not JSON", {}, "message.not_json"),
    (b"[" * 10_000, {}, "message.too_deep"),
    (b" " * (100 << 20), {}, "message.too_large"),
    (zlib.compress(b"[" * (64 << 20)), {"compression": "application/x-gzip"}, "message.unsupported_encoding"),
    (json.dumps({"reeve": "3.0"}).encode(), {}, "message.unsupported_version"),
]


@pytest.mark.parametrize(("body", "headers", "code"), BAD, ids=[row[2] for row in BAD])
def test_bad_messages_are_answered_and_leave_nothing(
    service: Service, client: Client, url: str, body: bytes, headers: dict[str, str], code: str
) -> None:
    ident = str(uuid.uuid4())
    client.send_raw(body, correlation_id=ident, headers=headers)
    reply = client.wait(ident, WAIT)
    assert reply.error is not None and reply.error["code"] == code, reply.error
    counts = service.journal.counts()
    assert (counts["unfinished"], counts["claims"], counts["quarantine"]) == (0, 0, 1)
    assert client.call("list", timeout=WAIT).ok


def test_prefetch_bounds_what_the_agent_holds(
    service: Service, client: Client, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service.consumer, "_room", lambda: 0)
    idents = [client.send("list") for _ in range(10)]
    until(lambda: depth(url, QUEUE)[0] == 6)
    monkeypatch.undo()
    assert all(client.wait(ident, WAIT).ok for ident in idents)
    assert depth(url, QUEUE) == (0, 1)


def test_a_reply_nobody_takes_is_given_up_and_kept_for_a_repeat(tmp_path: Path, url: str) -> None:
    journal = Journal(tmp_path / "journal.sqlite")
    publisher = Publisher(url, journal, reply_seconds=0.0)
    publisher.start()
    journal.enqueue(wire.encode_reply(wire.Reply("id-1", HOST), "reeve.reply.nobody"))
    publisher.wake()
    until(lambda: journal.counts()["outbox"] == 0)
    patient = Publisher(url, journal, reply_seconds=60.0)
    publisher.stop()
    patient.start()
    with Client(url, HOST) as client:
        journal.enqueue(wire.encode_reply(wire.Reply("id-2", HOST), "reeve.reply.nobody"))
        journal.enqueue(wire.encode_reply(wire.Reply("id-3", HOST), client.reply_to))
        patient.wake()
        assert client.wait("id-3", WAIT).ok, "one returned reply does not hold up the others"
    until(lambda: journal.counts()["outbox"] == 1)  # id-3 goes from it a moment after it was sent
    patient.stop()
    journal.close()


def test_a_queue_deleted_under_the_agent_comes_back(service: Service, url: str) -> None:
    with broker.connect(url) as connection:
        broker.instruction_queue(HOST)(connection.channel()).delete()
    with Client(url, HOST) as client:
        assert client.call("list", timeout=WAIT).ok


def test_broker_killed_and_started(agent: AgentProcess, rabbit: Rabbit) -> None:
    """Instructions waiting at the broker, in the agent and in its outbox all get their answer."""
    agent.start()
    args = {"name": "web", "memory_mib": 64, "kernel": agent.kernel()}
    with agent.client() as client:
        ident = client.send("create", args)
        assert client.wait(ident, WAIT).ok
    rabbit.kill()
    with pytest.raises(BrokerError, match="is it running"):
        Client(rabbit.url, HOST)
    rabbit.start()
    with agent.client() as client:
        client.send("create", args, instruction_id=ident)
        assert client.wait(ident, WAIT).ok
        reply = client.call("list", timeout=WAIT)
    assert reply.result is not None and len(reply.result["domains"]) == 1
    assert agent.process is not None and agent.process.poll() is None


def test_a_broker_that_comes_late(tmp_path: Path, agent: AgentProcess, rabbit: Rabbit) -> None:
    rabbit.kill()
    agent.start()
    until(lambda: "trying again" in agent.log)
    rabbit.start()
    with agent.client() as client:
        assert client.call("list", timeout=WAIT).ok


@pytest.mark.parametrize(
    "boundary",
    [
        "consumer:taken",
        "consumer:journalled",
        "consumer:acked",
        "create:build:begun",
        "create:build:ran",
        "create:finished",
        "publisher:before",
        "publisher:published",
    ],
)
def test_create_killed_at(agent: AgentProcess, url: str, boundary: str) -> None:
    args = {"name": "web", "memory_mib": 64, "kernel": agent.kernel()}
    with agent.client() as client:
        agent.start(boundary)
        ident = client.send("create", args)
        agent.wait_killed()
        agent.start()
        reply = client.wait(ident, WAIT)
        client.send("create", args, instruction_id=ident)
        assert client.wait(ident, WAIT) == reply and reply.ok, reply.error
        # A reply sent twice may answer before the repeated instruction is taken.
        until(lambda: depth(url, QUEUE) == (0, 1))
    assert agent.stop() == 0
    (domain,) = agent.toolstack().list_domains()
    assert (domain.state, domain.domid) == (DomainState.RUNNING, 1)
    assert depth(url, QUEUE) == (0, 0)


def test_an_idle_agent_does_not_burn_the_cpu(agent: AgentProcess) -> None:
    agent.start()
    with agent.client() as client:
        assert client.call("list", timeout=WAIT).ok
    assert agent.process is not None
    before, started = _cpu_seconds(agent.process.pid), time.monotonic()
    until(lambda: time.monotonic() - started > 2)
    used = _cpu_seconds(agent.process.pid) - before
    assert used / (time.monotonic() - started) < 0.1


def test_a_second_agent_of_one_name_takes_nothing(service: Service, client: Client, tmp_path: Path, url: str) -> None:
    options = ["--agent-state-dir", str(tmp_path / "second"), "--agent-host", HOST, "--broker-url", url]
    second = Service(conf.load([], options), FakeToolstack(None))
    second.start()
    until(second.publisher.connected.is_set)
    assert all(client.call("list", timeout=WAIT).ok for _ in range(4))
    assert not second.consumer.connected.is_set() and depth(url, QUEUE) == (0, 1)
    service.close()
    until(second.consumer.connected.is_set)
    second.close()


def test_agent_and_command_over_tls(
    agent: AgentProcess, rabbit: Rabbit, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each shows a certificate of its own and has the broker's checked; the wrong ones are told why."""
    ours, other = rabbit.authority.host("node1"), Authority(tmp_path, "other")
    config = tmp_path / "agent.conf"
    written = (
        f"[agent]\nhost = {HOST}\n[broker]\nurl = {rabbit.tls_url}\ntls_ca_file = {ours.ca}\n"
        f"tls_certificate_file = {ours.certificate}\ntls_key_file = {ours.key}\n"
    )
    config.write_text(written)
    agent.broker_url = rabbit.tls_url
    agent.start("", "--config-file", str(config))
    command = ["instruct", "list", "--config-file", str(config), "-f", "json", "--timeout", "20"]
    assert main(command) == 0, capsys.readouterr().err
    assert json.loads(capsys.readouterr().out)["ok"] is True

    config.write_text(written.replace(ours.ca, str(other.ca)))
    assert main(command) == 1
    assert "the broker's certificate is refused" in json.loads(capsys.readouterr().err)["error"]["message"]
    config.write_text(written.partition("tls_certificate_file")[0])
    assert main(command) == 1
    assert "it may want a client certificate" in json.loads(capsys.readouterr().err)["error"]["message"]
    assert agent.stop() == 0


def _cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
