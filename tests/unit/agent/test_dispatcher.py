from __future__ import annotations

import json
import threading
import time
import uuid
from collections.abc import Callable
from typing import Any

import pytest
from agent_rig import HOST, Rig

from agent import dispatcher as module
from agent import oslo
from agent.context import Interrupted
from agent.dispatcher import Dispatcher
from agent.errors import JournalCorrupt, JournalError
from agent.heartbeats import NEVER, Heartbeats
from agent.wire import Raw

UUIDS = [str(uuid.UUID(int=n)) for n in range(4)]


class Runner:
    """Stands where the executor stands: notes what runs, and when it is let go."""

    def __init__(self, rig: Rig) -> None:
        self.rig = rig
        self.lock = threading.Condition()
        self.started: list[str] = []
        self.running: set[str] = set()
        self.most = 0
        self.gate = threading.Event()
        self.gate.set()
        self.errors: list[Exception] = []

    def run(self, ident: str, stored: object = None) -> bool:
        entry = self.rig.journal.entry(ident)
        assert entry is not None
        key = entry.instruction.args.get("uuid", "")
        with self.lock:
            self.started.append(ident)
            assert not key or key not in self.running, "two instructions of one domain at once"
            self.running.add(key or ident)
            self.most = max(self.most, len(self.running))
            self.lock.notify_all()
        self.gate.wait(10)
        with self.lock:
            self.running.discard(key or ident)
        if self.errors:
            raise self.errors.pop(0)
        return False

    def wait_started(self, count: int) -> None:
        with self.lock:
            assert self.lock.wait_for(lambda: len(self.started) >= count, 10)


@pytest.fixture
def runner(rig: Rig) -> Runner:
    return Runner(rig)


def make(rig: Rig, runner: Runner, **options: Any) -> Dispatcher:
    made = Dispatcher(HOST, rig.journal, rig.verbs, runner, rig.stopping, **options)  # type: ignore[arg-type]
    made.start()
    return made


def message(verb: str = "list", ident: str = "", **fields: Any) -> Raw:
    data = {"reeve": "1.0", "id": ident or str(uuid.uuid4()), "verb": verb, "host": HOST, "args": {}, **fields}
    body = json.dumps(data).encode()
    return Raw(body, len(body))


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        threading.Event().wait(0.005)


def end(rig: Rig, dispatcher: Dispatcher) -> None:
    rig.stopping.set()
    assert dispatcher.drain(10)


def test_one_domain_in_order_several_side_by_side(rig: Rig, runner: Runner) -> None:
    dispatcher = make(rig, runner, workers=4)
    runner.gate.clear()
    sent: dict[str, list[str]] = {key: [] for key in UUIDS[:2]}
    for _ in range(5):
        for key in UUIDS[:2]:
            ident = str(uuid.uuid4())
            sent[key].append(ident)
            dispatcher.receive(message("pause", ident, args={"uuid": key}))
    runner.wait_started(2)
    assert len(runner.started) == 2 and dispatcher.pending == 10
    runner.gate.set()
    until(lambda: dispatcher.pending == 0)
    for key in UUIDS[:2]:
        assert [ident for ident in runner.started if ident in sent[key]] == sent[key]
    assert runner.most == 2
    end(rig, dispatcher)


def test_workers_are_bounded(rig: Rig, runner: Runner) -> None:
    dispatcher = make(rig, runner, workers=3)
    runner.gate.clear()
    for _ in range(10):
        dispatcher.receive(message())
    runner.wait_started(3)
    runner.gate.set()
    until(lambda: dispatcher.pending == 0)
    assert runner.most == 3 and len(runner.started) == 10
    end(rig, dispatcher)


def test_no_room_beyond_the_limit(rig: Rig, runner: Runner) -> None:
    dispatcher = make(rig, runner, workers=1, max_pending=2)
    runner.gate.clear()
    dispatcher.receive(message())
    assert dispatcher.has_room()
    dispatcher.receive(message())
    assert not dispatcher.has_room()
    runner.gate.set()
    until(dispatcher.has_room)
    end(rig, dispatcher)


def test_a_duplicate_runs_once(rig: Rig, runner: Runner) -> None:
    dispatcher = make(rig, runner)
    raw = message(ident=UUIDS[1])
    for _ in range(3):
        dispatcher.receive(raw)
    until(lambda: dispatcher.pending == 0)
    assert runner.started == [UUIDS[1]]
    end(rig, dispatcher)


def test_an_id_with_another_content_is_refused(rig: Rig, runner: Runner) -> None:
    dispatcher = make(rig, runner)
    dispatcher.receive(message(ident=UUIDS[1]))
    dispatcher.receive(message(ident=UUIDS[1], args={"own": True}, reply_to="r"))
    (row,) = rig.journal.refused.all()
    assert row.code == "instruction.id_reused"
    assert json.loads(rig.journal.outbox()[0].body)["error"]["code"] == "instruction.id_reused"
    end(rig, dispatcher)


@pytest.mark.parametrize(
    ("raw", "code"),
    [
        (Raw(b"nonsense", 8, reply_to="r", correlation_id="c"), "message.not_json"),
        (Raw(b"x", 100 << 20, reply_to="r", correlation_id="c"), "message.too_large"),
        (Raw(b"[" * 10000, 10000, reply_to="r", correlation_id="c"), "message.too_deep"),
        (message(host="node2", reply_to="r", ident=UUIDS[2]), "message.wrong_host"),
        (message(reeve="9.0", reply_to="r", ident=UUIDS[2]), "message.unsupported_version"),
    ],
)
def test_refused_messages_are_quarantined_and_answered(rig: Rig, runner: Runner, raw: Raw, code: str) -> None:
    dispatcher = make(rig, runner)
    dispatcher.receive(raw)
    (row,) = rig.journal.refused.all()
    assert (row.code, row.answered) == (code, "r")
    (reply,) = rig.journal.outbox()
    answer = json.loads(reply.body)
    assert answer["error"]["code"] == code and answer["ok"] is False and answer["id"] in ("c", UUIDS[2])
    rig.clean()
    end(rig, dispatcher)


def test_a_refused_message_without_an_address_is_only_quarantined(rig: Rig, runner: Runner) -> None:
    dispatcher = make(rig, runner)
    dispatcher.receive(Raw(b"nonsense", 8))
    assert rig.journal.counts() == {"unfinished": 0, "outbox": 0, "claims": 0, "quarantine": 1}
    end(rig, dispatcher)


def test_a_journal_that_cannot_be_written_is_tried_again(
    rig: Rig, runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "RETRY_SECONDS", 0.01)
    runner.errors = [JournalError("disk full"), JournalError("disk full")]
    dispatcher = make(rig, runner)
    dispatcher.receive(message())
    until(lambda: dispatcher.pending == 0)
    assert len(runner.started) == 3
    end(rig, dispatcher)


def test_a_damaged_journal_ends_the_agent(rig: Rig, runner: Runner) -> None:
    fatal: list[Exception] = []
    runner.errors = [JournalCorrupt("damaged")]
    dispatcher = make(rig, runner, on_fatal=fatal.append)
    dispatcher.receive(message())
    until(lambda: bool(fatal))
    assert isinstance(fatal[0], JournalCorrupt)
    end(rig, dispatcher)


def test_a_mistake_of_ours_leaves_it_in_the_journal_and_goes_on(rig: Rig, runner: Runner) -> None:
    runner.errors = [ZeroDivisionError()]
    dispatcher = make(rig, runner)
    dispatcher.receive(message())
    dispatcher.receive(message())
    until(lambda: dispatcher.pending == 0)
    assert len(runner.started) == 2
    end(rig, dispatcher)


def test_drain_begins_nothing_more(rig: Rig, runner: Runner) -> None:
    dispatcher = make(rig, runner, workers=1)
    runner.gate.clear()
    for _ in range(3):
        dispatcher.receive(message())
    runner.wait_started(1)
    assert not dispatcher.drain(0.05)
    runner.gate.set()
    assert dispatcher.drain(10)
    assert len(runner.started) == 1 and len(rig.journal.unfinished()) == 3


def test_recover_queues_what_is_unfinished_in_order(rig: Rig, runner: Runner) -> None:
    idents = [rig.accept("pause", {"uuid": UUIDS[1]}) for _ in range(3)]
    dispatcher = Dispatcher(HOST, rig.journal, rig.verbs, runner, rig.stopping)  # type: ignore[arg-type]
    assert dispatcher.recover() == 3
    dispatcher.start()
    until(lambda: dispatcher.pending == 0)
    assert runner.started == idents
    end(rig, dispatcher)


def test_interrupted_ends_the_worker(rig: Rig, runner: Runner) -> None:
    runner.errors = [Interrupted()]
    dispatcher = make(rig, runner, workers=1)
    dispatcher.receive(message())
    until(lambda: not any(thread.is_alive() for thread in dispatcher._threads if thread.name.startswith("work")))
    assert len(rig.journal.unfinished()) == 1
    end(rig, dispatcher)


def oslo_message(method: str = "list", **fields: Any) -> Raw:
    request = {"method": method, "args": {}, "version": "1.0", "_unique_id": uuid.uuid4().hex, **fields}
    body = json.dumps({"oslo.version": "2.0", "oslo.message": json.dumps(request)}).encode()
    return Raw(body, len(body), dialect=oslo.DIALECT)


def call(method: str = "list", **fields: Any) -> Raw:
    return oslo_message(method, _msg_id=uuid.uuid4().hex, _reply_q="reply_a", **fields)


def answers(rig: Rig) -> list[dict[str, Any]]:
    return [json.loads(json.loads(row.body)["oslo.message"]) for row in rig.journal.outbox()]


def test_a_batch_of_both_forms_with_one_transaction(rig: Rig, runner: Runner) -> None:
    changes: list[int] = []
    dispatcher = make(rig, runner, on_change=lambda: changes.append(1))
    runner.gate.clear()
    twice = call()
    before = rig.journal._group.commits
    dispatcher.receive(message(), twice, Raw(b"nonsense", 8), twice, call(oslo.PING), oslo_message(oslo.PING))
    assert rig.journal._group.commits == before + 1
    assert rig.journal.counts()["unfinished"] == dispatcher.pending == 2
    assert [row.code for row in rig.journal.refused.all()] == ["message.not_json"]
    assert [answer["result"] for answer in answers(rig)] == ["pong"]
    assert changes
    runner.gate.set()
    end(rig, dispatcher)


def test_methods_that_are_not_there_are_answered(rig: Rig, runner: Runner) -> None:
    dispatcher = make(rig, runner)
    dispatcher.receive(call("_private"), call(version="9.0"), oslo_message("_private"))
    assert [json.loads(answer["failure"])["class"] for answer in answers(rig)] == ["NoSuchMethod", "UnsupportedVersion"]
    assert len(rig.journal.refused.all()) == 3 and dispatcher.pending == 0
    end(rig, dispatcher)


def test_callers_hear_from_a_call_until_it_is_finished(rig: Rig, runner: Runner) -> None:
    clock = [100.0]
    heartbeats = Heartbeats(lambda: clock[0])
    dispatcher = make(rig, runner, heartbeats=heartbeats)
    runner.gate.clear()
    dispatcher.receive(call(_timeout=10), call(), oslo_message(_timeout=10))
    clock[0] += 5
    assert len(heartbeats.due()[0]) == 1
    again = Heartbeats(lambda: clock[0])
    Dispatcher(HOST, rig.journal, rig.verbs, runner, rig.stopping, heartbeats=again).recover()  # type: ignore[arg-type]
    clock[0] += 5
    assert len(again.due()[0]) == 1, "so it is after a restart"
    runner.gate.set()
    until(lambda: heartbeats.due()[1] == NEVER)
    end(rig, dispatcher)


def test_lanes_do_not_wait_for_each_other(rig: Rig, runner: Runner) -> None:
    """Every common worker is busy: what another agent waits for is carried out all the same."""
    dispatcher = make(rig, runner, workers=2)
    runner.gate.clear()
    for _ in range(5):
        dispatcher.receive(message("list"))
    runner.wait_started(2)
    quick, drain = str(uuid.uuid4()), str(uuid.uuid4())
    dispatcher.receive(message("migrations", quick), message("evacuate", drain, args={"target": "node2"}))
    runner.wait_started(4)
    assert {quick, drain} <= set(runner.started)
    runner.gate.set()
    end(rig, dispatcher)


def test_one_migration_s_instructions_keep_their_order_and_wait_for_no_domain(rig: Rig, runner: Runner) -> None:
    dispatcher = make(rig, runner, workers=1)
    runner.gate.clear()
    domain, ident = UUIDS[1], UUIDS[2]
    dispatcher.receive(message("pause", args={"uuid": domain}))
    first, second = str(uuid.uuid4()), str(uuid.uuid4())
    dispatcher.receive(message("migrate_in", first, args={"ident": ident}))
    dispatcher.receive(message("migrate_settle", second, args={"ident": ident, "keep": False}))
    runner.wait_started(2)
    assert first in runner.started and second not in runner.started
    runner.gate.set()
    until(lambda: dispatcher.pending == 0)
    assert runner.started.index(first) < runner.started.index(second)
    end(rig, dispatcher)


def test_a_domain_s_next_instruction_waits_until_the_outcome_is_stored(rig: Rig, runner: Runner) -> None:
    class Deferring(Runner):
        waiting: list[Any]

        def run(self, ident: str, stored: Any = None) -> bool:
            super().run(ident)
            self.waiting.append(stored)
            return True

    deferring = Deferring(rig)
    deferring.waiting = []
    dispatcher = make(rig, deferring, workers=2)
    for ident in UUIDS[:2]:
        dispatcher.receive(message("pause", ident, args={"uuid": UUIDS[3]}))
    deferring.wait_started(1)
    assert deferring.started == UUIDS[:1] and dispatcher.pending == 2
    until(lambda: bool(deferring.waiting))
    deferring.waiting.pop()(None)
    deferring.wait_started(2)
    until(lambda: bool(deferring.waiting))
    deferring.waiting.pop()(None)
    until(lambda: dispatcher.pending == 0)
    end(rig, dispatcher)


def test_an_outcome_that_cannot_be_stored_is_tried_again(
    rig: Rig, runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "RETRY_SECONDS", 0.01)
    fatal: list[Exception] = []
    errors: list[Exception | None] = [JournalError("disk full"), None, JournalCorrupt("damaged")]

    class Failing(Runner):
        def run(self, ident: str, stored: Any = None) -> bool:
            super().run(ident)
            stored(errors.pop(0))
            return True

    failing = Failing(rig)
    dispatcher = make(rig, failing, workers=1, on_fatal=fatal.append)
    dispatcher.receive(message(ident=UUIDS[1]))
    until(lambda: dispatcher.pending == 0)
    assert failing.started == [UUIDS[1]] * 2 and fatal == []
    dispatcher.receive(message(ident=UUIDS[2]))
    until(lambda: bool(fatal))
    assert isinstance(fatal[0], JournalCorrupt)
    end(rig, dispatcher)
