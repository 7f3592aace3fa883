"""The verb of bench/rpc.py: does nothing. A plugin of its own distribution, which the benchmark lays out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from agent.api import Host, JsonDict, Plan, Plugin


class Noop(Plugin):
    """Journalled like a verb that changes something: accepted, finished, replied, each on the disk."""

    verb = "noop"
    summary = "Do nothing."
    args_schema: ClassVar[Mapping[str, Any]] = {
        "type": "object",
        "additionalProperties": False,
        "properties": {"n": {"type": "integer"}},
    }

    def plan(self, args: Mapping[str, Any], host: Host) -> Plan:
        return Plan(())

    def result(self, args: Mapping[str, Any], plan: Plan, ctx: Any) -> JsonDict:
        return {"n": args.get("n", 0)}
