"""``console_log``: what the guest printed."""

from __future__ import annotations

import base64
import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from agent.api import UUID_SCHEMA, Check, Context, Host, JsonDict, Plan, Plugin, Step

MAX_BYTES = 262144


@dataclasses.dataclass(frozen=True)
class ConsoleLogStep(Step):
    name: ClassVar[str] = "console_log"
    title: ClassVar[str] = "read the console log"
    changes: ClassVar[bool] = False

    uuid: str
    max_bytes: int
    raw: bool

    def run(self, ctx: Context) -> JsonDict | None:
        data = ctx.host.toolstack.console_log(self.uuid, self.max_bytes)
        if self.raw:
            return {"uuid": self.uuid, "bytes": len(data), "base64": base64.b64encode(data).decode()}
        return {"uuid": self.uuid, "bytes": len(data), "text": data.decode(errors="replace")}

    def check(self, ctx: Context) -> Check:
        return Check.NOT_DONE


class ConsoleLog(Plugin):
    verb = "console_log"
    summary = "The last bytes the guest printed on its console."
    step_kinds = (ConsoleLogStep,)
    read_only = True
    args_schema: ClassVar[Mapping[str, Any]] = {
        "type": "object",
        "additionalProperties": False,
        "required": ["uuid"],
        "properties": {
            "uuid": UUID_SCHEMA,
            "max_bytes": {
                "type": "integer",
                "minimum": 1,
                "maximum": MAX_BYTES,
                "default": 65536,
                "description": "At most so many bytes.",
            },
            "raw": {
                "type": "boolean",
                "default": False,
                "description": "Give base64 of the exact bytes instead of text (where what is not UTF-8 is replaced).",
            },
        },
    }

    def plan(self, args: Mapping[str, Any], host: Host) -> Plan:
        step = ConsoleLogStep(args["uuid"], args.get("max_bytes", 65536), args.get("raw", False))
        return Plan((step,), args["uuid"])

    def domain_of(self, args: Mapping[str, Any]) -> str:
        return ""  # readable while another instruction for the domain is under way
