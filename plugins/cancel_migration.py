"""``cancel_migration``: the domain stays where it is. The instruction ``migrate`` sees it and takes back the rest."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from agent.api import Check, Context, Host, JsonDict, Plan, Plugin, Step
from agent.migrating import IDENT_SCHEMA, described, find_status
from hypervisor.errors import MigrationNotFound, OperationTimeout
from hypervisor.toolstack.api import MigrationStatus

APPEAR_SECONDS = 5.0
"""The instruction may have come a moment ago: so long its migration is waited for."""
END_SECONDS = 30.0


@dataclasses.dataclass(frozen=True)
class CancelStep(Step):
    name: ClassVar[str] = "cancel"
    title: ClassVar[str] = "end it while the domain is still here"

    ident: str

    def run(self, ctx: Context) -> JsonDict | None:
        toolstack = ctx.host.toolstack
        if ctx.poll(lambda _left: find_status(toolstack, self.ident), APPEAR_SECONDS) is None:
            raise MigrationNotFound(f"no migration {self.ident} on this host: it has ended, or is not begun yet")
        toolstack.migration_cancel(self.ident)
        # Whoever carries it out forgets it as soon as it has ended.
        last: list[MigrationStatus] = []

        def over(_left: float) -> bool:
            status = find_status(toolstack, self.ident)
            last[:] = [status] if status is not None else last
            return status is None or status.phase.ended

        if not ctx.poll(over, END_SECONDS):
            raise OperationTimeout(f"migration {self.ident} has not ended yet: look again")
        return {"migration": described(last[0]) if last else {"ident": self.ident}}

    def check(self, ctx: Context) -> Check:
        return Check.NOT_DONE


class CancelMigration(Plugin):
    verb = "cancel_migration"
    summary = "End a migration before the domain has left: it runs on, and nothing is left on the target."
    step_kinds = (CancelStep,)
    lane = "quick"
    args_schema: ClassVar[Mapping[str, Any]] = {
        "type": "object",
        "additionalProperties": False,
        "required": ["ident"],
        "properties": {"ident": IDENT_SCHEMA},
    }

    def plan(self, args: Mapping[str, Any], host: Host) -> Plan:
        return Plan((CancelStep(args["ident"]),))
