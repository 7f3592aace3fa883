"""``standby_takeover``: the domain runs here from now on. Sent to the host that keeps it.

Without force the source hands it over, and nothing is lost. With force the last whole epoch runs, whatever the source
does: who gives it knows that the domain does not run there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from agent.api import (
    UUID_SCHEMA,
    BrokerError,
    Check,
    Context,
    Host,
    InstructionError,
    JsonDict,
    Plan,
    Plugin,
    ReplyTimeout,
    Step,
    TooLate,
    own_domain,
)
from agent.migrating import ask_or_tell, find_status
from hypervisor.errors import DomainNotFound, MigrationNotFound
from hypervisor.toolstack.api import MigrationMode, MigrationPhase, MigrationRole, MigrationStatus


@dataclasses.dataclass(frozen=True)
class TakeStep(Step):
    name: ClassVar[str] = "take"
    title: ClassVar[str] = "let the domain run here"
    commits: ClassVar[bool] = True

    ident: str
    force: bool

    def run(self, ctx: Context) -> JsonDict | None:
        ctx.host.toolstack.migration_takeover(self.ident, force=self.force)
        return {"status": ctx.host.toolstack.migration_status(self.ident).to_json()}

    def check(self, ctx: Context) -> Check:
        return Check.DONE if _runs(find_status(ctx.host.toolstack, self.ident)) else Check.NOT_DONE

    def undo(self, ctx: Context) -> None:
        status = find_status(ctx.host.toolstack, self.ident)
        if status is not None and _runs(status):
            raise TooLate({"status": status.to_json()})


def _runs(status: MigrationStatus | None) -> bool:
    return status is not None and status.phase is MigrationPhase.RUNNING


@dataclasses.dataclass(frozen=True)
class TidyStep(Step):
    """The source has nothing any more, or it is said what it has."""

    name: ClassVar[str] = "tidy"
    title: ClassVar[str] = "drop what the source still has, and forget the standby"

    ident: str
    uuid: str
    source: str

    def run(self, ctx: Context) -> JsonDict | None:
        status = find_status(ctx.host.toolstack, self.ident)
        answer = self._tidy_source(ctx)
        ctx.host.toolstack.migration_forget(self.ident)
        try:
            domain = own_domain(ctx.host, self.uuid).to_json()
        except DomainNotFound:
            domain = None  # it has ended or moved on already
        return {"domain": domain, "source": answer, "status": status.to_json() if status is not None else {}}

    def check(self, ctx: Context) -> Check:
        return Check.NOT_DONE

    def _tidy_source(self, ctx: Context) -> JsonDict:
        args = {"ident": self.ident, "uuid": self.uuid, "keep": False}
        try:
            ask_or_tell(ctx, self.source, "migrate_settle", args, step="tidy")
        except (BrokerError, ReplyTimeout, InstructionError) as exc:  # the last: it has not stopped, by force only
            return {"dropped": False, "error": exc.to_json()}
        return {"dropped": True}


class StandbyTakeover(Plugin):
    verb = "standby_takeover"
    summary = "Let a domain run here that this host keeps as a standby."
    step_kinds = (TakeStep, TidyStep)
    args_schema: ClassVar[Mapping[str, Any]] = {
        "type": "object",
        "additionalProperties": False,
        "required": ["uuid"],
        "properties": {
            "uuid": UUID_SCHEMA,
            "force": {
                "type": "boolean",
                "default": False,
                "description": "Do not wait for the source. A domain that runs there, too, runs twice.",
            },
        },
    }

    def plan(self, args: Mapping[str, Any], host: Host) -> Plan:
        uuid = args["uuid"]
        found = [
            status
            for status in host.toolstack.migration_list()
            if status.uuid == uuid
            and status.role is MigrationRole.TARGET
            and status.mode is MigrationMode.STANDBY
            and status.phase is not MigrationPhase.DROPPED
        ]
        if not found:
            raise MigrationNotFound(f"this host keeps no standby of domain {uuid}: list the migrations")
        status = found[-1]
        take = TakeStep(status.ident, args.get("force", False))
        return Plan((take, TidyStep(status.ident, uuid, status.peer)), uuid)

    def result(self, args: Mapping[str, Any], plan: Plan, ctx: Context) -> JsonDict:
        tidied = ctx.outputs["tidy"]
        status = tidied["status"] or ctx.outputs.get("take", {}).get("status", {})
        figures = ("epochs", "lost_ms", "peer")
        told = {name: status[name] for name in figures if name in status}
        return {"domain": tidied["domain"], "source": tidied["source"], **told}
