"""``standby_stop``: the domain runs on here, and no other host keeps it any more. Sent to the host where it runs."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, ClassVar

from agent.api import (
    ONE_DOMAIN_SCHEMA,
    BrokerError,
    Check,
    Context,
    Host,
    JsonDict,
    Plan,
    Plugin,
    ReplyTimeout,
    Step,
)
from agent.migrating import ask_or_tell, described, find_status, unresolved
from hypervisor.errors import MigrationNotFound, OperationTimeout, WrongState
from hypervisor.toolstack.api import MigrationMode, MigrationPhase, MigrationRole, MigrationStatus

END_SECONDS = 60.0


@dataclasses.dataclass(frozen=True)
class EndStep(Step):
    """:ivar halves: ident and peer of every record of a standby of the domain; all but one have ended before."""

    name: ClassVar[str] = "end"
    title: ClassVar[str] = "end it while the domain is still here"

    uuid: str
    halves: list[list[str]]

    def run(self, ctx: Context) -> JsonDict | None:
        toolstack = ctx.host.toolstack
        for ident, _peer in self.halves:
            if find_status(toolstack, ident) is None:
                continue  # forgotten by whoever took it over
            with contextlib.suppress(WrongState):  # what it has become says why
                toolstack.migration_cancel(ident)
            status: MigrationStatus | None = ctx.poll(functools.partial(_over, ctx, ident), END_SECONDS)
            if status is None:
                raise OperationTimeout(f"standby {ident} has not ended yet: give the command again")
            if status.phase is MigrationPhase.UNRESOLVED:
                raise unresolved(status)
        return None

    def check(self, ctx: Context) -> Check:
        return Check.NOT_DONE


@dataclasses.dataclass(frozen=True)
class ForgetStep(Step):
    """What the other host still holds goes; then the records here."""

    name: ClassVar[str] = "forget"
    title: ClassVar[str] = "have the other host drop what it holds, and forget it"

    uuid: str
    halves: list[list[str]]

    def run(self, ctx: Context) -> JsonDict | None:
        found: list[JsonDict] = []
        for ident, peer in self.halves:
            status = find_status(ctx.host.toolstack, ident)
            if status is None:
                continue
            if status.phase is MigrationPhase.KEPT:
                found.append({**described(status), "dropped": self._drop(ctx, ident, peer)})
            ctx.host.toolstack.migration_forget(ident)
        return {"standbys": found}

    def check(self, ctx: Context) -> Check:
        return Check.NOT_DONE

    def _drop(self, ctx: Context, ident: str, peer: str) -> bool:
        """False: its agent does not answer, and does it when it is there. :raises InstructionError: it runs there."""
        if not peer:
            return False
        args, step = {"ident": ident, "uuid": self.uuid, "keep": False}, f"drop-{ident}"
        try:
            ask_or_tell(ctx, peer, "migrate_settle", args, step=step)
        except (BrokerError, ReplyTimeout):
            return False
        return True


def _over(ctx: Context, ident: str, _left: float) -> MigrationStatus | None:
    status = ctx.host.toolstack.migration_status(ident)
    return status if status.phase.ended or status.phase is MigrationPhase.UNRESOLVED else None


class StandbyStop(Plugin):
    verb = "standby_stop"
    summary = "End a domain's standby: it runs on here, and the other host keeps nothing of it."
    step_kinds = (EndStep, ForgetStep)
    args_schema: ClassVar[Mapping[str, Any]] = ONE_DOMAIN_SCHEMA

    def plan(self, args: Mapping[str, Any], host: Host) -> Plan:
        uuid = args["uuid"]
        found = [
            status
            for status in host.toolstack.migration_list()
            if status.uuid == uuid and status.mode is MigrationMode.STANDBY
        ]
        ours = [[status.ident, status.peer] for status in found if status.role is MigrationRole.SOURCE]
        if not ours and found:
            raise WrongState(
                f"domain {uuid} runs on host {found[-1].peer}, and this one keeps it: end it there; or here, without "
                f"asking anybody: reeve migration cancel {found[-1].ident}"
            )
        if not ours:
            raise MigrationNotFound(f"domain {uuid} has no standby on this host: list the migrations")
        return Plan((EndStep(uuid, ours), ForgetStep(uuid, ours)), uuid)
