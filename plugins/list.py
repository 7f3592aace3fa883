"""``list``: the domains of the host."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from agent.api import Check, Context, Host, JsonDict, Plan, Plugin, Step


@dataclasses.dataclass(frozen=True)
class ListStep(Step):
    name: ClassVar[str] = "list"
    title: ClassVar[str] = "read the domain table"
    changes: ClassVar[bool] = False

    own: bool

    def run(self, ctx: Context) -> JsonDict | None:
        domains = ctx.host.toolstack.list_domains()
        return {
            "domains": [
                {**domain.to_json(), "own": domain.owner == ctx.host.owner}
                for domain in domains
                if not self.own or domain.owner == ctx.host.owner
            ]
        }

    def check(self, ctx: Context) -> Check:
        return Check.NOT_DONE


class List(Plugin):
    verb = "list"
    summary = "List the domains of the host, foreign ones included."
    step_kinds = (ListStep,)
    read_only = True
    args_schema: ClassVar[Mapping[str, Any]] = {
        "type": "object",
        "additionalProperties": False,
        "properties": {
            "own": {"type": "boolean", "default": False, "description": "Only the domains this agent made."},
        },
    }

    def plan(self, args: Mapping[str, Any], host: Host) -> Plan:
        return Plan((ListStep(args.get("own", False)),))
