"""``restore``: a domain from a saved file, and let it run on."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Mapping
from typing import Any, ClassVar

from agent.api import NAME_SCHEMA, UUID_SCHEMA, Check, Context, Host, JsonDict, Plan, Plugin, Step, own_domain
from agent.steps import StartStep, is_here
from hypervisor.errors import DomainExists, DomainNotFound


@dataclasses.dataclass(frozen=True)
class BuildStep(Step):
    """:ivar uuid: there was no such domain when the plan was made, so that what is there is this step's."""

    name: ClassVar[str] = "build"
    title: ClassVar[str] = "build it from the file"

    uuid: str
    path: str
    domain_name: str

    def run(self, ctx: Context) -> JsonDict | None:
        info = ctx.host.toolstack.restore(self.path, owner=ctx.host.owner, name=self.domain_name, uuid=self.uuid)
        return {"domain": info.to_json()}

    def check(self, ctx: Context) -> Check:
        return Check.DONE if is_here(ctx.host, self.uuid) else Check.NOT_DONE

    def undo(self, ctx: Context) -> None:
        with contextlib.suppress(DomainNotFound):
            own_domain(ctx.host, self.uuid)
            ctx.host.toolstack.destroy(self.uuid)


class Restore(Plugin):
    verb = "restore"
    summary = "Build a domain from a saved file and let it run on."
    step_kinds = (BuildStep, StartStep)
    args_schema: ClassVar[Mapping[str, Any]] = {
        "type": "object",
        "additionalProperties": False,
        "required": ["uuid", "name"],
        "properties": {
            "uuid": {**UUID_SCHEMA, "description": "Of the domain to be: that of the saved one, or a new one."},
            "name": {**NAME_SCHEMA, "description": "Of the file, in the folder [agent] save_dir."},
            "domain_name": {**NAME_SCHEMA, "description": "Of the domain to be; by default that of the saved one."},
            "start": {"type": "boolean", "default": True, "description": "False leaves it paused."},
        },
    }

    def plan(self, args: Mapping[str, Any], host: Host) -> Plan:
        uuid = args["uuid"]
        with contextlib.suppress(DomainNotFound):
            info = host.toolstack.get_domain(uuid)
            raise DomainExists(f"uuid {uuid} is in use by domain {info.name!r}: destroy it or give another")
        path = os.path.join(host.settings["save_dir"], args["name"])
        build = BuildStep(uuid, path, args.get("domain_name", ""))
        return Plan((build, StartStep(uuid)) if args.get("start", True) else (build,), uuid)
