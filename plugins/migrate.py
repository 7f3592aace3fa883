"""``migrate``: move a domain to another host while it runs. The source's side; the target's begins with ``migrate_in``.

The source's record of the migration, kept by its driver, decides. Until it says ``moved`` a failure leaves the domain
running here and nothing there; from then on the plan only goes forward.
"""

from __future__ import annotations

import contextlib
import dataclasses
import secrets
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
from agent.migrating import (
    HOST_SCHEMA,
    MODE_SCHEMA,
    OPTIONS_SCHEMA,
    PREPARE_SECONDS,
    CheckStep,
    PrepareStep,
    ask,
    ask_or_tell,
    begun,
    find_status,
    settling,
    status_now,
    unresolved,
)
from hypervisor.errors import (
    HostUnavailable,
    MigrationFailed,
    MigrationUnresolved,
    OperationTimeout,
    Unsupported,
    WrongState,
    from_json,
)
from hypervisor.toolstack.api import (
    Capability,
    DomainState,
    MigrationOptions,
    MigrationPhase,
    MigrationStatus,
)

CANCEL_SECONDS = 60.0
MARGIN = 120.0
"""Seconds beyond the options' own timeout: for the switch."""


@dataclasses.dataclass(frozen=True)
class TransferStep(Step):
    """:ivar options: JSON form of `MigrationOptions`."""

    name: ClassVar[str] = "transfer"
    title: ClassVar[str] = "send it over"
    commits: ClassVar[bool] = True

    uuid: str
    target: str
    token: str
    options: JsonDict

    def run(self, ctx: Context) -> JsonDict | None:
        options = MigrationOptions.from_json(self.options)
        if not ctx.poll(lambda _left: begun(ctx, self.uuid, self.token, self.target, options), PREPARE_SECONDS):
            raise HostUnavailable("the host process does not answer: the migration is not begun; try again")
        status = ctx.poll(lambda _left: self._over(ctx), options.timeout_s + MARGIN)
        if status is None:
            raise OperationTimeout(f"domain {self.uuid} did not move in time: it is kept here")
        if status.phase is MigrationPhase.UNRESOLVED:
            raise unresolved(status)
        if status.phase is MigrationPhase.KEPT:
            raise from_json(status.error) if status.error else MigrationFailed(f"domain {self.uuid} runs on here")
        return {"status": status.to_json()}

    def check(self, ctx: Context) -> Check:
        status = find_status(ctx.host.toolstack, ctx.instruction)
        return Check.DONE if status is not None and status.phase is MigrationPhase.MOVED else Check.NOT_DONE

    def undo(self, ctx: Context) -> None:
        status = find_status(ctx.host.toolstack, ctx.instruction)
        if status is None:
            return  # it was never begun
        with contextlib.suppress(WrongState):
            ctx.host.toolstack.migration_cancel(ctx.instruction)
        status = ctx.poll(lambda _left: self._over(ctx), CANCEL_SECONDS)
        if status is None:
            raise OperationTimeout(f"migration {ctx.instruction} has neither ended nor been cancelled yet")
        if status.phase is MigrationPhase.MOVED:
            raise TooLate({"status": status.to_json()})
        if status.phase is MigrationPhase.UNRESOLVED:
            raise MigrationUnresolved("the guest is paused")

    def _over(self, ctx: Context) -> MigrationStatus | None:
        """The status, once it is decided or an operator has to."""
        status = status_now(ctx)
        if status is None:
            return None
        decided = status.phase.ended or status.phase is MigrationPhase.UNRESOLVED
        total = max(1, status.pages_total)
        told = {name: value for name, value in status.to_json().items() if name in _TOLD}
        ctx.progress(total if decided else min(total - status.dirty_pages, total - 1), total, "pages", **told)
        return status if decided else None


_TOLD = (
    "phase",
    "rounds",
    "pages_sent",
    "bytes_sent",
    "dirty_pages",
    "rate_bytes",
    "dirty_rate_pages",
    "downtime_estimate_ms",
)


@dataclasses.dataclass(frozen=True)
class SettleStep(Step):
    name: ClassVar[str] = "settle"
    title: ClassVar[str] = "see to it that it runs on the target"

    uuid: str
    target: str

    def run(self, ctx: Context) -> JsonDict | None:
        args = settling(ctx, self.uuid, keep=True)
        try:
            return ask_or_tell(ctx, self.target, "migrate_settle", args, step="settle")
        except (BrokerError, ReplyTimeout) as exc:
            raise InstructionError(
                MigrationUnresolved.code,
                f"domain {self.uuid} has left this host and host {self.target} cannot be asked whether it runs there "
                f"({exc.message}): if it is paused, give there: reeve migration resolve {ctx.instruction} --keep",
                retryable=True,
            ) from exc

    def check(self, ctx: Context) -> Check:
        return Check.NOT_DONE


@dataclasses.dataclass(frozen=True)
class FinishStep(Step):
    name: ClassVar[str] = "finish"
    title: ClassVar[str] = "forget the migration on both hosts"

    uuid: str
    target: str

    def run(self, ctx: Context) -> JsonDict | None:
        ask(ctx, self.target, "migrate_finish", {"ident": ctx.instruction}, step="finish")
        status = find_status(ctx.host.toolstack, ctx.instruction)
        ctx.host.toolstack.migration_forget(ctx.instruction)
        return {"status": status.to_json()} if status is not None else None

    def check(self, ctx: Context) -> Check:
        return Check.NOT_DONE


class Migrate(Plugin):
    verb = "migrate"
    summary = "Move a domain to another host while it runs."
    step_kinds = (CheckStep, PrepareStep, TransferStep, SettleStep, FinishStep)
    args_schema: ClassVar[Mapping[str, Any]] = {
        "type": "object",
        "additionalProperties": False,
        "required": ["uuid", "target"],
        "properties": {"uuid": UUID_SCHEMA, "target": HOST_SCHEMA, "mode": MODE_SCHEMA, "options": OPTIONS_SCHEMA},
    }

    def plan(self, args: Mapping[str, Any], host: Host) -> Plan:
        info = own_domain(host, args["uuid"])
        target = args["target"]
        if target == host.name:
            raise InstructionError("instruction.bad_args", f"args.target: {target!r} is this host: give another")
        if Capability.LIVE_MIGRATION not in host.toolstack.capabilities():
            raise Unsupported(f"the {host.toolstack.name} driver moves no domains: see reeve node show")
        if info.state not in (DomainState.RUNNING, DomainState.PAUSED):
            raise WrongState(f"domain {info.uuid} is {info.state.value}: only one that runs or is paused can move")
        token = secrets.token_hex(32)
        options = MigrationOptions.from_json(args.get("options", {})).to_json()
        return Plan(
            (
                CheckStep(info.uuid),
                PrepareStep(info.uuid, target, token, args.get("mode", "auto")),
                TransferStep(info.uuid, target, token, options),
                SettleStep(info.uuid, target),
                FinishStep(info.uuid, target),
            ),
            info.uuid,
        )

    def result(self, args: Mapping[str, Any], plan: Plan, ctx: Context) -> JsonDict:
        found = ctx.outputs.get("transfer") or ctx.outputs.get("finish") or {}
        status = found.get("status", {})
        figures = ("mode", "rounds", "pages_sent", "bytes_sent", "downtime_ms", "total_s")
        return {
            "domain": ctx.outputs.get("settle", {}).get("domain"),
            "target": args["target"],
            **{name: status[name] for name in figures if name in status},
        }
