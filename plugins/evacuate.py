"""``evacuate``: every domain of this host is moved to a target, by instructions ``migrate`` to this host's own queue.

Each of them is journalled by itself, with an id that follows from this one and the domain: killed and started again,
this asks for the same ones and goes on counting.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from agent.api import Check, Context, Host, InstructionError, JsonDict, Plan, Plugin, Step
from agent.migrating import HOST_SCHEMA, MODE_SCHEMA, OPTIONS_SCHEMA, derived
from hypervisor.errors import Unsupported
from hypervisor.toolstack.api import Capability, DomainState

MOVABLE = (DomainState.RUNNING, DomainState.PAUSED)


@dataclasses.dataclass(frozen=True)
class DrainStep(Step):
    """:ivar domains: uuid, name and state of every domain that was there; `at_once` so many are moved side by side.

    :ivar asked: further arguments of ``migrate``.
    """

    name: ClassVar[str] = "drain"
    title: ClassVar[str] = "move every domain"

    domains: list[JsonDict]
    at_once: int
    asked: JsonDict

    def run(self, ctx: Context) -> JsonDict | None:
        rows = {item["uuid"]: {**item, "outcome": "skipped"} for item in self.domains}
        calls = [
            (derived(ctx.instruction, f"migrate:{item['uuid']}"), {"uuid": item["uuid"], **self.asked})
            for item in self.domains
            if item["own"] and item["state"] in MOVABLE
        ]
        idents = {ident: str(args["uuid"]) for ident, args in calls}
        for uuid in idents.values():
            rows[uuid]["outcome"] = "not_begun"
        counted = 0

        def done(ident: str, outcome: JsonDict | InstructionError) -> None:
            nonlocal counted
            row = rows[idents[ident]]
            if isinstance(outcome, InstructionError):
                row |= {"outcome": "failed", "error": outcome.to_json(), "migration": ident}
            else:
                row |= {
                    "outcome": "moved",
                    "downtime_ms": outcome.get("downtime_ms"),
                    "total_s": outcome.get("total_s"),
                }
            counted += 1
            ctx.progress(counted, len(calls), "domains", domain=idents[ident], outcome=row["outcome"])

        if calls:
            ctx.host.peers.call_all(
                ctx.host.name,
                "migrate",
                calls,
                at_once=self.at_once,
                done=done,
                more=lambda: ctx.seconds_left(1.0) > 0,
            )
        return {"domains": list(rows.values())}

    def check(self, ctx: Context) -> Check:
        return Check.NOT_DONE


class Evacuate(Plugin):
    verb = "evacuate"
    summary = "Move every domain that this agent made to another host."
    step_kinds = (DrainStep,)
    lane = "drain"
    args_schema: ClassVar[Mapping[str, Any]] = {
        "type": "object",
        "additionalProperties": False,
        "required": ["target"],
        "properties": {
            "target": HOST_SCHEMA,
            "at_once": {
                "type": "integer",
                "minimum": 1,
                "maximum": 8,
                "default": 2,
                "description": "So many domains are moved side by side.",
            },
            "mode": MODE_SCHEMA,
            "options": OPTIONS_SCHEMA,
        },
    }

    def plan(self, args: Mapping[str, Any], host: Host) -> Plan:
        if args["target"] == host.name:
            raise InstructionError("instruction.bad_args", f"args.target: {host.name!r} is this host: give another")
        if Capability.LIVE_MIGRATION not in host.toolstack.capabilities():
            raise Unsupported(f"the {host.toolstack.name} driver moves no domains: see reeve node show")
        domains = [
            {"uuid": info.uuid, "name": info.name, "state": info.state.value, "own": info.owner == host.owner}
            for info in host.toolstack.list_domains()
        ]
        asked = {name: args[name] for name in ("target", "mode", "options") if name in args}
        return Plan((DrainStep(domains, args.get("at_once", 2), asked),))

    def domain_of(self, args: Mapping[str, Any]) -> str:
        return ""

    def result(self, args: Mapping[str, Any], plan: Plan, ctx: Context) -> JsonDict:
        rows = ctx.outputs["drain"]["domains"]
        count = {
            name: sum(row["outcome"] == name for row in rows) for name in ("moved", "failed", "not_begun", "skipped")
        }
        return {"target": args["target"], **count, "domains": rows}
