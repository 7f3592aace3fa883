"""``sysrq``: send a magic SysRq key to a guest's kernel."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from agent.api import (
    UUID_SCHEMA,
    Check,
    Context,
    Host,
    InstructionError,
    JsonDict,
    Plan,
    Plugin,
    Step,
    own_domain,
)


@dataclasses.dataclass(frozen=True)
class SysrqStep(Step):
    name: ClassVar[str] = "sysrq"
    title: ClassVar[str] = "send the key"

    uuid: str
    key: str

    def run(self, ctx: Context) -> JsonDict | None:
        own_domain(ctx.host, self.uuid)
        ctx.host.toolstack.sysrq(self.uuid, self.key)
        return {"uuid": self.uuid, "key": self.key}

    def check(self, ctx: Context) -> Check:
        # A key leaves no trace, and some (b, c, o) are not to be sent twice.
        raise InstructionError(
            "instruction.outcome_unknown",
            f"the agent was interrupted while it sent key {self.key!r}: look at the console log of {self.uuid} before "
            "sending it again",
        )


class Sysrq(Plugin):
    verb = "sysrq"
    summary = "Send a magic SysRq key to the guest's kernel."
    step_kinds = (SysrqStep,)
    args_schema: ClassVar[Mapping[str, Any]] = {
        "type": "object",
        "additionalProperties": False,
        "required": ["uuid", "key"],
        "properties": {
            "uuid": UUID_SCHEMA,
            "key": {
                "type": "string",
                "pattern": "^[A-Za-z0-9]$",
                "description": "One letter or digit; h prints what the others do.",
            },
        },
    }

    def plan(self, args: Mapping[str, Any], host: Host) -> Plan:
        info = own_domain(host, args["uuid"])
        return Plan((SysrqStep(info.uuid, args["key"]),), info.uuid)
