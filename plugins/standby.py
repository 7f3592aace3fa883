"""``standby``: keep a running domain on a second host as well. It ends when that host holds the first whole epoch.

From then on the two drivers go on by themselves; `plugins.standby_stop` and `plugins.standby_takeover` end it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import secrets
from collections.abc import Mapping
from typing import Any, ClassVar

from agent.api import (
    UUID_SCHEMA,
    Check,
    Context,
    Host,
    InstructionError,
    JsonDict,
    Plan,
    Plugin,
    Step,
    own_domain,
)
from agent.migrating import (
    HOST_SCHEMA,
    OPTIONS_SCHEMA,
    PREPARE_SECONDS,
    CheckStep,
    PrepareStep,
    begun,
    find_status,
    status_now,
    unresolved,
)
from hypervisor.errors import (
    HostUnavailable,
    MigrationFailed,
    OperationTimeout,
    Unsupported,
    WrongState,
    from_json,
)
from hypervisor.toolstack.api import (
    Capability,
    DomainState,
    MigrationMode,
    MigrationOptions,
    MigrationPhase,
    MigrationStatus,
)

CANCEL_SECONDS = 60.0
MARGIN = 60.0
"""Seconds beyond the options' own timeout: for the first epoch."""
INTERVAL_SCHEMA: Mapping[str, Any] = {
    "type": "number",
    "minimum": 10,
    "maximum": 60000,
    "description": "From the beginning of one epoch to that of the next, at least.",
}
_OPTIONS = ("bandwidth_bytes", "compress", "timeout_s")


@dataclasses.dataclass(frozen=True)
class BeginStep(Step):
    """:ivar options: JSON form of `MigrationOptions`."""

    name: ClassVar[str] = "begin"
    title: ClassVar[str] = "send it over, until the target holds a whole epoch"

    uuid: str
    target: str
    token: str
    options: JsonDict

    def run(self, ctx: Context) -> JsonDict | None:
        options = MigrationOptions.from_json(self.options)
        if not ctx.poll(lambda _left: begun(ctx, self.uuid, self.token, self.target, options), PREPARE_SECONDS):
            raise HostUnavailable("the host process does not answer: the standby is not begun; try again")
        status = ctx.poll(lambda _left: self._there(ctx), options.timeout_s + MARGIN)
        if status is None:
            raise OperationTimeout(f"domain {self.uuid} was not copied in time: give more time or bandwidth")
        if status.phase is MigrationPhase.UNRESOLVED:
            raise unresolved(status)
        if status.phase is MigrationPhase.KEPT:
            raise from_json(status.error) if status.error else MigrationFailed(f"domain {self.uuid} has no standby")
        return {"status": status.to_json()}

    def check(self, ctx: Context) -> Check:
        # Also when it was: the driver does not begin it twice, and what became of it is to be told.
        return Check.NOT_DONE

    def undo(self, ctx: Context) -> None:
        toolstack = ctx.host.toolstack
        if find_status(toolstack, ctx.instruction) is None:
            return  # it was never begun
        with contextlib.suppress(WrongState):
            toolstack.migration_cancel(ctx.instruction)
        if not ctx.poll(lambda _left: toolstack.migration_status(ctx.instruction).phase.ended, CANCEL_SECONDS):
            raise OperationTimeout(f"standby {ctx.instruction} has neither ended nor been cancelled yet")

    def _there(self, ctx: Context) -> MigrationStatus | None:
        """The status, once the target has an epoch or it is known that it gets none."""
        status = status_now(ctx)
        if status is None:
            return None
        whole = status.phase is MigrationPhase.STANDBY and status.epochs > 0
        total = max(1, status.pages_total)
        done = total if whole else min(total - status.dirty_pages, total - 1)
        ctx.progress(done, total, "pages", phase=status.phase.value, bytes_sent=status.bytes_sent)
        return status if whole or status.phase.ended or status.phase is MigrationPhase.UNRESOLVED else None


class Standby(Plugin):
    verb = "standby"
    summary = "Keep a running domain on a second host as well, epoch by epoch."
    step_kinds = (CheckStep, PrepareStep, BeginStep)
    args_schema: ClassVar[Mapping[str, Any]] = {
        "type": "object",
        "additionalProperties": False,
        "required": ["uuid", "target"],
        "properties": {
            "uuid": UUID_SCHEMA,
            "target": HOST_SCHEMA,
            "options": {
                "type": "object",
                "additionalProperties": False,
                "properties": {
                    "interval_ms": INTERVAL_SCHEMA,
                    **{name: OPTIONS_SCHEMA["properties"][name] for name in _OPTIONS},
                },
                "description": "See hypervisor.toolstack.migration.MigrationOptions.",
            },
        },
    }

    def plan(self, args: Mapping[str, Any], host: Host) -> Plan:
        info = own_domain(host, args["uuid"])
        target = args["target"]
        if target == host.name:
            raise InstructionError("instruction.bad_args", f"args.target: {target!r} is this host: give another")
        if Capability.STANDBY not in host.toolstack.capabilities():
            raise Unsupported(f"the {host.toolstack.name} driver keeps no standby: see reeve node show")
        if info.state not in (DomainState.RUNNING, DomainState.PAUSED):
            raise WrongState(f"domain {info.uuid} is {info.state.value}: only one that runs or is paused can be kept")
        token = secrets.token_hex(32)
        options = MigrationOptions.from_json(args.get("options", {})).to_json()
        return Plan(
            (
                CheckStep(info.uuid),
                PrepareStep(info.uuid, target, token, MigrationMode.STANDBY.value),
                BeginStep(info.uuid, target, token, options),
            ),
            info.uuid,
        )

    def result(self, args: Mapping[str, Any], plan: Plan, ctx: Context) -> JsonDict:
        return {"target": args["target"], "standby": ctx.outputs["begin"]["status"]}
