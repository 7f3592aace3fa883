"""``template_create``: have the guest suspend and keep it as a template; the domain is gone then, or goes on."""

from __future__ import annotations

import contextlib
import dataclasses
import uuid
from collections.abc import Mapping
from typing import Any, ClassVar

from agent.api import (
    NAME_SCHEMA,
    UUID_SCHEMA,
    WAIT_SCHEMA,
    Check,
    Context,
    Host,
    JsonDict,
    Plan,
    Plugin,
    Step,
    own_domain,
)
from hypervisor.errors import DomainNotFound, TemplateExists, TemplateNotFound
from hypervisor.toolstack.api import TemplateInfo


@dataclasses.dataclass(frozen=True)
class TemplateStep(Step):
    """:ivar ident: made with the plan: a template that has it is this step's."""

    name: ClassVar[str] = "template"
    title: ClassVar[str] = "have the guest suspend and keep it as a template"

    uuid: str
    template: str
    ident: str
    keep_running: bool
    seconds: float

    def run(self, ctx: Context) -> JsonDict | None:
        own_domain(ctx.host, self.uuid)
        made = ctx.host.toolstack.template_create(
            self.uuid,
            self.template,
            ident=self.ident,
            keep_running=self.keep_running,
            timeout=ctx.seconds_left(self.seconds),
        )
        return {"downtime_ms": made.downtime_ms}

    def check(self, ctx: Context) -> Check:
        if self._mine(ctx) is None:
            return Check.NOT_DONE
        # Whole, and its domain still here: the host process is about to take it away.
        return Check.UNKNOWN if self._here(ctx) and not self.keep_running else Check.DONE

    def undo(self, ctx: Context) -> None:
        made = self._mine(ctx)
        if made is None:
            return
        if not self._here(ctx):
            ctx.host.toolstack.clone(self.template, dataclasses.replace(made.spec, owner=ctx.host.owner))
            ctx.host.toolstack.unpause(self.uuid)
        with contextlib.suppress(TemplateNotFound):
            ctx.host.toolstack.template_remove(self.template, force=True)

    def _mine(self, ctx: Context) -> TemplateInfo | None:
        try:
            found = ctx.host.toolstack.template_get(self.template)
        except TemplateNotFound:
            return None
        return found if found.ident == self.ident else None

    def _here(self, ctx: Context) -> bool:
        try:
            own_domain(ctx.host, self.uuid)
        except DomainNotFound:
            return False
        return True


class TemplateCreate(Plugin):
    verb = "template_create"
    summary = "Make a template of a domain, memory and all, from which others begin."
    step_kinds = (TemplateStep,)
    args_schema: ClassVar[Mapping[str, Any]] = {
        "type": "object",
        "additionalProperties": False,
        "required": ["uuid", "name"],
        "properties": {
            "uuid": UUID_SCHEMA,
            "name": {**NAME_SCHEMA, "description": "Of the template; a new one."},
            "keep_running": {
                "type": "boolean",
                "default": False,
                "description": "The guest goes on afterwards; not with disks that it can write to.",
            },
            "wait_seconds": {**WAIT_SCHEMA, "description": "What the guest has to suspend."},
        },
    }

    def plan(self, args: Mapping[str, Any], host: Host) -> Plan:
        info = own_domain(host, args["uuid"])
        name = args["name"]
        with contextlib.suppress(TemplateNotFound):
            host.toolstack.template_get(name)
            raise TemplateExists(f"there is a template {name!r} already: remove it, or give another name")
        keep, seconds = args.get("keep_running", False), args.get("wait_seconds", 60)
        return Plan((TemplateStep(info.uuid, name, str(uuid.uuid4()), keep, seconds),), info.uuid)

    def result(self, args: Mapping[str, Any], plan: Plan, ctx: Context) -> JsonDict:
        return {"template": ctx.host.toolstack.template_get(args["name"]).to_json()}
