"""``resolve_migration``: an operator decides where a domain runs that is paused on both sides.

The other host is asked first. What is dropped is dropped before the other half may run, and nothing is dropped unless
the other half is whole.
"""

from __future__ import annotations

import dataclasses
import uuid as uuid_module
from collections.abc import Mapping
from typing import Any, ClassVar

from agent.api import (
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
)
from agent.migrating import ANSWER_SECONDS, HOST_SCHEMA, IDENT_SCHEMA, ask, described, find_status, settle_half
from hypervisor.errors import MigrationNotFound, MigrationRefused
from hypervisor.toolstack.api import MigrationPhase, MigrationRole, MigrationStatus

Phase = MigrationPhase
MAY_RUN = {
    MigrationRole.SOURCE: (Phase.UNRESOLVED, Phase.KEPT),
    MigrationRole.TARGET: (Phase.COMPLETE, Phase.UNRESOLVED, Phase.RUNNING),
}
MAY_GO = {
    MigrationRole.SOURCE: (Phase.UNRESOLVED, Phase.MOVED),
    MigrationRole.TARGET: (Phase.COMPLETE, Phase.UNRESOLVED, Phase.WAITING, Phase.RECEIVING, Phase.DROPPED),
}


@dataclasses.dataclass(frozen=True)
class ResolveStep(Step):
    """:ivar peer: the other host, or "" for the one that the record names."""

    name: ClassVar[str] = "resolve"
    title: ClassVar[str] = "let one half run and drop the other"

    ident: str
    keep: bool
    peer: str
    force: bool

    def run(self, ctx: Context) -> JsonDict | None:
        toolstack = ctx.host.toolstack
        status = find_status(toolstack, self.ident)
        if status is None:
            raise MigrationNotFound(f"no migration {self.ident} on this host: list the migrations")
        there = None if self.force else self._other(ctx, status)
        self._allow(status, there)
        if self.keep:
            self._settle_there(ctx, status, there)
        settled = settle_half(toolstack, self.ident, keep=self.keep)
        if not self.keep:
            self._settle_there(ctx, status, there)
        toolstack.migration_forget(self.ident)
        return {"migration": described(settled if settled is not None else status)}

    def check(self, ctx: Context) -> Check:
        return Check.NOT_DONE

    def _other(self, ctx: Context, status: MigrationStatus) -> MigrationStatus | None:
        """The other half; None when its host knows of none. :raises MigrationRefused: it cannot be asked."""
        peer = self.peer or status.peer
        try:
            # Never an answer of before: what is there now counts.
            ident = str(uuid_module.uuid4())
            args = {"ident": self.ident}
            answer = ctx.host.peers.call(
                peer, "migrations", args, ident=ident, timeout=ctx.seconds_left(ANSWER_SECONDS), expire=True
            )
        except (BrokerError, ReplyTimeout, InstructionError) as exc:
            raise MigrationRefused(
                f"host {peer or '?'} cannot be asked what became of the other half ({exc.message}): look there; if you "
                "are sure that it does not run there, give force"
            ) from exc
        known = {field.name for field in dataclasses.fields(MigrationStatus)}
        for item in answer["migrations"]:
            return MigrationStatus.from_json({name: value for name, value in item.items() if name in known})
        return None

    def _allow(self, here: MigrationStatus, there: MigrationStatus | None) -> None:
        """:raises MigrationRefused: it would run twice, or nowhere."""
        wanted = "run here" if self.keep else "be dropped here"
        if here.phase not in (MAY_RUN if self.keep else MAY_GO)[here.role]:
            raise MigrationRefused(f"migration {self.ident} is {here.phase.value} here: it cannot {wanted}")
        if self.force:
            return
        if there is None:
            # A target that knows of none dropped it. A source that does may have forgotten it after either end.
            if not (here.role is MigrationRole.SOURCE and self.keep):
                raise MigrationRefused(
                    f"host {self.peer or here.peer} knows nothing of migration {self.ident} any more: look whether "
                    f"domain {here.uuid} runs there; when it may {wanted}, give force"
                )
        elif there.phase not in (MAY_GO if self.keep else MAY_RUN)[there.role]:
            raise MigrationRefused(
                f"migration {self.ident} is {there.phase.value} on host {self.peer or here.peer}: it cannot {wanted}"
            )

    def _settle_there(self, ctx: Context, here: MigrationStatus, there: MigrationStatus | None) -> None:
        if there is not None:
            args = {"ident": self.ident, "uuid": here.uuid, "keep": not self.keep}
            ask(ctx, self.peer or here.peer, "migrate_settle", args, step="settle")


class ResolveMigration(Plugin):
    verb = "resolve_migration"
    summary = "Decide where a domain runs whose migration is paused on both sides."
    step_kinds = (ResolveStep,)
    args_schema: ClassVar[Mapping[str, Any]] = {
        "type": "object",
        "additionalProperties": False,
        "required": ["ident", "keep"],
        "properties": {
            "ident": IDENT_SCHEMA,
            "keep": {"type": "boolean", "description": "True: it runs here. False: it does not."},
            "peer": HOST_SCHEMA,
            "force": {
                "type": "boolean",
                "default": False,
                "description": "Do not ask the other host. A domain that runs there, too, destroys its disks.",
            },
        },
    }

    def plan(self, args: Mapping[str, Any], host: Host) -> Plan:
        return Plan((ResolveStep(args["ident"], args["keep"], args.get("peer", ""), args.get("force", False)),))
