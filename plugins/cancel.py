"""``cancel``: end an instruction that is not wanted any more."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from agent.api import UUID_SCHEMA, Check, Context, Host, InstructionError, JsonDict, Plan, Plugin, Step, own_agent

WAIT_SECONDS = 5.0
LONGEST_WAIT = 10.0


@dataclasses.dataclass(frozen=True)
class CancelStep(Step):
    name: ClassVar[str] = "cancel"
    title: ClassVar[str] = "have it end"

    ident: str
    wait: float

    def run(self, ctx: Context) -> JsonDict | None:
        if self.ident == ctx.instruction:
            raise InstructionError("instruction.bad_args", "args.id: an instruction cannot cancel itself")
        control = own_agent(ctx.host)
        before = control.progress(self.ident)
        control.cancel(self.ident)
        ctx.poll(lambda _seconds: control.progress(self.ident)["ended"], self.wait)
        return described(before, control.progress(self.ident))

    def check(self, ctx: Context) -> Check:
        # Not done also when it is: cancelling again changes nothing, and the output is made by running it.
        return Check.NOT_DONE


def described(before: Mapping[str, Any], now: Mapping[str, Any]) -> JsonDict:
    """What became of it, for whoever asked."""
    error = now["error"] or {}
    if before["ended"]:
        outcome, detail = "too_late", "it had ended before"
    elif not now["ended"]:
        outcome, detail = "cancelling", "it gives way at its next step, or goes on if that is past taking back"
    elif error.get("code") == "instruction.cancelled":
        outcome, detail = ("undone", "it was undone") if now["steps"] else ("cancelled", "it was not begun")
        if not error.get("undone"):
            detail += "; something of it is left"
    else:
        outcome, detail = "finished", "it came to its end" if not error else "it failed by itself"
    return {**now, "outcome": outcome, "detail": detail}


class Cancel(Plugin):
    verb = "cancel"
    summary = "End an instruction: one that is queued at once, one that runs at its next step."
    step_kinds = (CancelStep,)
    lane = "quick"
    args_schema: ClassVar[Mapping[str, Any]] = {
        "type": "object",
        "additionalProperties": False,
        "required": ["id"],
        "properties": {
            "id": UUID_SCHEMA,
            "wait": {
                "type": "number",
                "minimum": 0,
                "maximum": LONGEST_WAIT,
                "default": WAIT_SECONDS,
                "description": "Seconds that it may take to end.",
            },
        },
    }

    def plan(self, args: Mapping[str, Any], host: Host) -> Plan:
        own_agent(host)
        return Plan((CancelStep(args["id"], args.get("wait", WAIT_SECONDS)),))
