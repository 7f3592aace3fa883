"""``reboot``: ask the guest to reboot and wait until its next run has begun."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from agent.api import UUID_SCHEMA, WAIT_SCHEMA, Check, Context, Host, JsonDict, Plan, Plugin, Step, own_domain
from hypervisor.errors import OperationTimeout, WrongState
from hypervisor.toolstack.api import DomainInfo, DomainState

ENDED = (DomainState.SHUTDOWN, DomainState.CRASHED)


@dataclasses.dataclass(frozen=True)
class AskStep(Step):
    """:ivar domid: of the run that is to end; the next one has another."""

    name: ClassVar[str] = "ask"
    title: ClassVar[str] = "ask the guest to reboot"

    uuid: str
    domid: int

    def run(self, ctx: Context) -> JsonDict | None:
        own_domain(ctx.host, self.uuid)
        ctx.host.toolstack.reboot(self.uuid)
        return None

    def check(self, ctx: Context) -> Check:
        info = ctx.host.toolstack.get_domain(self.uuid)
        if info.state is DomainState.UNKNOWN:
            return Check.UNKNOWN
        return Check.NOT_DONE if info.domid == self.domid else Check.DONE


@dataclasses.dataclass(frozen=True)
class WaitStep(Step):
    """:ivar seconds: to wait."""

    name: ClassVar[str] = "wait"
    title: ClassVar[str] = "wait for its next run"
    changes: ClassVar[bool] = False

    uuid: str
    domid: int
    seconds: float

    def run(self, ctx: Context) -> JsonDict | None:
        info = ctx.poll(lambda _left: self._settled(ctx), self.seconds)
        if info is None:
            detail = ctx.host.toolstack.get_domain(self.uuid).detail
            raise OperationTimeout(
                f"domain {self.uuid} has not rebooted {self.seconds:g} s after its guest was asked"
                f"{f' ({detail})' if detail else ''}: wait longer or destroy and create it"
            )
        if info.domid == self.domid:
            raise WrongState(
                f"domain {self.uuid} ended ({info.state.value}) instead of rebooting: the guest failed, or its spec "
                "says so (on_reboot)"
            )
        return {"domain": info.to_json()}

    def check(self, ctx: Context) -> Check:
        return Check.NOT_DONE

    def _settled(self, ctx: Context) -> DomainInfo | None:
        info = ctx.host.toolstack.get_domain(self.uuid)
        if info.state is DomainState.UNKNOWN:
            return None
        return info if info.domid != self.domid or info.state in ENDED else None


class Reboot(Plugin):
    verb = "reboot"
    summary = "Ask the guest to reboot and wait until its next run has begun."
    step_kinds = (AskStep, WaitStep)
    args_schema: ClassVar[Mapping[str, Any]] = {
        "type": "object",
        "additionalProperties": False,
        "required": ["uuid"],
        "properties": {"uuid": UUID_SCHEMA, "wait_seconds": WAIT_SCHEMA},
    }

    def plan(self, args: Mapping[str, Any], host: Host) -> Plan:
        info = own_domain(host, args["uuid"])
        if info.state in ENDED:
            raise WrongState(f"domain {info.uuid} has ended ({info.state.value}): destroy it and create it again")
        steps: list[Step] = [AskStep(info.uuid, info.domid)]
        seconds = float(args.get("wait_seconds", 60))
        if seconds > 0:
            steps.append(WaitStep(info.uuid, info.domid, seconds))
        return Plan(tuple(steps), info.uuid)

    def result(self, args: Mapping[str, Any], plan: Plan, ctx: Context) -> JsonDict:
        return dict(ctx.outputs.get("wait") or {"domain": {"uuid": plan.domain, "state": "asked"}})
