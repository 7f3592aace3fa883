"""A whole agent while its journal fails: nothing is lost, nothing done twice, and it is well again without help."""

from __future__ import annotations

import contextlib
import json
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from faulty_db import Disk, use_faulty_disk

from agent import conf
from agent.errors import JournalCorrupt, JournalError
from agent.health import Health
from agent.journal import Journal
from agent.monitor import Monitor
from agent.rpc import connection as broker
from agent.rpc.client import Client
from agent.service import Service, main
from agent.wire import Instruction
from hypervisor.toolstack.drivers.fake import FakeToolstack

WAIT = 60.0


def until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < end
        threading.Event().wait(0.01)


class Agent:
    """With its main thread."""

    def __init__(self, folder: Path, toolstack: FakeToolstack) -> None:
        argv = ["--agent-state-dir", str(folder / "state"), "--agent-host", "node1", "--broker-poll-seconds", "0.01"]
        self.service = Service(conf.load([], argv), toolstack)
        self.service.start()
        self.house = threading.Thread(target=self._main)
        self.house.start()
        self.ended: Exception | None = None

    def _main(self) -> None:
        try:
            self.service.run()
        except Exception as exc:
            self.ended = exc

    def close(self) -> None:
        self.service.stop()
        self.house.join(WAIT)
        self.service.close()

    def health(self, page: str) -> tuple[int, dict[str, Any]]:
        monitor: Monitor = self.service.monitor
        answer = monitor._pages[page]()
        return answer.status, json.loads(answer.body)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    for name in (
        "agent.dispatcher.RETRY_SECONDS",
        "agent.rpc.consumer.JOURNAL_PAUSE",
        "agent.rpc.publisher.JOURNAL_PAUSE",
    ):
        monkeypatch.setattr(name, 0.05)
    monkeypatch.setattr("agent.service.SIGNAL_SECONDS", 0.05)
    return use_faulty_disk(monkeypatch)


@pytest.fixture
def toolstack() -> FakeToolstack:
    return FakeToolstack(None)


@pytest.fixture
def agent(tmp_path: Path, disk: Disk, toolstack: FakeToolstack) -> Iterator[Agent]:
    made = Agent(tmp_path, toolstack)
    yield made
    made.close()


@pytest.fixture
def client(agent: Agent) -> Iterator[Client]:
    with Client(agent.service.settings.broker_url, "node1") as made:
        yield made


@pytest.fixture
def kernel(tmp_path: Path) -> str:
    path = tmp_path / "vmlinuz"
    if not path.exists():  # an instruction may be reading it
        path.write_bytes(b"\x7fELF" + bytes(1000))
    return str(path)


def degraded(agent: Agent, why: str) -> None:
    status, body = agent.health("/readyz")
    assert (status, body["status"]) == (503, "degraded") and why in body["checks"]["disk"], body
    status, body = agent.health("/healthz")
    assert (status, body["status"]) == (200, "ok"), "a new start would help nothing"


def well(agent: Agent) -> None:
    until(lambda: agent.health("/readyz")[0] == 200)
    assert agent.health("/readyz")[1]["status"] == "ok" and agent.ended is None
    until(lambda: agent.service.journal.counts()["unfinished"] == agent.service.journal.counts()["outbox"] == 0)
    assert agent.service.journal.counts()["claims"] == 0


def names(toolstack: FakeToolstack) -> list[str]:
    return sorted(info.name for info in toolstack.list_domains())


def test_instructions_that_come_while_the_disk_is_full(
    agent: Agent, disk: Disk, client: Client, toolstack: FakeToolstack, kernel: str
) -> None:
    disk.full()
    args = {"memory_mib": 64, "kernel": kernel}
    idents = [client.send("create", args | {"name": f"web{number}"}) for number in range(5)]
    client.send("create", args | {"name": "web0"}, instruction_id=idents[0])  # its sender lost patience
    disk.until_refused(3)
    degraded(agent, "make room on its disk")
    assert names(toolstack) == [], "nothing is begun that is not in the journal"
    folder = broker.folder(agent.service.settings.broker_url)
    queued = [path for path in folder.glob("*/*.msg") if ".reeve.node1." in path.name]
    assert len(queued) == 6, "and nothing is acknowledged"
    disk.well()
    for ident in idents:
        assert client.wait(ident, WAIT).ok
    assert names(toolstack) == [f"web{number}" for number in range(5)], "each once"
    well(agent)


@pytest.mark.parametrize(
    "at", ["create:planned", "create:build:begun", "create:build:ran", "create:start:done", "create:finishing"]
)
def test_the_disk_fills_up_in_the_middle_of_an_instruction(
    agent: Agent,
    disk: Disk,
    client: Client,
    toolstack: FakeToolstack,
    kernel: str,
    monkeypatch: pytest.MonkeyPatch,
    at: str,
) -> None:
    reached: list[str] = []

    def boundary(name: str) -> None:
        if name == at and not reached:
            reached.append(name)
            disk.full()

    monkeypatch.setattr("agent.executor.boundary", boundary)
    ident = client.send("create", {"name": "web", "memory_mib": 64, "kernel": kernel})
    until(lambda: reached)
    disk.until_refused(3)
    degraded(agent, "make room on its disk")
    disk.well()
    reply = client.wait(ident, WAIT)
    assert reply.ok, reply.error
    assert names(toolstack) == ["web"]
    assert [step["state"] for step in reply.steps] == ["done"] * len(reply.steps)
    well(agent)


def test_a_disk_that_is_full_while_something_is_undone(
    agent: Agent, disk: Disk, client: Client, toolstack: FakeToolstack, kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def boundary(name: str) -> None:
        if name == "create:build:ran":
            raise RuntimeError("no")
        if name == "create:build:undoing" and not disk.refused:
            disk.full()

    monkeypatch.setattr("agent.executor.boundary", boundary)
    ident = client.send("create", {"name": "web", "memory_mib": 64, "kernel": kernel})
    disk.until_refused(3)
    disk.well()
    reply = client.wait(ident, WAIT)
    assert reply.error is not None and reply.error["undone"]
    assert names(toolstack) == []
    well(agent)


def test_another_process_holds_the_journal(agent: Agent, client: Client, toolstack: FakeToolstack, kernel: str) -> None:
    journal = agent.service.journal
    with journal._group._lock:
        journal._db.execute("PRAGMA busy_timeout=20")
    other = sqlite3.Connection(journal.path, isolation_level=None)
    other.execute("PRAGMA busy_timeout=10000")
    other.execute("BEGIN IMMEDIATE")
    ident = client.send("create", {"name": "web", "memory_mib": 64, "kernel": kernel})
    until(lambda: journal.trouble)
    degraded(agent, "another process holds it")
    assert agent.service.publisher.connected.is_set(), "the broker is not to blame"
    other.execute("ROLLBACK")
    other.close()
    assert client.wait(ident, WAIT).ok and names(toolstack) == ["web"]
    well(agent)


def test_an_idle_agent_sees_by_itself_that_the_fault_is_gone(agent: Agent, disk: Disk) -> None:
    disk.full()
    with contextlib.suppress(Exception):
        agent.service.journal.probe()
    degraded(agent, "full")
    disk.until_refused(1)
    disk.well()
    well(agent)


def test_a_journal_that_cannot_even_be_read_is_no_reason_to_start_anew(
    agent: Agent, monkeypatch: pytest.MonkeyPatch
) -> None:
    def counts() -> dict[str, int]:
        raise JournalError("not now: wait")

    monkeypatch.setattr(agent.service.journal, "counts", counts)
    assert Health(agent.service).live()["journal"]() == ""
    status, body = agent.health("/readyz")
    assert status == 503 and body["status"] == "degraded" and "not now" in body["checks"]["disk"]


def test_damage_that_only_the_publisher_sees_ends_the_agent(
    agent: Agent, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    def outbox(limit: int = 100) -> list[Any]:
        raise JournalCorrupt("the journal is damaged: restore it")

    monkeypatch.setattr(agent.service.journal, "outbox", outbox)
    agent.service.publisher.wake()
    agent.house.join(WAIT)
    assert isinstance(agent.ended, JournalCorrupt)
    assert agent.health("/healthz")[0] == 503


@pytest.mark.parametrize("damage", ["header", "args"])
def test_a_damaged_journal_is_refused_at_the_start_with_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    argv = ["--agent-state-dir", str(tmp_path / "state"), "--agent-host", "node1", "--driver-name", "fake"]
    settings = conf.load([], argv)
    journal = Journal(settings.journal_path)
    journal.accept(Instruction("id-1", "list", "node1", {}, ""))
    if damage == "args":
        journal._db.execute("UPDATE instructions SET args = '{'")
    journal.close()
    if damage == "header":
        settings.journal_path.write_bytes(b"\xa5" * 4096)
    before = settings.journal_path.read_bytes()
    assert main(argv) == 1
    (said,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("reeve-agent: ")]
    assert said.startswith("reeve-agent: journal.corrupt: ") and "move it away" in said
    if damage == "header":
        assert settings.journal_path.read_bytes() == before
