"""``attach_disk``: give a domain one more disk, while it runs or before it does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from agent.api import DEVICE_WAIT_SCHEMA, DISK_SCHEMA, UUID_SCHEMA, Context, Host, JsonDict, Plan, Plugin
from agent.images.remote.steps import FetchStep, PlaceStep, local_disk
from agent.steps import AttachStep, ConnectStep, attach_steps
from hypervisor.toolstack.devices import DiskSpec


class AttachDisk(Plugin):
    verb = "attach_disk"
    summary = "Give a domain one more disk; it becomes part of its spec."
    step_kinds = (FetchStep, PlaceStep, AttachStep, ConnectStep)
    args_schema: ClassVar[Mapping[str, Any]] = {
        "type": "object",
        "additionalProperties": False,
        "required": ["uuid", "disk"],
        "properties": {"uuid": UUID_SCHEMA, "disk": DISK_SCHEMA, "wait_seconds": DEVICE_WAIT_SCHEMA},
    }

    def plan(self, args: Mapping[str, Any], host: Host) -> Plan:
        seconds = float(args.get("wait_seconds", 10))
        disk, fetch = local_disk(args["disk"], host, args["uuid"])
        steps = attach_steps(host, args["uuid"], DiskSpec.from_json(disk), seconds)
        if not any(isinstance(step, AttachStep) for step in steps):
            fetch = ()  # it is attached already
        return Plan((*fetch, *steps), args["uuid"])

    def result(self, args: Mapping[str, Any], plan: Plan, ctx: Context) -> JsonDict:
        return {"uuid": plan.domain, "device": dict(ctx.outputs["connect"])}
