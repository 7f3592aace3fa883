"""What the verbs of migration share: their arguments, the idents of instructions between agents, and looking at a half.

The id of the instruction ``migrate`` is the migration's ident on both hosts. What the source's agent asks of the
target's has ids that are made from it and from the step's name: asked again after a crash, the other agent answers from
its journal.
"""

from __future__ import annotations

import dataclasses
import uuid as uuid_module
from collections.abc import Mapping
from typing import Any, ClassVar

from agent.api import (
    NAME_SCHEMA,
    UUID_SCHEMA,
    BrokerError,
    Check,
    Context,
    InstructionError,
    JsonDict,
    ReplyTimeout,
    Step,
    own_domain,
)
from hypervisor.errors import (
    HostUnavailable,
    MigrationNotFound,
    MigrationNotTransparent,
    MigrationUnresolved,
    ToolstackError,
    Unsupported,
    WrongState,
)
from hypervisor.toolstack.api import (
    MigrationOptions,
    MigrationPhase,
    MigrationRole,
    MigrationStatus,
    MigrationTicket,
    Toolstack,
)

IDENT_SCHEMA: Mapping[str, Any] = {**UUID_SCHEMA, "description": "Of the migration: the id of the instruction migrate."}
HOST_SCHEMA: Mapping[str, Any] = {**NAME_SCHEMA, "description": "The other host, as instructions address it."}
TOKEN_SCHEMA: Mapping[str, Any] = {
    "type": "string",
    "pattern": "^[0-9a-f]{32,128}$",
    "description": "The secret by which the source's connection is known.",
}
MODE_SCHEMA: Mapping[str, Any] = {
    "type": "string",
    "enum": ["auto", "live", "image"],
    "default": "auto",
    "description": "live: unnoticed by the guest; image: it suspends and resumes; auto: live, or else as an image.",
}
OPTIONS_SCHEMA: Mapping[str, Any] = {
    "type": "object",
    "additionalProperties": False,
    "properties": {
        "bandwidth_bytes": {"type": "integer", "minimum": 0, "maximum": (1 << 48) - 1},
        "downtime_ms": {"type": "number", "exclusiveMinimum": 0, "maximum": 60000},
        "compress": {"type": "string", "enum": ["none", "zstd"]},
        "max_rounds": {"type": "integer", "minimum": 1, "maximum": 1000},
        "throttle": {"type": "boolean"},
        "timeout_s": {"type": "number", "exclusiveMinimum": 0, "maximum": 86400},
        "copy_disks": {"type": "boolean"},
        "flatten_disks": {"type": "boolean"},
    },
    "description": "See hypervisor.toolstack.migration.MigrationOptions.",
}

ATTEMPTS = 4
"""So often another agent is asked for one thing, while it says that it may succeed later."""
PAUSE = 0.5
ANSWER_SECONDS = 30.0
"""For another agent's answer to something quick."""
PREPARE_SECONDS = 60.0
"""For the target to check and set aside what it needs."""

UNDER_WAY = (
    MigrationPhase.STARTING,
    MigrationPhase.COPYING,
    MigrationPhase.STANDBY,
    MigrationPhase.SWITCHING,
)
WHOLE = (MigrationPhase.COMPLETE, MigrationPhase.UNRESOLVED)


def derived(ident: str, what: str) -> str:
    """The id of an instruction that follows from another one."""
    return str(uuid_module.uuid5(uuid_module.UUID(ident), what))


def ask(
    ctx: Context,
    host: str,
    verb: str,
    args: JsonDict,
    *,
    step: str,
    timeout: float = ANSWER_SECONDS,
    expire: bool = False,
) -> JsonDict:
    """One thing of another agent; `step` names it within this instruction.

    A failure that may pass is the other's answer for good under its id, so that another attempt gets another id. All of
    them follow from this instruction: a repetition after a crash takes the same way.
    """
    for attempt in range(ATTEMPTS):
        ident = derived(ctx.instruction, f"{step}:{attempt}")
        try:
            return ctx.host.peers.call(host, verb, args, ident=ident, timeout=timeout, expire=expire)
        except InstructionError as exc:
            if not exc.retryable or attempt + 1 == ATTEMPTS:
                raise
            ctx.poll(lambda _left: False, PAUSE)
    raise AssertionError("unreachable")


def ask_or_tell(ctx: Context, host: str, verb: str, args: JsonDict, *, step: str) -> JsonDict:
    """As `ask`. What it could not bring over because there was no broker is sent when there is one, and is the same.

    :raises BrokerError, ReplyTimeout: all the same; it lies in the other's queue, or will.
    """
    try:
        return ask(ctx, host, verb, args, step=step)
    except BrokerError:
        ctx.host.peers.tell(host, verb, args, ident=derived(ctx.instruction, f"{step}:0"))
        raise


def begun(ctx: Context, uuid: str, token: str, target: str, options: MigrationOptions) -> bool:
    """Have the driver begin what `PrepareStep` has prepared. False: it does not answer; nobody knows whether it did."""
    ticket = MigrationTicket.from_json(ctx.outputs["prepare"]["ticket"])
    try:
        ctx.host.toolstack.migration_start(
            uuid, ident=ctx.instruction, token=token, ticket=ticket, options=options, peer=target
        )
    except HostUnavailable:
        return False
    return True


def status_now(ctx: Context) -> MigrationStatus | None:
    """Of this instruction's migration; None: it cannot be told just now."""
    try:
        return ctx.host.toolstack.migration_status(ctx.instruction)
    except ToolstackError as exc:
        if exc.retryable:
            return None
        raise


def find_status(toolstack: Toolstack, ident: str) -> MigrationStatus | None:
    try:
        return toolstack.migration_status(ident)
    except MigrationNotFound:
        return None


def commands(status: MigrationStatus) -> list[str]:
    """What an operator can type to decide for a half that waits for a decision."""
    if status.phase not in WHOLE:
        return []
    return [f"reeve migration resolve {status.ident} {how}" for how in ("--keep", "--drop")]


def described(status: MigrationStatus) -> JsonDict:
    return {**status.to_json(), "resolve": commands(status)}


def settle_half(toolstack: Toolstack, ident: str, *, keep: bool) -> MigrationStatus | None:
    """Make it so that the domain runs here, or not; quiet when it is so. None: there is no such migration.

    The caller knows that the other half agrees.

    :raises WrongState: it is under way, or the other way round. :raises MigrationUnresolved: no whole copy is here.
    """
    status = find_status(toolstack, ident)
    if status is None:
        return None
    arriving: tuple[MigrationPhase, ...] = (MigrationPhase.WAITING, MigrationPhase.RECEIVING)
    if status.role is MigrationRole.TARGET and not keep:
        arriving += (MigrationPhase.STANDBY,)  # the source has ended it, and this half may not know yet
    elif status.phase in UNDER_WAY:
        raise WrongState(f"migration {ident} is still {status.phase.value}: wait for it, or cancel it")
    if status.role is MigrationRole.TARGET and keep and status.phase in (*arriving, MigrationPhase.DROPPED):
        raise MigrationUnresolved(f"migration {ident} is {status.phase.value} here: there is no whole copy to run")
    if status.phase in arriving:
        try:
            toolstack.migration_cancel(ident)
        except WrongState:  # it has become complete meanwhile
            toolstack.migration_resolve(ident, keep=False)
    elif not (status.phase is MigrationPhase.DROPPED and not keep):
        toolstack.migration_resolve(ident, keep=keep)
    return toolstack.migration_status(ident)


def settling(ctx: Context, uuid: str, *, keep: bool) -> JsonDict:
    """Arguments of ``migrate_settle``."""
    return {"ident": ctx.instruction, "uuid": uuid, "keep": keep}


def unresolved(status: MigrationStatus) -> MigrationUnresolved:
    """What is said of a half that an operator has to decide for."""
    how = " or ".join(commands(status)) or f"reeve migration show {status.ident}"
    return MigrationUnresolved(f"migration {status.ident} of domain {status.uuid} is {status.phase.value}: {how}")


@dataclasses.dataclass(frozen=True)
class CheckStep(Step):
    """Of ``migrate`` and ``standby``, as is `PrepareStep`."""

    name: ClassVar[str] = "check"
    title: ClassVar[str] = "see what the target must know"
    changes: ClassVar[bool] = False

    uuid: str

    def run(self, ctx: Context) -> JsonDict | None:
        own_domain(ctx.host, self.uuid)
        return {"offer": ctx.host.toolstack.migration_offer(self.uuid).to_json()}

    def check(self, ctx: Context) -> Check:
        return Check.NOT_DONE


@dataclasses.dataclass(frozen=True)
class PrepareStep(Step):
    """:ivar token: the secret by which the target knows the source's connection."""

    name: ClassVar[str] = "prepare"
    title: ClassVar[str] = "have the target check and set aside what it needs"

    uuid: str
    target: str
    token: str
    mode: str

    def run(self, ctx: Context) -> JsonDict | None:
        modes = ("live", "image") if self.mode == "auto" else (self.mode,)
        why: InstructionError | None = None
        for mode in modes:
            args = {
                "ident": ctx.instruction,
                "token": self.token,
                "source": ctx.host.name,
                "mode": mode,
                "offer": ctx.outputs["check"]["offer"],
            }
            seconds = ctx.seconds_left(PREPARE_SECONDS)
            try:
                return ask(ctx, self.target, "migrate_in", args, step=f"prepare-{mode}", timeout=seconds, expire=True)
            except InstructionError as exc:
                if why is not None and exc.code == Unsupported.code:
                    raise why from None  # it takes no images: why it cannot come live is what helps
                if exc.code != MigrationNotTransparent.code or mode == modes[-1]:
                    raise
                why = exc
        raise AssertionError("unreachable")

    def check(self, ctx: Context) -> Check:
        # Also when it was: the target answers from its journal.
        return Check.NOT_DONE

    def undo(self, ctx: Context) -> None:
        # The step after this one was undone before: the domain runs here, or it was never begun. Only then may the
        # target's half go.
        status = find_status(ctx.host.toolstack, ctx.instruction)
        if status is not None and status.phase is not MigrationPhase.KEPT:
            raise MigrationUnresolved(f"the source is {status.phase.value}")
        args = settling(ctx, self.uuid, keep=False)
        try:
            ask_or_tell(ctx, self.target, "migrate_settle", args, step="drop")
        except (BrokerError, ReplyTimeout) as exc:
            # It lies in the target's queue, or will: its agent will do it.
            raise MigrationUnresolved(
                f"the domain runs here; {exc.message} What host {self.target} has set aside goes when it is told"
            ) from exc
        ctx.host.toolstack.migration_forget(ctx.instruction)
