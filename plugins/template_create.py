"""``template_create``: have the guest suspend and keep it as a template; the domain is gone then, or goes on."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from typing import Any, ClassVar

from agent.api import (
    NAME_SCHEMA,
    UUID_SCHEMA,
    WAIT_SCHEMA,
    Context,
    Host,
    JsonDict,
    Plan,
    Plugin,
    own_domain,
)
from agent.snapshots import TemplateStep, check_new


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
        check_new(name, host)
        keep, seconds = args.get("keep_running", False), args.get("wait_seconds", 60)
        return Plan((TemplateStep(info.uuid, name, str(uuid.uuid4()), keep, seconds),), info.uuid)

    def result(self, args: Mapping[str, Any], plan: Plan, ctx: Context) -> JsonDict:
        return {"template": ctx.host.toolstack.template_get(args["name"]).to_json()}
