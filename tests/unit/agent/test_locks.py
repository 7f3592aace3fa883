"""Locks of domains, and instructions that are cancelled: queued, running, past taking back, and after a crash."""

from __future__ import annotations

import dataclasses
import json
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
from agent_rig import HOST, Rig

from agent import conf
from agent.api import Check, Context, InstructionError, JsonDict, Plan, Plugin, Step, TooLate
from agent.cli.main import main
from agent.control import Control
from agent.dispatcher import Dispatcher
from agent.executor import Executor
from agent.journal import Accepted
from agent.loader import Verb
from agent.locks import Job, Queues
from agent.rpc.client import Client
from agent.service import Service
from agent.wire import Instruction
from hypervisor.toolstack.drivers.fake import FakeToolstack

WEB, DB = (str(uuid.UUID(int=number)) for number in (1, 2))


class World:
    """What the steps of the test see: gates by the domain, and a list of what happened."""

    def __init__(self) -> None:
        self.gates = {WEB: threading.Event(), DB: threading.Event()}
        self.calls: list[str] = []
        self.lock = threading.Condition()

    def call(self, what: str) -> None:
        with self.lock:
            self.calls.append(what)
            self.lock.notify_all()

    def wait_for(self, what: str, count: int = 1) -> None:
        with self.lock:
            assert self.lock.wait_for(lambda: self.calls.count(what) >= count, 10), self.calls


WORLD = World()


@dataclasses.dataclass(frozen=True)
class First(Step):
    """Waits for its gate, either deaf or as a step should."""

    name: ClassVar[str] = "first"

    uuid: str
    polls: bool

    def run(self, ctx: Context) -> JsonDict | None:
        WORLD.call(f"run first {self.uuid}")
        gate = WORLD.gates[self.uuid]
        if self.polls:
            ctx.poll(lambda seconds: gate.wait(min(seconds, 0.01)), 10)
        else:
            assert gate.wait(10)
        return None

    def check(self, ctx: Context) -> Check:
        return Check.NOT_DONE

    def undo(self, ctx: Context) -> None:
        WORLD.call("undo first")


@dataclasses.dataclass(frozen=True)
class Final(First):
    name: ClassVar[str] = "final"
    commits: ClassVar[bool] = True

    def undo(self, ctx: Context) -> None:
        raise TooLate({})


@dataclasses.dataclass(frozen=True)
class Last(Step):
    name: ClassVar[str] = "last"

    def run(self, ctx: Context) -> JsonDict | None:
        WORLD.call("run last")
        return {"done": True}

    def check(self, ctx: Context) -> Check:
        return Check.NOT_DONE


class Hold(Plugin):
    verb = "hold"
    args_schema: ClassVar[Mapping[str, Any]] = {"type": "object"}
    step_kinds = (First, Final, Last)

    def plan(self, args: Mapping[str, Any], host: Any) -> Plan:
        kind = Final if args.get("final") else First
        return Plan((kind(args["uuid"], bool(args.get("polls"))), Last()), args["uuid"])


@pytest.fixture(autouse=True)
def world() -> Iterator[World]:
    WORLD.__init__()  # type: ignore[misc]
    yield WORLD
    for gate in WORLD.gates.values():
        gate.set()


class Agent:
    def __init__(self, rig: Rig, workers: int) -> None:
        self.rig = rig
        rig.verbs["hold"] = Verb.of(Hold())
        self.control = Control(rig.journal)
        self.host = dataclasses.replace(rig.host, control=self.control)
        self.executor = Executor(rig.journal, rig.verbs, self.host, rig.stopping)
        self.dispatcher = Dispatcher(HOST, rig.journal, rig.verbs, self.executor, rig.stopping, workers=workers)
        self.control.dispatcher = self.dispatcher
        self.dispatcher.start()

    def send(self, domain: str = WEB, **args: Any) -> str:
        return self.instruct("hold", {"uuid": domain, **args})

    def instruct(self, verb: str, args: Mapping[str, Any]) -> str:
        ident = str(uuid.uuid4())
        item = Instruction(ident, verb, HOST, dict(args), "replies")
        assert self.rig.journal.accept(item) is Accepted.NEW
        self.dispatcher.queues.submit(self.dispatcher._job(item))
        return ident

    def result(self, ident: str) -> dict[str, Any]:
        """What its sender gets; for a failure the error."""
        end = time.monotonic() + 10
        while (reply := self.rig.journal.outcome(ident)) is None:
            assert time.monotonic() < end, "no outcome within 10 s"
            threading.Event().wait(0.005)
        return dict(reply.result or reply.error or {})

    def cancel(self, ident: str, wait: float = 5) -> dict[str, Any]:
        return self.result(self.instruct("cancel", {"id": ident, "wait": wait}))


@pytest.fixture
def agent(rig: Rig) -> Iterator[Agent]:
    made = Agent(rig, workers=4)
    yield made
    for gate in WORLD.gates.values():
        gate.set()
    rig.stopping.set()
    assert made.dispatcher.drain(10)


def test_one_that_waits_for_its_domain_is_cancelled_at_once(agent: Agent) -> None:
    holder, waits, later = agent.send(), agent.send(), agent.send()
    WORLD.wait_for(f"run first {WEB}")
    answer = agent.cancel(waits)
    assert (answer["outcome"], answer["state"], answer["steps"]) == ("cancelled", "failed", [])
    error = agent.result(waits)
    assert (error["code"], error["undone"]) == ("instruction.cancelled", True)
    (lock,) = agent.control.locks()
    assert lock["instruction"] == holder and lock["waiting"] == [later]
    WORLD.gates[WEB].set()
    assert agent.result(later) == {"done": True} == agent.result(holder)
    assert WORLD.calls.count(f"run first {WEB}") == 2


def test_one_that_waits_for_a_worker_is_cancelled_at_once(rig: Rig) -> None:
    agent = Agent(rig, workers=1)
    running, queued, behind = agent.send(WEB), agent.send(DB), agent.send(DB)
    WORLD.wait_for(f"run first {WEB}")
    states = {lock["instruction"]: lock["state"] for lock in agent.control.locks()}
    assert states == {running: "running", queued: "queued"}
    assert agent.cancel(queued)["outcome"] == "cancelled"
    for gate in WORLD.gates.values():
        gate.set()
    assert agent.result(behind) == {"done": True} == agent.result(running)
    assert agent.dispatcher.pending == 0 and agent.control.locks() == []
    rig.stopping.set()
    assert agent.dispatcher.drain(10)


def test_one_that_runs_is_undone_at_its_next_step(agent: Agent) -> None:
    """The answer comes in its time, whatever the step does."""
    ident = agent.send()
    WORLD.wait_for(f"run first {WEB}")
    began = time.monotonic()
    answer = agent.cancel(ident, wait=0.1)
    assert time.monotonic() - began < 5
    assert (answer["outcome"], answer["step"], answer["ended"]) == ("cancelling", "first", False)
    WORLD.gates[WEB].set()
    error = agent.result(ident)
    assert (error["code"], error["undone"]) == ("instruction.cancelled", True)
    assert WORLD.calls == [f"run first {WEB}", "undo first"]


def test_one_that_waits_in_a_step_gives_way_there(agent: Agent) -> None:
    ident = agent.send(polls=True)
    WORLD.wait_for(f"run first {WEB}")
    answer = agent.cancel(ident)
    assert (answer["outcome"], answer["detail"]) == ("undone", "it was undone")
    assert WORLD.calls == [f"run first {WEB}", "undo first"] and not WORLD.gates[WEB].is_set()


def test_one_past_its_point_of_no_return_is_finished(agent: Agent) -> None:
    ident = agent.send(final=True)
    WORLD.wait_for(f"run first {WEB}")
    threading.Timer(0.2, WORLD.gates[WEB].set).start()
    answer = agent.cancel(ident)
    assert (answer["outcome"], answer["error"]) == ("finished", None)
    assert WORLD.calls[-1] == "run last" and agent.result(ident) == {"done": True}


def test_what_cannot_be_cancelled(agent: Agent) -> None:
    assert agent.cancel(str(uuid.uuid4()))["code"] == "instruction.not_found"
    WORLD.gates[WEB].set()
    ident = agent.send()
    agent.result(ident)
    answer = agent.cancel(ident)
    assert (answer["outcome"], answer["state"]) == ("too_late", "done")


@pytest.mark.parametrize("begun", [False, True])
def test_that_it_was_cancelled_survives_the_agent(rig: Rig, begun: bool) -> None:
    """The agent died between the answer and the end: the next one knows."""
    agent = Agent(rig, workers=1)
    ident = rig.accept("hold", {"uuid": WEB})
    if begun:
        rig.journal.planned(ident, Plan((First(WEB, False), Last()), WEB).to_json(), WEB)
        rig.journal.step(ident, 0, "first", "done")  # type: ignore[arg-type]
    rig.journal.cancel(ident)
    assert agent.dispatcher.recover() == 1
    error = agent.result(ident)
    assert (error["code"], error["undone"]) == ("instruction.cancelled", True)
    assert WORLD.calls == (["undo first"] if begun else [])
    rig.stopping.set()
    assert agent.dispatcher.drain(10)


def test_what_waits_past_its_deadline_is_not_begun(agent: Agent) -> None:
    agent.send()
    late = Instruction(str(uuid.uuid4()), "hold", HOST, {"uuid": WEB}, "replies", time.time() + 0.05)
    agent.rig.journal.accept(late)
    agent.dispatcher.queues.submit(agent.dispatcher._job(late))
    threading.Event().wait(0.06)
    WORLD.gates[WEB].set()
    assert agent.result(late.id)["code"] == "instruction.expired"
    assert WORLD.calls.count(f"run first {WEB}") == 1


def test_a_lock_is_only_broken_by_force_while_its_holder_works(agent: Agent) -> None:
    holder, second, third = agent.send(), agent.send(), agent.send()
    WORLD.wait_for(f"run first {WEB}")
    with pytest.raises(InstructionError) as caught:
        agent.control.break_lock(WEB, force=False)
    assert caught.value.code == "lock.busy" and holder in caught.value.message
    answer = agent.result(agent.instruct("break_lock", {"domain": WEB, "force": True}))
    assert (answer["instruction"], answer["next"]) == (holder, second)
    assert "goes on, and does not hold up" in answer["happens"]
    WORLD.wait_for(f"run first {WEB}", 2)
    (lock,) = agent.control.locks()
    assert (lock["instruction"], lock["verb"], lock["step"]) == (second, "hold", "first")
    assert lock["waiting"] == [third] and lock["state"] == "running" and lock["seconds"] >= 0
    WORLD.gates[WEB].set()
    assert all(agent.result(ident) == {"done": True} for ident in (holder, second, third))
    assert agent.dispatcher.pending == 0
    with pytest.raises(InstructionError, match="nothing waits"):
        agent.control.break_lock(WEB, force=True)


def taken(queues: Queues) -> Job:
    """By a thread that is gone afterwards."""
    got: list[Job | None] = []
    thread = threading.Thread(target=lambda: got.append(queues.take("work")))
    thread.start()
    thread.join(10)
    assert got[0] is not None
    return got[0]


def test_a_lock_whose_holder_is_gone_is_broken_without_force() -> None:
    queues = Queues(["work"])
    first, second, third = (Job(name, "web", "work") for name in "abc")
    for job in (first, second, third):
        queues.submit(job)
    assert queues.break_lock("web", force=True) == queues.locks()[0] | {"broken": False, "next": ""}  # nobody has begun
    assert taken(queues) == first and queues.locks()[0]["state"] == "abandoned"
    found = queues.break_lock("web", force=False)
    assert found is not None and (found["broken"], found["next"]) == (True, "b") and queues.pending == 2
    queues.done(first)  # late, and without effect on the one that has it now
    assert queues.locks()[0]["instruction"] == "b" and queues.take("work") == second
    queues.done(second)
    assert queues.take("work") == third
    queues.done(third)
    assert queues.locks() == [] and queues.pending == 0


def test_what_is_taken_out_and_put_back_keeps_its_place() -> None:
    queues = Queues(["work"])
    jobs = [Job(name, "web", "work") for name in "abc"]
    for job in jobs:
        queues.submit(job)
    for name in "ba":
        job = queues.remove(name)
        assert job is not None
        queues.put_back(job)
    assert queues.remove("x") is None
    order = []
    for _ in jobs:
        job = queues.take("work")
        assert job is not None
        order.append(job.ident)
        queues.done(job)
    assert order == ["a", "b", "c"]


def test_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "agent.conf"
    file.write_text(f"[agent]\nhost = {HOST}\nstate_dir = {tmp_path}/state\n[driver]\nname = fake\n")

    def reeve(*words: str) -> Any:
        assert main([*words, "--json", "--config-file", str(file)]) == 0, capsys.readouterr().err
        return json.loads(capsys.readouterr().out)

    service = Service(conf.load([str(file)]), FakeToolstack(None))
    service.start()
    service.executor._verbs["hold"] = Verb.of(Hold())  # type: ignore[index]
    try:
        assert reeve("lock", "list") == []
        with Client(service.settings.broker_url, HOST) as client:
            idents = [client.send("hold", {"uuid": WEB, "polls": True}) for _ in range(2)]
            WORLD.wait_for(f"run first {WEB}")
            (lock,) = reeve("lock", "list")
            assert lock["domain"] == WEB and lock["instruction"] == idents[0] and lock["waiting"] == idents[1:]
            assert main(["lock", "break", WEB, "--json", "--config-file", str(file)]) == 1
            assert json.loads(capsys.readouterr().err)["error"]["code"] == "lock.busy"
            assert reeve("cancel", idents[1])["outcome"] == "cancelled"
            assert reeve("cancel", idents[0])["outcome"] == "undone"
            assert reeve("lock", "list") == []
            assert client.wait(idents[0], 10).error is not None
    finally:
        WORLD.gates[WEB].set()
        service.close()
