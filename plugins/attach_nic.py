"""``attach_nic``: give a domain one more nic, while it runs or before it does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from agent.api import DEVICE_WAIT_SCHEMA, NIC_SCHEMA, UUID_SCHEMA, Context, Host, JsonDict, Plan, Plugin
from agent.steps import AttachStep, ConnectStep, attach_steps, nic_spec
from hypervisor.toolstack.devices import MAX_NICS


class AttachNic(Plugin):
    verb = "attach_nic"
    summary = "Give a domain one more nic; it becomes part of its spec."
    step_kinds = (AttachStep, ConnectStep)
    args_schema: ClassVar[Mapping[str, Any]] = {
        "type": "object",
        "additionalProperties": False,
        "required": ["uuid", "nic"],
        "properties": {"uuid": UUID_SCHEMA, "nic": NIC_SCHEMA, "wait_seconds": DEVICE_WAIT_SCHEMA},
    }

    def plan(self, args: Mapping[str, Any], host: Host) -> Plan:
        used = {device.id for device in host.toolstack.list_devices(args["uuid"]) if device.kind == "nic"}
        free = next((number for number in range(MAX_NICS) if str(number) not in used), 0)
        seconds = float(args.get("wait_seconds", 10))
        return Plan(attach_steps(host, args["uuid"], nic_spec(args["nic"], free), seconds), args["uuid"])

    def result(self, args: Mapping[str, Any], plan: Plan, ctx: Context) -> JsonDict:
        return {"uuid": plan.domain, "device": dict(ctx.outputs["connect"])}
