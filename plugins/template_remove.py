"""``template_remove``: remove a template that no domain runs on."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from agent.api import NAME_SCHEMA, Check, Context, Host, JsonDict, Plan, Plugin, Step
from hypervisor.errors import TemplateInUse, TemplateNotFound


@dataclasses.dataclass(frozen=True)
class RemoveStep(Step):
    """:ivar ident: of the template that was there when the plan was made. Cannot be undone."""

    name: ClassVar[str] = "remove"
    title: ClassVar[str] = "remove the template"

    template: str
    ident: str
    force: bool

    def run(self, ctx: Context) -> JsonDict | None:
        if self._there(ctx):
            ctx.host.toolstack.template_remove(self.template, force=self.force)
        return None

    def check(self, ctx: Context) -> Check:
        return Check.NOT_DONE if self._there(ctx) else Check.DONE

    def undo(self, ctx: Context) -> None:
        """What is gone is gone."""

    def _there(self, ctx: Context) -> bool:
        try:
            return ctx.host.toolstack.template_get(self.template).ident == self.ident
        except TemplateNotFound:
            return False


class TemplateRemove(Plugin):
    verb = "template_remove"
    summary = "Remove a template."
    step_kinds = (RemoveStep,)
    args_schema: ClassVar[Mapping[str, Any]] = {
        "type": "object",
        "additionalProperties": False,
        "required": ["name"],
        "properties": {
            "name": {**NAME_SCHEMA, "description": "Of the template."},
            "force": {
                "type": "boolean",
                "default": False,
                "description": "Also when domains run on its memory; it takes its place on disk until they have ended.",
            },
        },
    }

    def plan(self, args: Mapping[str, Any], host: Host) -> Plan:
        info, force = host.toolstack.template_get(args["name"]), args.get("force", False)
        if info.users and not force:
            raise TemplateInUse(f"template {info.name} is the memory of domain {info.users[0]}: destroy it first")
        return Plan((RemoveStep(info.name, info.ident, force),))

    def result(self, args: Mapping[str, Any], plan: Plan, ctx: Context) -> JsonDict:
        return {"template": {"name": args["name"], "state": "gone"}}
