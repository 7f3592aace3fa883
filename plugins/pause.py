"""``pause``: stop a domain's vCPUs; it keeps its memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from agent.api import ONE_DOMAIN_SCHEMA, Check, Context, Host, JsonDict, Plan, Plugin, Step, own_domain
from hypervisor.toolstack.api import DomainState


@dataclasses.dataclass(frozen=True)
class PauseStep(Step):
    name: ClassVar[str] = "pause"
    title: ClassVar[str] = "stop its vCPUs"

    uuid: str

    def run(self, ctx: Context) -> JsonDict | None:
        own_domain(ctx.host, self.uuid)
        ctx.host.toolstack.pause(self.uuid)
        return {"domain": ctx.host.toolstack.get_domain(self.uuid).to_json()}

    def check(self, ctx: Context) -> Check:
        state = ctx.host.toolstack.get_domain(self.uuid).state
        if state is DomainState.UNKNOWN:
            return Check.UNKNOWN
        # Not done also when it is: the driver takes it quietly, and the step's output is made by running it.
        return Check.NOT_DONE


class Pause(Plugin):
    verb = "pause"
    summary = "Stop a domain's vCPUs; it keeps its memory."
    step_kinds = (PauseStep,)
    args_schema = ONE_DOMAIN_SCHEMA

    def plan(self, args: Mapping[str, Any], host: Host) -> Plan:
        info = own_domain(host, args["uuid"])
        return Plan((PauseStep(info.uuid),), info.uuid)
