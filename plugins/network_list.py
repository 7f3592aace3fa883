"""``network_list``: the nics of a domain, or of every domain, as they are now."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from agent.api import UUID_SCHEMA, Check, Context, Host, JsonDict, Plan, Plugin, Step
from agent.steps import devices_of


@dataclasses.dataclass(frozen=True)
class NetworkListStep(Step):
    """:ivar uuid: the domain, "" for every one."""

    name: ClassVar[str] = "network_list"
    title: ClassVar[str] = "read the nics"
    changes: ClassVar[bool] = False

    uuid: str

    def run(self, ctx: Context) -> JsonDict | None:
        return {"devices": devices_of(ctx.host, "nic", self.uuid)}

    def check(self, ctx: Context) -> Check:
        return Check.NOT_DONE


class NetworkList(Plugin):
    verb = "network_list"
    summary = "List the nics of a domain, or of every domain on the host."
    step_kinds = (NetworkListStep,)
    read_only = True
    args_schema: ClassVar[Mapping[str, Any]] = {
        "type": "object",
        "additionalProperties": False,
        "properties": {"uuid": {**UUID_SCHEMA, "description": "The domain; every one when it is left out."}},
    }

    def plan(self, args: Mapping[str, Any], host: Host) -> Plan:
        uuid = args.get("uuid", "")
        return Plan((NetworkListStep(uuid),), uuid)

    def domain_of(self, args: Mapping[str, Any]) -> str:
        return ""  # it looks at what is there now, also while another instruction is under way
