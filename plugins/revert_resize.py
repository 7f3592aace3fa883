"""``revert_resize``: a cold resize is taken back, by a restart with the old size."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from agent.api import UUID_SCHEMA, WAIT_SCHEMA, Context, Host, JsonDict, Plan, Plugin, own_domain
from agent.resizing import (
    RedefineStep,
    RestartStep,
    SettleStep,
    cold_steps,
    held_mib,
    pending_of,
    without_pending,
)
from agent.steps import ClaimStep
from hypervisor.errors import WrongState


class RevertResize(Plugin):
    verb = "revert_resize"
    summary = "Take a cold resize back: restart the domain with the size it had. Disks stay as large as they are."
    step_kinds = (ClaimStep, RedefineStep, RestartStep, SettleStep)
    args_schema: ClassVar[Mapping[str, Any]] = {
        "type": "object",
        "additionalProperties": False,
        "required": ["uuid"],
        "properties": {
            "uuid": UUID_SCHEMA,
            "wait_seconds": {**WAIT_SCHEMA, "description": "Seconds the guest has to stop."},
            "force": {
                "type": "boolean",
                "default": False,
                "description": "End a guest that has not stopped by then, or that is paused.",
            },
        },
    }

    def plan(self, args: Mapping[str, Any], host: Host) -> Plan:
        info = own_domain(host, args["uuid"])
        pending = pending_of(info, "revert")
        if not pending.open():
            raise WrongState(f"the resize of domain {info.uuid} was confirmed by the time set for it: resize it anew")
        now = host.toolstack.get_spec(info.uuid)
        old = dataclasses.replace(without_pending(now), **pending.old)
        old.validate()
        claim = ClaimStep(info.uuid, max(held_mib(info), old.memory_mib), max(info.vcpus, old.vcpus))
        seconds, force = float(args.get("wait_seconds", 60)), bool(args.get("force", False))
        return Plan((claim, *cold_steps(info, now, old, seconds=seconds, force=force)), info.uuid)

    def result(self, args: Mapping[str, Any], plan: Plan, ctx: Context) -> JsonDict:
        return {"domain": ctx.host.toolstack.get_domain(plan.domain).to_json()}
