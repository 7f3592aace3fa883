"""``template_list``: the templates of the host."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from agent.api import Check, Context, Host, JsonDict, Plan, Plugin, Step


@dataclasses.dataclass(frozen=True)
class ListStep(Step):
    name: ClassVar[str] = "list"
    title: ClassVar[str] = "read the store of templates"
    changes: ClassVar[bool] = False

    def run(self, ctx: Context) -> JsonDict | None:
        return {"templates": [info.to_json() for info in ctx.host.toolstack.template_list()]}

    def check(self, ctx: Context) -> Check:
        return Check.NOT_DONE


class TemplateList(Plugin):
    verb = "template_list"
    summary = "List the templates of the host, with the domains that run on each."
    step_kinds = (ListStep,)
    read_only = True
    args_schema: ClassVar[Mapping[str, Any]] = {"type": "object", "additionalProperties": False, "properties": {}}

    def plan(self, args: Mapping[str, Any], host: Host) -> Plan:
        return Plan((ListStep(),))
