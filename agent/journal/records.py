"""Rows of the journal."""

from __future__ import annotations

import dataclasses
import enum
from typing import Any

from agent.errors import AgentError
from agent.wire import Instruction, Outgoing, Raw


class Phase(enum.StrEnum):
    """How far an instruction is. The first three are unfinished: they resume after a crash."""

    ACCEPTED = "accepted"  # durable, no plan yet
    RUNNING = "running"  # the plan is journalled
    UNDOING = "undoing"  # a step failed; what was done is being taken back
    DONE = "done"
    FAILED = "failed"


UNFINISHED = (Phase.ACCEPTED, Phase.RUNNING, Phase.UNDOING)


class StepState(enum.StrEnum):
    BEGUN = "begun"
    DONE = "done"
    FAILED = "failed"
    UNDONE = "undone"


class Accepted(enum.StrEnum):
    """What `Journal.accept` made of a message."""

    NEW = "new"
    RUNNING = "running"  # a duplicate of one under way: its reply will also go to this sender
    REPLAYED = "replayed"  # a duplicate of a finished one: the stored reply was queued again
    REUSED = "reused"  # the id belongs to another instruction


@dataclasses.dataclass(frozen=True, slots=True)
class StepRecord:
    """:ivar seconds: how long it ran, summed over its runs."""

    index: int
    name: str
    state: StepState
    output: dict[str, Any] | None
    seconds: float


@dataclasses.dataclass(frozen=True, slots=True)
class Entry:
    """An instruction with its history.

    :ivar plan: the journalled plan, or None before there is one.
    :ivar error: why it is being undone, while it is.
    :ivar received: seconds since the epoch. :ivar cancelled: when somebody asked for its end; None: nobody did.
    """

    seq: int
    instruction: Instruction
    domain: str
    phase: Phase
    plan: dict[str, Any] | None
    steps: tuple[StepRecord, ...]
    error: dict[str, Any] | None
    received: float
    cancelled: float | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class OutboxRow:
    seq: int
    exchange: str
    routing_key: str
    body: bytes
    correlation_id: str
    content_type: str
    created: float
    attempts: int


@dataclasses.dataclass(frozen=True, slots=True)
class Refused:
    """A message that is no instruction: why, and what its sender is told (None: nothing)."""

    raw: Raw
    why: AgentError
    reply: Outgoing | None


@dataclasses.dataclass(frozen=True, slots=True)
class Waiter:
    """Somebody who waits for an instruction's reply.

    :ivar heartbeat: seconds between two signs of life, 0 for none.
    """

    id: str
    reply_to: str
    dialect: str
    correlation: str
    heartbeat: float
