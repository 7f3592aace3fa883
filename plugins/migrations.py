"""``migrations``: the halves of migrations that this host keeps a record of."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from agent.api import UUID_SCHEMA, Check, Context, Host, JsonDict, Plan, Plugin, Step
from agent.migrating import IDENT_SCHEMA, described


@dataclasses.dataclass(frozen=True)
class ListStep(Step):
    name: ClassVar[str] = "list"
    title: ClassVar[str] = "read the records"
    changes: ClassVar[bool] = False

    ident: str
    uuid: str

    def run(self, ctx: Context) -> JsonDict | None:
        found = ctx.host.toolstack.migration_list()
        return {
            "migrations": [
                described(status)
                for status in found
                if self.ident in ("", status.ident) and self.uuid in ("", status.uuid)
            ]
        }

    def check(self, ctx: Context) -> Check:
        return Check.NOT_DONE


class Migrations(Plugin):
    verb = "migrations"
    summary = "List the migrations that are under way, or wait for a decision, with this host as source or target."
    step_kinds = (ListStep,)
    read_only = True
    lane = "quick"
    args_schema: ClassVar[Mapping[str, Any]] = {
        "type": "object",
        "additionalProperties": False,
        "properties": {"ident": IDENT_SCHEMA, "uuid": UUID_SCHEMA},
    }

    def plan(self, args: Mapping[str, Any], host: Host) -> Plan:
        return Plan((ListStep(args.get("ident", ""), args.get("uuid", "")),))

    def domain_of(self, args: Mapping[str, Any]) -> str:
        return ""
