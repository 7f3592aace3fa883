"""``migrate_in``: the target's side of ``migrate`` and ``standby``: may it come here?

From then on what it needs is set aside. Asked by the source's agent.
The claim lasts until the driver has set the memory aside, which is when this ends.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from agent.api import Check, Context, Host, JsonDict, Plan, Plugin, Step
from agent.migrating import HOST_SCHEMA, IDENT_SCHEMA, TOKEN_SCHEMA
from agent.steps import ClaimStep
from hypervisor.errors import MigrationNotFound, MigrationRefused, WrongState
from hypervisor.toolstack.api import MigrationMode, MigrationOffer


@dataclasses.dataclass(frozen=True)
class AdmitStep(Step):
    """:ivar offer: JSON form of the `MigrationOffer`."""

    name: ClassVar[str] = "admit"
    title: ClassVar[str] = "check, set aside and listen"

    ident: str
    token: str
    source: str
    mode: str
    offer: JsonDict

    def run(self, ctx: Context) -> JsonDict | None:
        ticket = ctx.host.toolstack.migration_prepare(
            MigrationOffer.from_json(self.offer),
            ident=self.ident,
            token=self.token,
            owner=ctx.host.owner,
            mode=MigrationMode(self.mode),
            peer=self.source,
        )
        return {"ticket": ticket.to_json()}

    def check(self, ctx: Context) -> Check:
        # Also when it has: the driver gives the same ticket again.
        return Check.NOT_DONE

    def undo(self, ctx: Context) -> None:
        with contextlib.suppress(MigrationNotFound, WrongState):
            ctx.host.toolstack.migration_cancel(self.ident)
            ctx.host.toolstack.migration_forget(self.ident)


class MigrateIn(Plugin):
    verb = "migrate_in"
    summary = "Between agents: set aside what a domain of another host needs, and listen for it."
    step_kinds = (ClaimStep, AdmitStep)
    lane = "quick"
    args_schema: ClassVar[Mapping[str, Any]] = {
        "type": "object",
        "additionalProperties": False,
        "required": ["ident", "token", "source", "mode", "offer"],
        "properties": {
            "ident": IDENT_SCHEMA,
            "token": TOKEN_SCHEMA,
            "source": HOST_SCHEMA,
            "mode": {
                "type": "string",
                "enum": [mode.value for mode in MigrationMode],
                "description": "How it is to be moved; standby: kept here as well.",
            },
            "offer": {"type": "object", "description": "A hypervisor.toolstack.migration.MigrationOffer."},
        },
    }

    def plan(self, args: Mapping[str, Any], host: Host) -> Plan:
        offer = MigrationOffer.from_json(args["offer"])
        if args["source"] == host.name:
            raise MigrationRefused(f"host {host.name!r} is where it comes from: give another target")
        admit = AdmitStep(args["ident"], args["token"], args["source"], args["mode"], dict(args["offer"]))
        return Plan((ClaimStep(offer.uuid, offer.memory_mib, offer.vcpus), admit), offer.uuid)

    def domain_of(self, args: Mapping[str, Any]) -> str:
        return f"migration:{args['ident']}"
