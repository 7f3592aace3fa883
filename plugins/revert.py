"""``revert``: have a domain go on from a snapshot of it, memory and disks; what it is now is kept as another one."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Mapping
from typing import Any, ClassVar

from agent.api import NAME_SCHEMA, UUID_SCHEMA, WAIT_SCHEMA, Context, Host, JsonDict, Plan, Plugin, Step, own_domain
from agent.from_template import OverlayStep
from agent.snapshots import EndStep, GoOnStep, TemplateStep, check_new, going_on, result, snapshot_of
from agent.steps import StartStep
from hypervisor.errors import DomainNotFound


class Revert(Plugin):
    verb = "revert"
    summary = "Have a domain go on from a snapshot of it; what it is now is kept as another snapshot."
    step_kinds = (OverlayStep, TemplateStep, EndStep, GoOnStep, StartStep)
    args_schema: ClassVar[Mapping[str, Any]] = {
        "type": "object",
        "additionalProperties": False,
        "required": ["uuid", "name"],
        "properties": {
            "uuid": {**UUID_SCHEMA, "description": "Of the domain; it may be gone."},
            "name": {**NAME_SCHEMA, "description": "Of the snapshot."},
            "keep_as": {
                **NAME_SCHEMA,
                "description": "Name of the snapshot that keeps what the domain is now; by default the snapshot's with "
                "-before- and eight digits behind it.",
            },
            "force": {
                "type": "boolean",
                "default": False,
                "description": "Give up its memory as it is now, also of a guest that does not suspend, is paused or "
                "has ended. Its disks stay.",
            },
            "wait_seconds": {**WAIT_SCHEMA, "description": "What the guest has to suspend."},
        },
    }

    def plan(self, args: Mapping[str, Any], host: Host) -> Plan:
        domain, mark = args["uuid"], uuid.uuid4().hex[:8]
        snapshot = snapshot_of(host, domain, args["name"])
        overlays, go_on = going_on(snapshot.spec, host, snapshot.name, snapshot.ident, mark)
        leave: list[Step] = []
        with contextlib.suppress(DomainNotFound):
            own_domain(host, domain)
            if args.get("force", False):
                leave.append(EndStep(domain, host.toolstack.get_spec(domain).to_json()))
            else:
                kept = args.get("keep_as", f"{args['name'][:40]}-before-{mark}")
                check_new(kept, host)
                leave.append(TemplateStep(domain, kept, str(uuid.uuid4()), False, args.get("wait_seconds", 60)))
        return Plan((*overlays, *leave, go_on, StartStep(domain)), domain)

    def result(self, args: Mapping[str, Any], plan: Plan, ctx: Context) -> JsonDict:
        kept = [step.template for step in plan.steps if isinstance(step, TemplateStep)]
        return {
            "snapshot": args["name"],
            "kept_as": kept[0] if kept else "",
            **result(plan.domain, ctx.host, ctx.outputs),
        }
