"""``break_lock``: take a domain's lock from an instruction that does not give it up."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from agent.api import Check, Context, Host, JsonDict, Plan, Plugin, Step, own_agent


@dataclasses.dataclass(frozen=True)
class BreakStep(Step):
    name: ClassVar[str] = "break"
    title: ClassVar[str] = "take the lock from its holder"

    domain: str
    force: bool

    def run(self, ctx: Context) -> JsonDict | None:
        return own_agent(ctx.host).break_lock(self.domain, force=self.force)

    def check(self, ctx: Context) -> Check:
        # Locks are not there any more after a crash: the one that was to be broken is not either.
        return Check.DONE


class BreakLock(Plugin):
    verb = "break_lock"
    summary = "Take a domain's lock from an instruction that does not give it up; by force also from one that works."
    step_kinds = (BreakStep,)
    lane = "quick"
    args_schema: ClassVar[Mapping[str, Any]] = {
        "type": "object",
        "additionalProperties": False,
        "required": ["domain"],
        "properties": {
            "domain": {
                "type": "string",
                "minLength": 1,
                "maxLength": 128,
                "description": "Whose lock: the domain that `locks` shows.",
            },
            "force": {"type": "boolean", "default": False, "description": "Also when its holder is at work."},
        },
    }

    def plan(self, args: Mapping[str, Any], host: Host) -> Plan:
        own_agent(host)
        return Plan((BreakStep(args["domain"], args.get("force", False)),))
