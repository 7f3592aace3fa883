"""``quarantine_retry``: take a refused message in after all."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from agent.api import Check, Context, Host, InstructionError, JsonDict, Plan, Plugin, Step, own_agent


@dataclasses.dataclass(frozen=True)
class RetryStep(Step):
    name: ClassVar[str] = "retry"
    title: ClassVar[str] = "take the message in"

    seq: int

    def run(self, ctx: Context) -> JsonDict | None:
        return own_agent(ctx.host).retry(self.seq)

    def check(self, ctx: Context) -> Check:
        """One that was taken in is not in the quarantine any more."""
        try:
            own_agent(ctx.host).quarantined(self.seq)
        except InstructionError:
            return Check.DONE
        return Check.NOT_DONE


class QuarantineRetry(Plugin):
    verb = "quarantine_retry"
    summary = "Take a refused message in as if it came now."
    step_kinds = (RetryStep,)
    lane = "quick"
    args_schema: ClassVar[Mapping[str, Any]] = {
        "type": "object",
        "additionalProperties": False,
        "required": ["seq"],
        "properties": {
            "seq": {"type": "integer", "minimum": 1, "maximum": 2**62, "description": "Its number in the quarantine."}
        },
    }

    def plan(self, args: Mapping[str, Any], host: Host) -> Plan:
        own_agent(host).quarantined(args["seq"])
        return Plan((RetryStep(args["seq"]),))
