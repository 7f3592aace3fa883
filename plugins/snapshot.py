"""``snapshot``: keep a domain as it is, memory and disks, as a template; it goes on with overlays on its disks."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from typing import Any, ClassVar

from agent.api import NAME_SCHEMA, UUID_SCHEMA, WAIT_SCHEMA, Context, Host, JsonDict, Plan, Plugin, own_domain
from agent.from_template import OverlayStep
from agent.snapshots import GoOnStep, TemplateStep, check_new, going_on, result
from agent.steps import StartStep


class Snapshot(Plugin):
    verb = "snapshot"
    summary = "Keep a domain as it is now, memory and disks together, to revert to; it goes on."
    step_kinds = (OverlayStep, TemplateStep, GoOnStep, StartStep)
    args_schema: ClassVar[Mapping[str, Any]] = {
        "type": "object",
        "additionalProperties": False,
        "required": ["uuid", "name"],
        "properties": {
            "uuid": UUID_SCHEMA,
            "name": {**NAME_SCHEMA, "description": "Of the snapshot, which is a template; a new one."},
            "wait_seconds": {**WAIT_SCHEMA, "description": "What the guest has to suspend."},
        },
    }

    def plan(self, args: Mapping[str, Any], host: Host) -> Plan:
        info, name, ident = own_domain(host, args["uuid"]), args["name"], str(uuid.uuid4())
        check_new(name, host)
        overlays, go_on = going_on(host.toolstack.get_spec(info.uuid), host, name, ident, ident[:8])
        keep = TemplateStep(info.uuid, name, ident, False, args.get("wait_seconds", 60))
        return Plan((*overlays, keep, go_on, StartStep(info.uuid)), info.uuid)

    def result(self, args: Mapping[str, Any], plan: Plan, ctx: Context) -> JsonDict:
        return {"snapshot": args["name"], **result(plan.domain, ctx.host, ctx.outputs)}
