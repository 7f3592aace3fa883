"""The life of one instruction behind the queue: refusal, failure, undo, resume after a crash at each line."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
from agent_rig import Rig, make_rig

from agent import clock
from agent.api import Check, Context, Host, InstructionError, JsonDict, Plan, Plugin, Step
from agent.context import Interrupted
from agent.journal import Phase, StepState
from agent.loader import Verb
from hypervisor.errors import HostUnavailable


class World:
    """What the test verb changes: a list of things that exist, and what shall go wrong."""

    def __init__(self) -> None:
        self.things: list[str] = []
        self.calls: list[str] = []
        self.fail: dict[str, list[Exception]] = {}
        self.verdict: Check | None = None

    def call(self, what: str) -> None:
        self.calls.append(what)
        errors = self.fail.get(what, [])
        if errors:
            raise errors.pop(0)


WORLD = World()


@dataclasses.dataclass(frozen=True)
class Make(Step):
    name: ClassVar[str] = "make"
    thing: str

    def run(self, ctx: Context) -> JsonDict | None:
        WORLD.call(f"run {self.name}")
        WORLD.things.append(self.thing)
        return {"made": self.thing, "saw": sorted(ctx.outputs)}

    def check(self, ctx: Context) -> Check:
        WORLD.call(f"check {self.name}")
        if WORLD.verdict is not None:
            return WORLD.verdict
        return Check.DONE if self.thing in WORLD.things else Check.NOT_DONE

    def undo(self, ctx: Context) -> None:
        WORLD.call(f"undo {self.name}")
        if self.thing in WORLD.things:
            WORLD.things.remove(self.thing)


class MakeMore(Make):
    name: ClassVar[str] = "more"


@dataclasses.dataclass(frozen=True)
class Irreversible(Step):
    name: ClassVar[str] = "final"

    def run(self, ctx: Context) -> JsonDict | None:
        WORLD.call("run final")
        return None

    def check(self, ctx: Context) -> Check:
        return Check.NOT_DONE


class Build(Plugin):
    verb = "build"
    step_kinds = (Make, MakeMore, Irreversible)
    args_schema: ClassVar[Mapping[str, Any]] = {
        "type": "object",
        "additionalProperties": False,
        "properties": {"final": {"type": "boolean"}},
    }

    def plan(self, args: Mapping[str, Any], host: Host) -> Plan:
        WORLD.call("plan")
        first: tuple[Step, ...] = (Irreversible(),) if args.get("final") else ()
        return Plan((*first, Make("a"), MakeMore("b")), "domain-1")

    def result(self, args: Mapping[str, Any], plan: Plan, ctx: Context) -> JsonDict:
        WORLD.call("result")
        return {"things": list(WORLD.things), "outputs": dict(ctx.outputs)}


@pytest.fixture(autouse=True)
def world() -> World:
    WORLD.__init__()  # type: ignore[misc]
    return WORLD


@pytest.fixture
def build(rig: Rig) -> Rig:
    rig.verbs["build"] = Verb.of(Build())
    return rig


def test_steps_run_in_order_and_see_earlier_outputs(build: Rig) -> None:
    result = build.ok("build")
    assert result["things"] == ["a", "b"]
    assert result["outputs"]["more"] == {"made": "b", "saw": ["make"]}
    assert WORLD.calls == ["plan", "run make", "run more", "result"]
    build.clean()


def test_a_stop_takes_effect_between_two_steps(build: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    ident = build.accept("build", {})
    monkeypatch.setattr(WORLD, "call", lambda what: (WORLD.calls.append(what), build.stopping.set()))
    with pytest.raises(Interrupted):
        build.executor.run(ident)
    assert WORLD.calls == ["plan"], "the first step was not begun either"
    WORLD.calls.clear()
    build.stopping.clear()
    with pytest.raises(Interrupted):
        build.executor.run(ident)
    assert WORLD.calls == ["run make"]
    monkeypatch.undo()
    build.stopping.clear()
    build.executor.run(ident)
    assert build.reply(ident).ok and WORLD.calls[1:] == ["run more", "result"]


def test_a_reply_tells_the_steps(build: Rig) -> None:
    reply = build.run("build")
    assert [(step["name"], step["state"]) for step in reply.steps] == [("make", "done"), ("more", "done")]
    assert all(step["seconds"] >= 0 for step in reply.steps) and reply.finished >= reply.accepted > 0


def test_a_finished_instruction_is_not_run_again(build: Rig) -> None:
    ident = build.accept("build", {})
    build.executor.run(ident)
    build.executor.run(ident)
    assert WORLD.calls.count("run make") == 1
    build.executor.run("no such id")


def test_a_failed_step_undoes_itself_and_the_earlier_ones(build: Rig) -> None:
    WORLD.fail["run more"] = [InstructionError("thing.broken", "it broke: mend it", retryable=True)]
    error = build.refused("thing.broken", "build")
    assert error == {"code": "thing.broken", "message": "it broke: mend it", "retryable": True, "undone": True}
    assert WORLD.calls[-2:] == ["undo more", "undo make"] and WORLD.things == []


def test_what_cannot_be_taken_back_is_said(build: Rig) -> None:
    WORLD.fail["run make"] = [InstructionError("thing.broken", "it broke")]
    assert build.refused("thing.broken", "build", {"final": True})["undone"] is False


def test_an_undo_that_fails_is_said(build: Rig) -> None:
    WORLD.fail["run more"] = [InstructionError("thing.broken", "it broke")]
    WORLD.fail["undo make"] = [InstructionError("thing.stuck", "it is stuck")]
    error = build.refused("thing.broken", "build")
    assert error["undone"] is False and "it is stuck" in error["message"]


def test_an_undo_waits_for_the_host(build: Rig) -> None:
    WORLD.fail["run more"] = [HostUnavailable("away")]
    WORLD.fail["undo more"] = [HostUnavailable("away")]
    assert build.refused("host.unavailable", "build")["undone"] is True
    assert WORLD.things == []


def test_a_mistake_in_a_plugin_is_an_error_of_its_own(build: Rig) -> None:
    WORLD.fail["run more"] = [ZeroDivisionError("oh\nno")]
    assert "ZeroDivisionError" in build.refused("plugin.failed", "build")["message"]
    WORLD.fail["plan"] = [KeyError("x")]
    build.refused("plugin.failed", "build")


def test_a_result_that_cannot_be_made_is_no_failure(build: Rig) -> None:
    WORLD.fail["result"] = [HostUnavailable("away")]
    reply = build.run("build")
    assert reply.ok and WORLD.things == ["a", "b"]


def test_unknown_verbs_and_bad_arguments_are_refused(build: Rig) -> None:
    assert (
        "build, cancel, cancel_migration, clone, confirm_resize, console_log, create"
        in build.refused("instruction.unknown_verb", "fly")["message"]
    )
    assert "arguments of 'build': final" in build.refused("instruction.bad_args", "build", {"x": 1})["message"]
    assert "args.final" in build.refused("instruction.bad_args", "build", {"final": 1})["message"]
    assert WORLD.calls == []


def test_a_passed_deadline_begins_nothing(build: Rig) -> None:
    assert build.refused("instruction.expired", "build", deadline=time.time() - 1)["retryable"] is True
    assert WORLD.calls == []


def test_a_deadline_passing_between_steps_undoes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([0.0, 0.0, 100.0])
    monkeypatch.setattr(clock, "elapsed", lambda: next(times, 100.0))
    rig = make_rig(tmp_path, now=lambda: 0.0)
    rig.verbs["build"] = Verb.of(Build())
    rig.refused("instruction.deadline_exceeded", "build", deadline=50.0)
    assert WORLD.things == [] and "run more" not in WORLD.calls


def test_a_waiting_step_gives_way_to_a_stop_and_resumes(build: Rig) -> None:
    ident = build.accept("build", {})
    WORLD.fail["run more"] = [Interrupted()]
    with pytest.raises(Interrupted):
        build.executor.run(ident)
    assert build.journal.unfinished() == [ident]
    build.executor.run(ident)
    assert build.reply(ident).ok and WORLD.things == ["a", "b"]


CRASHES: list[tuple[str, Callable[[Rig, str], None], list[str], bool]] = [
    ("before the plan", lambda rig, i: None, ["plan", "run make", "run more"], True),
    ("after the plan", lambda rig, i: _planned(rig, i), ["run make", "run more"], True),
    ("step begun", lambda rig, i: _begun(rig, i), ["check make", "run make", "run more"], True),
    ("step ran", lambda rig, i: _begun(rig, i, "a"), ["check make", "run more"], True),
    ("step done", lambda rig, i: _done(rig, i), ["run more"], True),
    ("undoing", lambda rig, i: _undoing(rig, i), ["undo more", "undo make"], False),
    ("partly undone", lambda rig, i: _undoing(rig, i, 1), ["undo make"], False),
]


@pytest.mark.parametrize(("where", "state", "calls", "ok"), CRASHES, ids=[row[0] for row in CRASHES])
def test_resume(build: Rig, where: str, state: Callable[[Rig, str], None], calls: list[str], ok: bool) -> None:
    ident = build.accept("build", {})
    state(build, ident)
    build.executor.run(ident)
    assert [call for call in WORLD.calls if call != "result"] == calls
    reply = build.reply(ident)
    assert reply.ok is ok and WORLD.things == (["a", "b"] if ok else [])
    if not ok:
        assert reply.error is not None and reply.error["code"] == "thing.broken" and reply.error["undone"] is True
    build.clean()


def _planned(rig: Rig, ident: str) -> None:
    plan = Plan((Make("a"), MakeMore("b")), "domain-1")
    rig.journal.planned(ident, plan.to_json(), plan.domain)


def _begun(rig: Rig, ident: str, *things: str) -> None:
    _planned(rig, ident)
    rig.journal.step(ident, 0, "make", StepState.BEGUN)
    WORLD.things.extend(things)


def _done(rig: Rig, ident: str) -> None:
    _begun(rig, ident, "a")
    rig.journal.step(ident, 0, "make", StepState.DONE, {"made": "a"})


def _undoing(rig: Rig, ident: str, undone: int = 0) -> None:
    _done(rig, ident)
    rig.journal.step(ident, 1, "more", StepState.BEGUN)
    rig.journal.undoing(ident, {"code": "thing.broken", "message": "it broke", "retryable": False}, 1)
    if undone:
        rig.journal.step(ident, 1, "more", StepState.UNDONE)
    else:
        WORLD.things.append("b")


def test_unknown_is_asked_again_and_then_reported_not_guessed(build: Rig) -> None:
    ident = build.accept("build", {})
    _begun(build, ident, "a")
    WORLD.verdict = Check.UNKNOWN
    build.executor.run(ident)
    reply = build.reply(ident)
    assert reply.error is not None and reply.error["code"] == "instruction.outcome_unknown"
    assert reply.error["undone"] is False
    assert WORLD.calls.count("check make") >= 2
    assert WORLD.things == ["a"] and not any(call.startswith(("run", "undo")) for call in WORLD.calls)


def test_a_host_that_is_away_is_unknown_for_the_moment(build: Rig) -> None:
    ident = build.accept("build", {})
    _begun(build, ident, "a")
    WORLD.fail["check make"] = [HostUnavailable("starting")]
    build.executor.run(ident)
    assert build.reply(ident).ok and WORLD.calls[:3] == ["check make", "check make", "run more"]


def test_a_plan_of_another_plugin_version_stays_in_the_journal(build: Rig) -> None:
    ident = build.accept("build", {})
    build.journal.planned(ident, {"domain": "", "steps": [{"step": "gone"}]}, "")
    build.executor.run(ident)
    assert build.journal.unfinished() == [ident]


def test_a_half_done_instruction_whose_plugin_is_missing_stays_in_the_journal(build: Rig) -> None:
    ident = build.accept("build", {})
    _begun(build, ident)
    del build.verbs["build"]
    build.executor.run(ident)
    entry = build.journal.entry(ident)
    assert entry is not None and entry.phase is Phase.RUNNING


def test_read_only_verbs_write_no_step_log(build: Rig) -> None:
    ident = build.accept("list", {})
    build.executor.run(ident)
    entry = build.journal.entry(ident)
    assert entry is not None and entry.plan is None and entry.steps == () and entry.phase is Phase.DONE


def test_poll_ends_at_the_deadline_and_gives_way(rig: Rig) -> None:
    from agent.context import StepContext

    ctx = StepContext(rig.host, "i", threading.Event(), deadline=clock.elapsed() + 0.1)
    started = time.monotonic()
    assert ctx.poll(lambda left: None, 60.0) is None
    assert time.monotonic() - started < 5
    assert ctx.poll(lambda left: "yes", 0.0) == "yes"
    ctx.stopping.set()
    ctx.deadline = None
    with pytest.raises(Interrupted):
        ctx.poll(lambda left: None, 60.0)


@pytest.mark.parametrize("where", ["plan", "run make", "run more", "result"])
def test_a_plugin_that_exits_does_not_end_the_worker(build: Rig, where: str) -> None:
    WORLD.fail[where] = [SystemExit(3)]  # type: ignore[list-item]
    reply = build.run("build")
    build.clean()
    if where == "result":
        assert reply.ok and WORLD.things == ["a", "b"]
    else:
        assert reply.error is not None and reply.error["code"] == "plugin.failed" and WORLD.things == []


@pytest.mark.parametrize("value", [object(), float("nan"), {"x": {1, 2}}, "\ud800"])
@pytest.mark.parametrize("where", ["plan", "output", "result"])
def test_what_is_no_json_is_the_plugin_s_mistake(
    build: Rig, monkeypatch: pytest.MonkeyPatch, where: str, value: Any
) -> None:
    if where == "plan":
        monkeypatch.setattr(Build, "plan", lambda *_: Plan((Make(value),)))
    elif where == "output":
        monkeypatch.setattr(MakeMore, "run", lambda *_: {"x": value})
    else:
        monkeypatch.setattr(Build, "result", lambda *_: {"x": value})
    reply = build.run("build")
    build.clean()
    if where == "result":
        assert reply.ok and reply.result is not None and "could not be read" in reply.result["detail"]
    else:
        assert reply.error is not None and reply.error["code"] == "plugin.failed" and WORLD.things == []


def test_outcomes_of_reading_verbs_are_kept_for_a_shorter_time(tmp_path: Path) -> None:
    rig = make_rig(tmp_path, keep_seconds=1000.0, keep_read_seconds=-1.0)
    rig.run("list")
    uuid = rig.create()
    assert rig.journal.forget() == 1
    assert rig.refused("domain.name_in_use", "create", {"name": "web", "memory_mib": 1, "kernel": str(rig.kernel)})
    assert rig.toolstack.get_domain(uuid) and rig.journal.forget() == 0


def test_an_outcome_can_be_stored_without_waiting(rig: Rig) -> None:
    told: list[Exception | None] = []
    ident = rig.accept("list", {})
    assert rig.executor.run(ident, told.append) is True
    rig.journal.settle()
    assert told == [None] and rig.reply(ident).ok
    assert rig.executor.run(ident, told.append) is False, "finished already: there is nothing to wait for"
    refused = rig.accept("show", {"uuid": "x"})
    assert rig.executor.run(refused, told.append) is True
    rig.journal.settle()
    assert told == [None, None] and not rig.reply(refused).ok
