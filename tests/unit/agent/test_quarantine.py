"""Refused messages: what is kept of them and how much, and the way back in, which carries nothing out twice."""

from __future__ import annotations

import base64
import dataclasses
import datetime
import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from agent_rig import HOST, Rig

from agent import conf, oslo
from agent.cli.main import main
from agent.control import Control
from agent.dispatcher import Dispatcher
from agent.errors import InstructionError, MessageError
from agent.journal import Journal
from agent.journal.quarantine import Limits
from agent.rpc.client import Client
from agent.service import Service
from agent.wire import Raw
from hypervisor.toolstack.drivers.fake import FakeToolstack

IDENT = "6f3ad3d5-6d2f-4c39-9a29-3d6de4a0a001"
WHY = MessageError("it is not wanted", code="message.bad_field")


def until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end, "did not happen within 10 s"
        threading.Event().wait(0.005)


def journal_with(folder: Path, **limits: Any) -> tuple[Journal, list[float]]:
    clock = [1000.0]
    return Journal(folder / "j.sqlite", lambda: clock[0], Limits(**limits), lambda: clock[0]), clock


def numbers(journal: Journal) -> list[int]:
    return [kept.seq for kept in journal.refused.all()]


def test_a_message_is_kept_as_it_came(tmp_path: Path) -> None:
    journal, _ = journal_with(tmp_path)
    raw = Raw(
        b"\xff" * 300000,
        300000,
        "application/json",
        "utf-8",
        {"compression": "gzip", "n": 3},
        "reply.queue",
        "corr",
        oslo.DIALECT,
        "5000",
    )
    journal.quarantine(raw, WHY, None)
    journal.close()
    (kept,) = Journal(tmp_path / "j.sqlite").refused.all()
    assert kept.raw == raw and kept.whole and kept.received == 1000.0
    assert (kept.code, kept.reason) == ("message.bad_field", "it is not wanted")


@pytest.mark.parametrize(
    ("raw", "body"),
    [
        (Raw(b"x" * 2000, 2000), 1000),
        (Raw(b"x" * 10, 100 << 20), 10),
        (Raw(b"x", 1, headers={"when": datetime.datetime.now()}), 1),
        (Raw(b"x", 1, headers={"much": "y" * 100000}), 1),
        (Raw(b"x", 1, headers={"number": float("nan")}), 1),
    ],
)
def test_what_is_not_kept_whole_says_so(tmp_path: Path, raw: Raw, body: int) -> None:
    journal, _ = journal_with(tmp_path, body_bytes=1000)
    journal.quarantine(raw, WHY, None)
    (kept,) = journal.refused.all()
    assert not kept.whole and len(kept.raw.body) == body and kept.raw.size == raw.size
    with pytest.raises(InstructionError) as caught:
        Control(journal).retry(kept.seq)
    assert caught.value.code == "quarantine.incomplete"


def test_it_is_bounded_in_number_bytes_and_age(tmp_path: Path) -> None:
    journal, clock = journal_with(tmp_path, messages=3, bytes=1000, keep_seconds=60)
    for _ in range(5):
        journal.quarantine(Raw(b"x" * 100, 100), WHY, None)
    assert numbers(journal) == [3, 4, 5]
    journal.quarantine(Raw(b"x" * 850, 850), WHY, None)
    assert numbers(journal) == [5, 6]
    assert journal.refused.totals() == {"bytes": 950.0, "oldest_seconds": 0.0, "dropped_total": 4.0}
    clock[0] += 59
    journal.forget()
    assert numbers(journal) == [5, 6] and journal.refused.totals()["oldest_seconds"] == 59.0
    clock[0] += 2
    journal.forget()
    assert journal.refused.totals() == {"bytes": 0.0, "oldest_seconds": 0.0, "dropped_total": 6.0}
    with journal._read() as db:
        rows = dict(db.execute("SELECT key, value FROM meta WHERE key LIKE 'quarantine%'"))
    assert {key: int(value) for key, value in rows.items()} == {
        "quarantine_dropped_number": 3,
        "quarantine_dropped_bytes": 1,
        "quarantine_dropped_age": 2,
    }


class Agent:
    """The parts that a message passes, with an executor that only notes what would be run."""

    def __init__(self, rig: Rig) -> None:
        self.rig = rig
        self.ran: list[str] = []
        self.control = Control(rig.journal)
        self.control.dispatcher = self.dispatcher = self.start(HOST)

    def start(self, host: str) -> Dispatcher:
        made = Dispatcher(host, self.rig.journal, self.rig.verbs, self, self.rig.stopping)  # type: ignore[arg-type]
        made.start()
        return made

    def run(self, ident: str, stored: object = None) -> bool:
        self.ran.append(ident)
        return False

    def retry(self, seq: int) -> dict[str, Any]:
        return self.control.retry(seq)


@pytest.fixture
def agent(rig: Rig) -> Iterator[Agent]:
    made = Agent(rig)
    yield made
    rig.stopping.set()
    assert made.control.dispatcher.drain(10) and made.dispatcher.drain(10)


def message(host: str = "node2", **fields: Any) -> Raw:
    data = {"reeve": "1.0", "id": IDENT, "verb": "list", "host": host, "args": {}, "reply_to": "r", **fields}
    body = json.dumps(data).encode()
    return Raw(body, len(body))


def rename(agent: Agent) -> None:
    """The node becomes the one that the messages are for: what was refused is right now."""
    agent.control.dispatcher = agent.start("node2")


def test_a_message_that_is_right_now_is_carried_out_once(agent: Agent) -> None:
    agent.dispatcher.receive(message(), message())
    first, second = numbers(agent.rig.journal)
    with pytest.raises(InstructionError) as caught:
        agent.retry(first)
    assert caught.value.code == "quarantine.refused_again" and "message.wrong_host" in caught.value.message
    assert numbers(agent.rig.journal) == [first, second]
    rename(agent)
    assert agent.retry(first) == {"seq": first, "outcome": "new", "id": IDENT}
    assert agent.retry(second)["outcome"] == "running"
    until(lambda: agent.ran)
    assert agent.ran == [IDENT] and numbers(agent.rig.journal) == []
    with pytest.raises(InstructionError) as caught:
        agent.retry(first)
    assert caught.value.code == "quarantine.not_found"


def test_retries_at_the_same_time_take_it_in_once(agent: Agent) -> None:
    """Also a message without an id of its own, as oslo.messaging's casts may be: the row is what counts."""
    body = json.dumps({"method": "list", "args": {}, "namespace": "theirs"}).encode()
    agent.dispatcher.receive(Raw(body, len(body), dialect=oslo.DIALECT))
    (seq,) = numbers(agent.rig.journal)
    with pytest.raises(InstructionError, match="namespace"):
        agent.retry(seq)
    agent.dispatcher._oslo_service = dataclasses.replace(oslo.SERVICE, namespaces=frozenset({"theirs"}))
    outcomes: list[str] = []

    def one() -> None:
        try:
            outcomes.append(agent.retry(seq)["outcome"])
        except InstructionError as exc:
            outcomes.append(exc.code)

    threads = [threading.Thread(target=one) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert sorted(outcomes) == ["new", *["quarantine.not_found"] * 5]
    until(lambda: agent.ran)
    assert len(agent.ran) == 1


def test_an_id_that_is_taken_stays_refused(agent: Agent) -> None:
    agent.dispatcher.receive(message(HOST), message(args={"x": 1}))
    (seq,) = numbers(agent.rig.journal)
    rename(agent)
    with pytest.raises(InstructionError, match="belongs to another instruction"):
        agent.retry(seq)
    assert [kept.code for kept in agent.rig.journal.refused.all()] == ["instruction.id_reused"]


def test_a_message_s_age_counts_from_its_arrival(agent: Agent) -> None:
    """oslo.messaging's expiration is in milliseconds from when it came, not from when it was retried."""
    body = json.dumps({"method": "list", "args": {}, "namespace": "theirs"}).encode()
    agent.dispatcher.receive(Raw(body, len(body), dialect=oslo.DIALECT, expiration="5000"))
    (kept,) = agent.rig.journal.refused.all()
    agent.dispatcher._oslo_service = dataclasses.replace(oslo.SERVICE, namespaces=frozenset({"theirs"}))
    entry = agent.rig.journal.entry(agent.retry(kept.seq)["id"])
    assert entry is not None and entry.instruction.deadline == pytest.approx(kept.received + 5, abs=0.01)


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    file = tmp_path / "agent.conf"
    file.write_text(
        f"[agent]\nhost = {HOST}\nstate_dir = {tmp_path}/state\n[driver]\nname = fake\n[quarantine]\nmax_messages = 5\n"
    )
    made = Service(conf.load([str(file)]), FakeToolstack(None))
    made.start()
    yield made
    made.close()


def test_the_commands(service: Service, capsys: pytest.CaptureFixture[str]) -> None:
    def reeve(*words: str) -> Any:
        assert main(["quarantine", *words, "--config-file", service.settings.files[0]]) == 0, capsys.readouterr().err
        return json.loads(capsys.readouterr().out)

    with Client(service.settings.broker_url, HOST) as client:
        client.send_raw(b"\xff\xfe", headers={"from": "somewhere"})
        service.dispatcher._max_message_bytes = 4000
        large = message(HOST, args={"filler": "x" * 5000}).body
        for body in (b"nonsense", large, large):
            client.send_raw(body)
        until(lambda: service.journal.counts()["quarantine"] == 4)
    rows = reeve("list", "--json")
    assert [row["code"] for row in rows] == ["message.not_json"] * 2 + ["message.too_large"] * 2
    assert all(row["whole"] and row["received"] <= time.time() for row in rows)
    shown = reeve("show", str(rows[0]["seq"]), "--json")
    assert base64.b64decode(shown["body"]) == b"\xff\xfe" and shown["headers"]["from"] == "somewhere"
    assert reeve("show", str(rows[1]["seq"]), "-f", "json")["body"] == "nonsense"
    assert reeve("drop", str(rows[0]["seq"]), "--json") == {"dropped": 1}
    service.dispatcher._max_message_bytes = 1 << 20  # as after a new start with another limit
    assert reeve("retry", str(rows[2]["seq"]), "--json")["outcome"] == "new"
    until(lambda: service.journal.counts()["unfinished"] == 0)
    assert reeve("drop", "--all", "--json") == {"dropped": 2} and reeve("list", "--json") == []
    for words, code in ((["show", "1"], 1), (["drop"], 2), (["drop", "1", "--all"], 2)):
        assert main(["quarantine", *words, "--json", "--config-file", service.settings.files[0]]) == code
        expected = "quarantine.not_found" if code == 1 else "cli.usage"
        assert json.loads(capsys.readouterr().err)["error"]["code"] == expected
