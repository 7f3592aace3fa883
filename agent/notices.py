"""Lifecycle notifications: what instructions begin and end, and what happens to domains, for billing and the like.

They leave by the journal's outbox, written in the same transaction as what they tell of, so each is sent at least
once; a repeated one has the same id. Two forms: native (a report on ``reeve.reports``) and oslo.messaging's
``messagingv2`` notifier's, for its notification listeners. Pure: no I/O.
"""

from __future__ import annotations

import dataclasses
import datetime
import itertools
import json
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from agent import oslo, trace, wire
from hypervisor.toolstack.api import DomainEvent

START, END, ERROR = "start", "end", "error"
MAX_PAYLOAD_BYTES = 65536
"""A larger result is left out of the notification."""

_NAMES = uuid.UUID("e4b4f7a5-14a8-45a3-8a3e-0c0a5bb3dc30")
_BAD_EVENTS = ("crashed",)


@dataclasses.dataclass(frozen=True, slots=True)
class OsloTopics:
    """Where listeners of oslo.messaging listen: queues ``TOPIC.info`` and ``TOPIC.error`` on `exchange`."""

    exchange: str
    topics: tuple[str, ...]


class Notices:
    """:param native: make the native form.

    :param topics: make oslo.messaging's form for these; None for not.
    :param seq: numbers of the native form.
    """

    def __init__(
        self,
        host: str,
        now: Callable[[], float],
        *,
        native: bool = True,
        topics: OsloTopics | None = None,
        seq: Iterator[int] | None = None,
    ) -> None:
        self._host = host
        self._now = now
        self._native = native
        self._topics = topics
        self._seq = seq or itertools.count(1)

    def begins(self, instruction: wire.Instruction, domain: str) -> list[wire.Outgoing]:
        """The plan of `instruction` is journalled."""
        return self._instruction(instruction, domain, START, {})

    def ends(self, instruction: wire.Instruction, domain: str, reply: wire.Reply) -> list[wire.Outgoing]:
        """Its outcome is."""
        outcome: dict[str, Any] = {"accepted": reply.accepted, "finished": reply.finished}
        if reply.error is not None:
            return self._instruction(instruction, domain, ERROR, outcome | {"error": reply.error})
        whole = len(json.dumps(reply.result)) <= MAX_PAYLOAD_BYTES
        return self._instruction(instruction, domain, END, outcome | {"result": reply.result if whole else None})

    def happened(self, event: DomainEvent) -> list[wire.Outgoing]:
        """The driver told of a change."""
        data = {"event": event.kind, "uuid": event.uuid, "time": event.time, "detail": event.detail}
        ident = _ident(event.uuid, event.kind, repr(event.time), event.detail)
        found = self._report("lifecycle", data | {"id": ident})
        return found + self._oslo(f"domain.{event.kind}", ident, event.kind in _BAD_EVENTS, data | {"host": self._host})

    def _instruction(
        self, instruction: wire.Instruction, domain: str, phase: str, more: Mapping[str, Any]
    ) -> list[wire.Outgoing]:
        given = instruction.args.get("uuid")
        uuid_ = domain or (given[:64] if isinstance(given, str) else "")
        about = {"instruction": instruction.id, "verb": instruction.verb, "uuid": uuid_} | dict(more)
        request = instruction.context.get("request_id")
        if isinstance(request, str):
            about["request"] = request
        ident = _ident(instruction.id, phase)
        data = {"event": f"{instruction.verb}.{phase}", "id": ident} | about | trace.of(instruction.context)
        found = self._report("instruction", data)
        about["host"] = self._host
        name = f"domain.{instruction.verb}.{phase}"
        return found + self._oslo(name, ident, phase == ERROR, about, instruction.context)

    def _report(self, kind: str, data: dict[str, Any]) -> list[wire.Outgoing]:
        if not self._native:
            return []
        return [wire.encode_report(wire.Report(kind, self._host, self._now(), next(self._seq), data))]

    def _oslo(
        self, event: str, ident: str, bad: bool, payload: Mapping[str, Any], context: Mapping[str, Any] | None = None
    ) -> list[wire.Outgoing]:
        if self._topics is None:
            return []
        when = datetime.datetime.fromtimestamp(self._now(), datetime.UTC).replace(tzinfo=None)
        message = {
            "message_id": ident,
            "publisher_id": f"reeve-agent.{self._host}",
            "event_type": event,
            "priority": "ERROR" if bad else "INFO",
            "payload": dict(payload),
            "timestamp": when.isoformat(sep=" ", timespec="microseconds"),
            "_unique_id": uuid.UUID(ident).hex,
        } | {f"_context_{name}": value for name, value in (context or {}).items()}
        keys = [f"{topic}.{'error' if bad else 'info'}" for topic in self._topics.topics]
        return [oslo.notification(self._topics.exchange, key, message) for key in keys]


def queues(topics: Sequence[str]) -> list[str]:
    """The queues that oslo.messaging's notifier would make for its messages to wait in."""
    return [f"{topic}.{priority}" for topic in topics for priority in ("info", "error")]


def _ident(*of: str) -> str:
    """The same for the same occurrence, however often it is told."""
    return str(uuid.uuid5(_NAMES, " ".join(of)))
