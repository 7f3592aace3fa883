"""The point of no return: before it a failure is undone, after it the plan only goes forward."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from typing import Any, ClassVar

import pytest
from agent_rig import Rig

from agent import executor
from agent.api import Check, Context, Host, InstructionError, JsonDict, Plan, Plugin, Step, TooLate
from agent.journal import Phase
from agent.loader import Verb
from hypervisor.errors import HostUnavailable, OperationTimeout


class World:
    def __init__(self) -> None:
        self.calls: list[str] = []
        self.fail: dict[str, list[Exception]] = {}
        self.moved = False

    def call(self, what: str) -> None:
        self.calls.append(what)
        if errors := self.fail.get(what):
            raise errors.pop(0)


WORLD = World()


@dataclasses.dataclass(frozen=True)
class Ready(Step):
    name: ClassVar[str] = "ready"

    def run(self, ctx: Context) -> JsonDict | None:
        WORLD.call("run ready")
        return {}

    def check(self, ctx: Context) -> Check:
        return Check.NOT_DONE

    def undo(self, ctx: Context) -> None:
        WORLD.call("undo ready")


@dataclasses.dataclass(frozen=True)
class Go(Step):
    name: ClassVar[str] = "go"
    commits: ClassVar[bool] = True

    def run(self, ctx: Context) -> JsonDict | None:
        WORLD.call("run go")
        WORLD.moved = True
        return {"moved": "at once"}

    def check(self, ctx: Context) -> Check:
        return Check.DONE if WORLD.moved else Check.NOT_DONE

    def undo(self, ctx: Context) -> None:
        WORLD.call("undo go")
        if WORLD.moved:
            raise TooLate({"moved": "at last"})


@dataclasses.dataclass(frozen=True)
class Tidy(Step):
    name: ClassVar[str] = "tidy"

    def run(self, ctx: Context) -> JsonDict | None:
        WORLD.call("run tidy")
        assert ctx.seconds_left(60.0) == 60.0, "no deadline any more"
        return {"saw": ctx.outputs.get("go")}

    def check(self, ctx: Context) -> Check:
        WORLD.call("check tidy")
        return Check.NOT_DONE

    def undo(self, ctx: Context) -> None:
        raise AssertionError("never taken back")


class Move(Plugin):
    verb = "move"
    step_kinds = (Ready, Go, Tidy)
    args_schema: ClassVar[Mapping[str, Any]] = {"type": "object"}

    def plan(self, args: Mapping[str, Any], host: Host) -> Plan:
        return Plan((Ready(), Go(), Tidy()), "domain-1")


class Killed(BaseException):
    pass


@pytest.fixture
def move(rig: Rig) -> Rig:
    WORLD.__init__()  # type: ignore[misc]
    rig.verbs["move"] = Verb.of(Move())
    return rig


def test_before_it_all_is_undone(move: Rig) -> None:
    WORLD.fail["run go"] = [InstructionError("thing.broken", "it broke")]
    assert move.refused("thing.broken", "move")["undone"]
    assert WORLD.calls == ["run ready", "run go", "undo go", "undo ready"]


def test_after_it_a_step_is_tried_again(move: Rig) -> None:
    WORLD.fail["run tidy"] = [HostUnavailable("away"), HostUnavailable("away")]
    assert move.ok("move") == {"saw": {"moved": "at once"}}
    assert WORLD.calls.count("run tidy") == 3 and "undo ready" not in WORLD.calls
    move.clean()


@pytest.mark.parametrize("error", [InstructionError("thing.broken", "it broke"), ZeroDivisionError("x")])
def test_after_it_what_cannot_be_finished_is_said_and_not_undone(move: Rig, error: Exception) -> None:
    WORLD.fail["run tidy"] = [error]
    reply = move.run("move")
    assert reply.error is not None and not reply.error["undone"]
    assert [(step["name"], step["state"]) for step in reply.steps] == [
        ("ready", "done"), ("go", "done"), ("tidy", "failed")
    ]  # fmt: skip
    assert not any(call.startswith("undo") for call in WORLD.calls)
    move.clean()


def test_after_it_the_patience_ends(move: Rig) -> None:
    WORLD.fail["run tidy"] = [HostUnavailable("away")] * 100
    reply = move.run("move")
    assert reply.error is not None and (reply.error["code"], reply.error["undone"]) == ("host.unavailable", False)
    assert not any(call.startswith("undo") for call in WORLD.calls)


def test_the_deadline_does_not_count_after_it(move: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    deadline = time.time() + 3600
    clock = [deadline - 1]
    monkeypatch.setattr(move.executor, "_now", lambda: clock[0])

    def boundary(name: str) -> None:
        if name == "move:go:done":
            clock[0] = deadline + 1

    monkeypatch.setattr(executor, "boundary", boundary)
    assert move.run("move", deadline=deadline).ok


def test_what_turns_out_to_have_happened_goes_on(move: Rig) -> None:
    WORLD.moved = True
    WORLD.fail["run go"] = [OperationTimeout("it took too long")]
    assert move.ok("move") == {"saw": {"moved": "at last"}}
    assert WORLD.calls == ["run ready", "run go", "undo go", "run tidy"]
    move.clean()


@pytest.mark.parametrize(
    "at", ["move:go:undoing", "move:tidy:begun", "move:tidy:ran", "move:tidy:done", "move:finishing"]
)
def test_it_dies_when_it_has_turned(move: Rig, monkeypatch: pytest.MonkeyPatch, at: str) -> None:
    def boundary(name: str) -> None:
        if name == at:
            raise Killed

    WORLD.moved = True
    WORLD.fail["run go"] = [OperationTimeout("it took too long")]
    ident = move.accept("move", {})
    monkeypatch.setattr(executor, "boundary", boundary)
    with pytest.raises(Killed):
        move.executor.run(ident)
    monkeypatch.undo()
    move.executor.run(ident)
    reply = move.reply(ident)
    assert reply.ok, reply.error
    assert "undo ready" not in WORLD.calls
    move.clean()


def test_it_dies_between_turning_and_noting_it(move: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    WORLD.moved = True
    WORLD.fail["run go"] = [OperationTimeout("it took too long")]
    ident = move.accept("move", {})
    forward = move.journal.forward

    def dies(ident: str) -> None:
        forward(ident)
        raise Killed

    monkeypatch.setattr(move.journal, "forward", dies)
    with pytest.raises(Killed):
        move.executor.run(ident)
    monkeypatch.undo()
    entry = move.journal.entry(ident)
    assert entry is not None and entry.phase is Phase.RUNNING and entry.error is None
    move.executor.run(ident)
    assert move.reply(ident).ok and "undo ready" not in WORLD.calls
    move.clean()


@pytest.mark.parametrize("at", ["move:go:ran", "move:go:done", "move:tidy:begun"])
def test_a_check_that_cannot_see_does_not_undo_after_it(move: Rig, monkeypatch: pytest.MonkeyPatch, at: str) -> None:
    def boundary(name: str) -> None:
        if name == at:
            raise Killed

    ident = move.accept("move", {})
    monkeypatch.setattr(executor, "boundary", boundary)
    with pytest.raises(Killed):
        move.executor.run(ident)
    monkeypatch.undo()
    WORLD.fail["check tidy"] = [InstructionError("thing.broken", "it cannot be seen")]
    move.executor.run(ident)
    reply = move.reply(ident)
    assert reply.ok or (reply.error is not None and not reply.error["undone"])
    assert "undo ready" not in WORLD.calls
    move.clean()
