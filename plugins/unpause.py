"""``unpause``: let a paused domain run on."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from agent.api import ONE_DOMAIN_SCHEMA, Check, Context, Host, JsonDict, Plan, Plugin, Step, own_domain
from hypervisor.toolstack.api import DomainState


@dataclasses.dataclass(frozen=True)
class UnpauseStep(Step):
    name: ClassVar[str] = "unpause"
    title: ClassVar[str] = "let it run"

    uuid: str

    def run(self, ctx: Context) -> JsonDict | None:
        own_domain(ctx.host, self.uuid)
        ctx.host.toolstack.unpause(self.uuid)
        return {"domain": ctx.host.toolstack.get_domain(self.uuid).to_json()}

    def check(self, ctx: Context) -> Check:
        state = ctx.host.toolstack.get_domain(self.uuid).state
        if state is DomainState.UNKNOWN:
            return Check.UNKNOWN
        # Not done also when it is: the driver takes it quietly, and the step's output is made by running it.
        return Check.NOT_DONE


class Unpause(Plugin):
    verb = "unpause"
    summary = "Let a paused domain run on."
    step_kinds = (UnpauseStep,)
    args_schema = ONE_DOMAIN_SCHEMA

    def plan(self, args: Mapping[str, Any], host: Host) -> Plan:
        info = own_domain(host, args["uuid"])
        return Plan((UnpauseStep(info.uuid),), info.uuid)
