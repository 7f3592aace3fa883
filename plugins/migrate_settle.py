"""``migrate_settle``: the other half has decided. From then on the domain runs here, or nothing of it is left here."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from agent.api import UUID_SCHEMA, Check, Context, Host, JsonDict, Plan, Plugin, Step, own_domain
from agent.migrating import IDENT_SCHEMA, UNDER_WAY, find_status, settle_half
from hypervisor.errors import DomainNotFound, MigrationNotFound
from hypervisor.toolstack.api import MigrationRole

END_SECONDS = 10.0


@dataclasses.dataclass(frozen=True)
class SettleStep(Step):
    name: ClassVar[str] = "settle"
    title: ClassVar[str] = "do as the other half has decided"

    ident: str
    uuid: str
    keep: bool

    def run(self, ctx: Context) -> JsonDict | None:
        toolstack = ctx.host.toolstack
        ctx.poll(lambda _left: self._decided(ctx), END_SECONDS)
        status = settle_half(toolstack, self.ident, keep=self.keep)
        if not self.keep:
            toolstack.migration_forget(self.ident)
            return {"phase": "dropped"}
        try:
            info = own_domain(ctx.host, self.uuid)
        except DomainNotFound:
            if status is None:
                raise MigrationNotFound(
                    f"neither migration {self.ident} nor domain {self.uuid} is on host {ctx.host.name}: look elsewhere"
                ) from None
            return {"phase": status.phase.value, "domain": None}  # it has ended, or moved on already
        return {"phase": status.phase.value if status is not None else "running", "domain": info.to_json()}

    def check(self, ctx: Context) -> Check:
        return Check.NOT_DONE

    def _decided(self, ctx: Context) -> bool:
        """A source of which a standby was taken over may be about to write down that it has left."""
        status = find_status(ctx.host.toolstack, self.ident)
        return status is None or status.role is not MigrationRole.SOURCE or status.phase not in UNDER_WAY


class MigrateSettle(Plugin):
    verb = "migrate_settle"
    summary = "Between agents: let the half of a migration that is here run, or drop it."
    step_kinds = (SettleStep,)
    lane = "quick"
    args_schema: ClassVar[Mapping[str, Any]] = {
        "type": "object",
        "additionalProperties": False,
        "required": ["ident", "uuid", "keep"],
        "properties": {
            "ident": IDENT_SCHEMA,
            "uuid": UUID_SCHEMA,
            "keep": {"type": "boolean", "description": "True: it runs here. False: it does not."},
        },
    }

    def plan(self, args: Mapping[str, Any], host: Host) -> Plan:
        return Plan((SettleStep(args["ident"], args["uuid"], args["keep"]),), args["uuid"])

    def domain_of(self, args: Mapping[str, Any]) -> str:
        return f"migration:{args['ident']}"
