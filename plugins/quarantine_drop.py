"""``quarantine_drop``: forget refused messages."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from agent.api import Check, Context, Host, InstructionError, JsonDict, Plan, Plugin, Step, own_agent


@dataclasses.dataclass(frozen=True)
class DropStep(Step):
    name: ClassVar[str] = "drop"
    title: ClassVar[str] = "forget what was refused"

    seq: int | None

    def run(self, ctx: Context) -> JsonDict | None:
        return {"dropped": own_agent(ctx.host).drop(self.seq)}

    def check(self, ctx: Context) -> Check:
        try:
            left = own_agent(ctx.host).quarantined(self.seq)
        except InstructionError:
            return Check.DONE
        return Check.NOT_DONE if left else Check.DONE


class QuarantineDrop(Plugin):
    verb = "quarantine_drop"
    summary = "Forget one refused message, or all of them."
    step_kinds = (DropStep,)
    lane = "quick"
    args_schema: ClassVar[Mapping[str, Any]] = {
        "type": "object",
        "additionalProperties": False,
        "properties": {
            "seq": {"type": "integer", "minimum": 1, "maximum": 2**62, "description": "Its number in the quarantine."},
            "all": {"type": "boolean", "default": False, "description": "All of them, instead of one."},
        },
    }

    def plan(self, args: Mapping[str, Any], host: Host) -> Plan:
        if ("seq" in args) == args.get("all", False):
            raise InstructionError("instruction.bad_args", "args: give either seq or all: true")
        return Plan((DropStep(args.get("seq")),))
