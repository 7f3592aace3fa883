"""``locks``: which instruction has which domain, and which ones wait."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from agent.api import Check, Context, Host, JsonDict, Plan, Plugin, Step, own_agent


@dataclasses.dataclass(frozen=True)
class LocksStep(Step):
    name: ClassVar[str] = "list"
    title: ClassVar[str] = "read the locks"
    changes: ClassVar[bool] = False

    def run(self, ctx: Context) -> JsonDict | None:
        return {"locks": own_agent(ctx.host).locks()}

    def check(self, ctx: Context) -> Check:
        return Check.NOT_DONE


class Locks(Plugin):
    verb = "locks"
    summary = "List which instruction has the lock of which domain, since when, and which ones wait for it."
    step_kinds = (LocksStep,)
    read_only = True
    lane = "quick"
    args_schema: ClassVar[Mapping[str, Any]] = {"type": "object", "additionalProperties": False, "properties": {}}

    def plan(self, args: Mapping[str, Any], host: Host) -> Plan:
        return Plan((LocksStep(),))
