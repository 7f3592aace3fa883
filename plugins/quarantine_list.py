"""``quarantine_list``: the messages that were refused, or one of them as it came."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from agent.api import Check, Context, Host, JsonDict, Plan, Plugin, Step, own_agent


@dataclasses.dataclass(frozen=True)
class ListStep(Step):
    name: ClassVar[str] = "list"
    title: ClassVar[str] = "read the quarantine"
    changes: ClassVar[bool] = False

    seq: int | None

    def run(self, ctx: Context) -> JsonDict | None:
        return {"messages": own_agent(ctx.host).quarantined(self.seq)}

    def check(self, ctx: Context) -> Check:
        return Check.NOT_DONE


class QuarantineList(Plugin):
    verb = "quarantine_list"
    summary = "List the messages that were refused, or show one of them as it came."
    step_kinds = (ListStep,)
    read_only = True
    lane = "quick"
    args_schema: ClassVar[Mapping[str, Any]] = {
        "type": "object",
        "additionalProperties": False,
        "properties": {
            "seq": {"type": "integer", "minimum": 1, "maximum": 2**62, "description": "Its number in the quarantine."}
        },
    }

    def plan(self, args: Mapping[str, Any], host: Host) -> Plan:
        return Plan((ListStep(args.get("seq")),))
