"""``show``: what is known of one domain."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from agent.api import ONE_DOMAIN_SCHEMA, Check, Context, Host, JsonDict, Plan, Plugin, Step


@dataclasses.dataclass(frozen=True)
class ShowStep(Step):
    name: ClassVar[str] = "show"
    title: ClassVar[str] = "read the domain's state and spec"
    changes: ClassVar[bool] = False

    uuid: str

    def run(self, ctx: Context) -> JsonDict | None:
        info = ctx.host.toolstack.get_domain(self.uuid)
        own = info.owner == ctx.host.owner
        spec = ctx.host.toolstack.get_spec(self.uuid).to_json() if own else None
        return {"domain": {**info.to_json(), "own": own}, "spec": spec}

    def check(self, ctx: Context) -> Check:
        return Check.NOT_DONE


class Show(Plugin):
    verb = "show"
    summary = "Show one domain: its state, and the spec it was made from when it is ours."
    step_kinds = (ShowStep,)
    read_only = True
    args_schema = ONE_DOMAIN_SCHEMA

    def plan(self, args: Mapping[str, Any], host: Host) -> Plan:
        return Plan((ShowStep(args["uuid"]),), args["uuid"])

    def domain_of(self, args: Mapping[str, Any]) -> str:
        return ""  # it looks at what is there now, also while another instruction is under way
