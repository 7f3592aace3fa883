"""``shutdown``: ask the guest to power off and wait until it has."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from agent.api import UUID_SCHEMA, WAIT_SCHEMA, Check, Context, Host, JsonDict, Plan, Plugin, Step, own_domain
from hypervisor.errors import DomainNotFound, OperationTimeout
from hypervisor.toolstack.api import DomainState

ENDED = (DomainState.SHUTDOWN, DomainState.CRASHED)


def outcome(ctx: Context, uuid: str, domid: int) -> str:
    """How the guest ended: ``shutdown``, ``crashed``, ``gone``, ``restarted``; "" while it has not."""
    try:
        info = ctx.host.toolstack.get_domain(uuid)
    except DomainNotFound:
        return "gone"
    if info.state in ENDED:
        return info.state.value
    return "restarted" if info.domid != domid and info.state is not DomainState.UNKNOWN else ""


@dataclasses.dataclass(frozen=True)
class AskStep(Step):
    """:ivar domid: of the run that is to end; a restarted domain has another."""

    name: ClassVar[str] = "ask"
    title: ClassVar[str] = "ask the guest to power off"

    uuid: str
    domid: int

    def run(self, ctx: Context) -> JsonDict | None:
        own_domain(ctx.host, self.uuid)
        ctx.host.toolstack.shutdown(self.uuid)
        return None

    def check(self, ctx: Context) -> Check:
        # Asking a guest twice is harmless, asking its next run is not.
        return Check.DONE if outcome(ctx, self.uuid, self.domid) else Check.NOT_DONE


@dataclasses.dataclass(frozen=True)
class WaitStep(Step):
    """:ivar seconds: to wait; :ivar force: go on instead of failing when they pass."""

    name: ClassVar[str] = "wait"
    title: ClassVar[str] = "wait until it has ended"
    changes: ClassVar[bool] = False

    uuid: str
    domid: int
    seconds: float
    force: bool

    def run(self, ctx: Context) -> JsonDict | None:
        state = ctx.poll(lambda _left: outcome(ctx, self.uuid, self.domid), self.seconds)
        if not state and not self.force:
            raise OperationTimeout(
                f"domain {self.uuid} still runs {self.seconds:g} s after its guest was asked to power off"
                f"{_notice(ctx, self.uuid)}: wait longer, give force, or destroy it"
            )
        return {"state": state or ""}

    def check(self, ctx: Context) -> Check:
        return Check.NOT_DONE


def _notice(ctx: Context, uuid: str) -> str:
    """Whether the guest took the request, where the driver knows."""
    with contextlib.suppress(DomainNotFound):  # just now
        detail = ctx.host.toolstack.get_domain(uuid).detail
        return f" ({detail})" if detail else ""
    return ""


@dataclasses.dataclass(frozen=True)
class ForceStep(Step):
    name: ClassVar[str] = "force"
    title: ClassVar[str] = "destroy it when it did not end"

    uuid: str
    domid: int

    def run(self, ctx: Context) -> JsonDict | None:
        state = outcome(ctx, self.uuid, self.domid)
        if not state:
            with contextlib.suppress(DomainNotFound):
                own_domain(ctx.host, self.uuid)
                ctx.host.toolstack.destroy(self.uuid)
            return {"state": "gone", "forced": True}
        return {"state": state, "forced": False}

    def check(self, ctx: Context) -> Check:
        return Check.NOT_DONE


class Shutdown(Plugin):
    verb = "shutdown"
    summary = "Ask the guest to power off and wait until it has."
    step_kinds = (AskStep, WaitStep, ForceStep)
    args_schema: ClassVar[Mapping[str, Any]] = {
        "type": "object",
        "additionalProperties": False,
        "required": ["uuid"],
        "properties": {
            "uuid": UUID_SCHEMA,
            "wait_seconds": WAIT_SCHEMA,
            "force": {
                "type": "boolean",
                "default": False,
                "description": "Destroy it when it has not ended after wait_seconds.",
            },
        },
    }

    def plan(self, args: Mapping[str, Any], host: Host) -> Plan:
        info = own_domain(host, args["uuid"])
        steps: list[Step] = []
        if info.state not in ENDED:
            steps.append(AskStep(info.uuid, info.domid))
        seconds, force = float(args.get("wait_seconds", 60)), bool(args.get("force", False))
        if seconds > 0:
            steps.append(WaitStep(info.uuid, info.domid, seconds, force))
        if force:
            steps.append(ForceStep(info.uuid, info.domid))
        return Plan(tuple(steps), info.uuid)

    def result(self, args: Mapping[str, Any], plan: Plan, ctx: Context) -> JsonDict:
        waited = ctx.outputs.get("wait", {}).get("state") or "asked"
        forced = ctx.outputs.get("force", {})
        return {"domain": {"uuid": plan.domain, "state": forced.get("state", waited)}, **_only(forced, "forced")}


def _only(data: Mapping[str, Any], key: str) -> JsonDict:
    return {key: data[key]} if key in data else {}
