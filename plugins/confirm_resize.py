"""``confirm_resize``: a cold resize is kept; the old size is forgotten."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from agent.api import ONE_DOMAIN_SCHEMA, Context, Host, JsonDict, Plan, Plugin, own_domain
from agent.resizing import RedefineStep, pending_of, without_pending


@dataclasses.dataclass(frozen=True)
class ConfirmStep(RedefineStep):
    name: ClassVar[str] = "confirm"
    title: ClassVar[str] = "forget the old size"


class ConfirmResize(Plugin):
    verb = "confirm_resize"
    summary = "Keep a cold resize; what was set aside for going back is free."
    step_kinds = (ConfirmStep,)
    args_schema = ONE_DOMAIN_SCHEMA

    def plan(self, args: Mapping[str, Any], host: Host) -> Plan:
        info = own_domain(host, args["uuid"])
        pending_of(info, "confirm")
        spec = host.toolstack.get_spec(info.uuid)
        return Plan((ConfirmStep(info.uuid, without_pending(spec).to_json(), spec.to_json()),), info.uuid)

    def result(self, args: Mapping[str, Any], plan: Plan, ctx: Context) -> JsonDict:
        return {"domain": ctx.host.toolstack.get_domain(plan.domain).to_json()}
