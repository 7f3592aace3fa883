"""``migrate_finish``: the migration is over, its record goes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from agent.api import Check, Context, Host, JsonDict, Plan, Plugin, Step
from agent.migrating import IDENT_SCHEMA


@dataclasses.dataclass(frozen=True)
class ForgetStep(Step):
    name: ClassVar[str] = "forget"
    title: ClassVar[str] = "forget the migration"

    ident: str

    def run(self, ctx: Context) -> JsonDict | None:
        ctx.host.toolstack.migration_forget(self.ident)
        return {"ident": self.ident}

    def check(self, ctx: Context) -> Check:
        return Check.NOT_DONE


class MigrateFinish(Plugin):
    verb = "migrate_finish"
    summary = "Between agents: forget a migration that has ended."
    step_kinds = (ForgetStep,)
    lane = "quick"
    args_schema: ClassVar[Mapping[str, Any]] = {
        "type": "object",
        "additionalProperties": False,
        "required": ["ident"],
        "properties": {"ident": IDENT_SCHEMA},
    }

    def plan(self, args: Mapping[str, Any], host: Host) -> Plan:
        return Plan((ForgetStep(args["ident"]),))

    def domain_of(self, args: Mapping[str, Any]) -> str:
        return f"migration:{args['ident']}"
