"""``detach_disk``: have the guest let go of a disk and take it away."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from agent.api import UUID_SCHEMA, WAIT_SCHEMA, Context, Host, JsonDict, Plan, Plugin
from agent.steps import DetachStep, detach_steps


class DetachDisk(Plugin):
    verb = "detach_disk"
    summary = "Have the guest let go of a disk and take it away."
    step_kinds = (DetachStep,)
    args_schema: ClassVar[Mapping[str, Any]] = {
        "type": "object",
        "additionalProperties": False,
        "required": ["uuid", "id"],
        "properties": {
            "uuid": UUID_SCHEMA,
            "id": {"type": "string", "pattern": "^xvd[a-p]$", "description": "The disk's id."},
            "wait_seconds": {**WAIT_SCHEMA, "default": 30, "description": "Seconds the guest has to let go of it."},
            "force": {
                "type": "boolean",
                "default": False,
                "description": "Take it away when the guest has not let go of it by then; what it holds back is lost.",
            },
        },
    }

    def plan(self, args: Mapping[str, Any], host: Host) -> Plan:
        seconds, force = float(args.get("wait_seconds", 30)), bool(args.get("force", False))
        steps = detach_steps(host, args["uuid"], "disk", str(args["id"]), seconds=seconds, force=force)
        return Plan(steps, args["uuid"])

    def result(self, args: Mapping[str, Any], plan: Plan, ctx: Context) -> JsonDict:
        forced = ctx.outputs.get("detach", {}).get("forced", False)
        return {"uuid": plan.domain, "id": args["id"], "state": "detached", "forced": forced}
