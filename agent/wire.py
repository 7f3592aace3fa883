"""Bytes to instructions, replies and reports, and back. Pure: no clock, no I/O, no state.

The native form, version 1.0, is one JSON object (UTF-8)::

    {"reeve": "1.0", "id": "<uuid>", "verb": "create", "host": "node1", "args": {…},
     "reply_to": "<queue>", "deadline": 1700000000.0, "traceparent": "00-…", "tracestate": "…"}

What follows ``args`` may be left out or null. ``docs/instruction-path.md`` describes it for senders.

A message is hostile until proven otherwise: its size is checked before anything else, its nesting
before it is parsed, and every field before it is used. Each refusal is a `MessageError` with its own code.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
import uuid as uuid_module
from collections.abc import Mapping
from typing import Any

from agent import trace
from agent.errors import MessageError

VERSION = (1, 0)
DIALECT = "reeve/1.0"
CONTENT_TYPE = "application/json"
REPORT_EXCHANGE = "reeve.reports"

REPLY_HEAD = b'{"reeve":"1.0","kind":"reply",'
"""How every reply in this form begins, and nothing else does."""

MAX_BYTES = 1 << 20
MAX_DEPTH = 32
MAX_DEADLINE = 253402300799.0
"""The last second of the year 9999."""

_TOKEN = re.compile(rb'"(?:[^"\\]|\\.)*+(?:"|\\?\Z)|[\[\]{}]', re.DOTALL)
"""A whole string or a bracket. Possessive, and an unterminated string runs to the end: linear in the input."""

_VERSION = re.compile(r"([0-9]{1,4})\.([0-9]{1,4})")
_VERB = re.compile(r"[a-z][a-z0-9_-]{0,63}")
_QUEUE = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,199}")
_FIELDS = {"reeve", "id", "verb", "host", "args", "reply_to", "deadline", *trace.NAMES}


@dataclasses.dataclass(frozen=True, slots=True)
class Raw:
    """A message as it came from a broker.

    :ivar size: bytes of the whole body; larger than ``len(body)`` when a transport kept only its beginning.
    :ivar reply_to: the transport's own reply address (AMQP property), used when the body cannot be read.
    :ivar dialect: the form spoken on the queue it came from.
    :ivar expiration: the AMQP property: milliseconds, as a string; "" for none.
    """

    body: bytes
    size: int
    content_type: str = ""
    content_encoding: str = ""
    headers: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    reply_to: str = ""
    correlation_id: str = ""
    dialect: str = DIALECT
    expiration: str = ""


@dataclasses.dataclass(frozen=True, slots=True)
class Instruction:
    """One request.

    :ivar deadline: seconds since the epoch, or None.
    :ivar dialect: the form the reply must take.
    :ivar correlation: what the reply must carry besides the id, where the dialect has such a thing.
    :ivar context: what the sender says about itself (request id, user, project; `agent.trace`), secrets taken out.
    :ivar heartbeat: seconds between the signs of life that the sender wants until the reply comes; 0 for none.
    """

    id: str
    verb: str
    host: str
    args: dict[str, Any]
    reply_to: str = ""
    deadline: float | None = None
    dialect: str = DIALECT
    correlation: str = ""
    context: dict[str, Any] = dataclasses.field(default_factory=dict)
    heartbeat: float = 0.0

    @property
    def digest(self) -> str:
        """Identifies the content: two messages with one id must agree in it."""
        text = json.dumps([self.verb, self.args], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def to_json(self) -> dict[str, Any]:
        data = dataclasses.asdict(self)
        data["reeve"] = "{}.{}".format(*VERSION)
        del data["dialect"], data["correlation"], data["context"], data["heartbeat"]
        return data | trace.of(self.context)


@dataclasses.dataclass(frozen=True, slots=True)
class Reply:
    """The outcome of one instruction.

    :ivar id: the instruction's id, or "" when it could not be read.
    :ivar error: None, or ``{"code", "message", "retryable", "undone"}``.
    :ivar steps: what was done, in order: ``{"name", "title", "state", "seconds"}``.
    :ivar accepted: when the instruction became durable, `finished` when the outcome did; seconds since the epoch.
    """

    id: str
    host: str
    verb: str = ""
    result: dict[str, Any] | None = None
    error: dict[str, Any] | None = None
    steps: tuple[dict[str, Any], ...] = ()
    accepted: float = 0.0
    finished: float = 0.0
    traceparent: str = ""

    @property
    def ok(self) -> bool:
        return self.error is None

    def to_json(self) -> dict[str, Any]:
        head = {"reeve": "{}.{}".format(*VERSION), "kind": "reply", "ok": self.ok}
        data = head | dataclasses.asdict(self) | {"steps": list(self.steps)}
        if not self.traceparent:
            del data["traceparent"]
        return data

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Reply:
        fields = {f.name: data[f.name] for f in dataclasses.fields(cls) if f.name in data}
        fields["steps"] = tuple(fields.get("steps") or ())
        return cls(**fields)


@dataclasses.dataclass(frozen=True, slots=True)
class Report:
    """What the agent tells on its own; kinds: ``capacity``, ``lifecycle``, ``instruction``, ``progress``, ``agent``."""

    kind: str
    host: str
    time: float
    seq: int
    data: dict[str, Any]

    @property
    def routing_key(self) -> str:
        return f"{self.kind}.{self.host}"

    def to_json(self) -> dict[str, Any]:
        return {
            "reeve": "{}.{}".format(*VERSION),
            "kind": "report",
            "type": self.kind,
            "host": self.host,
            "time": self.time,
            "seq": self.seq,
            "data": self.data,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Report:
        return cls(data["type"], data["host"], data["time"], data["seq"], dict(data["data"]))


@dataclasses.dataclass(frozen=True, slots=True)
class Outgoing:
    """A message to publish: the dialect has decided where it goes and what it looks like."""

    exchange: str
    routing_key: str
    body: bytes
    correlation_id: str = ""
    content_type: str = CONTENT_TYPE
    headers: Mapping[str, str] = dataclasses.field(default_factory=dict)


def encode_instruction(instruction: Instruction) -> bytes:
    return _dump(instruction.to_json())


def encode_reply(reply: Reply, reply_to: str, correlation: str = "") -> Outgoing:
    return Outgoing("", reply_to, _dump(reply.to_json()), correlation_id=correlation or reply.id)


def encode_report(report: Report) -> Outgoing:
    return Outgoing(REPORT_EXCHANGE, report.routing_key, _dump(report.to_json()))


def decode(raw: Raw, host: str, max_bytes: int = MAX_BYTES) -> Instruction:
    """A message's body as an instruction for `host`.

    :raises MessageError: with the code that names what is wrong.
    """
    if raw.headers.get("compression") or raw.content_encoding not in ("", "utf-8", "UTF-8", "binary"):
        raise MessageError(
            "the body is compressed or not UTF-8: send plain UTF-8 JSON", code="message.unsupported_encoding"
        )
    data = parse(raw.body, raw.size, max_bytes)
    if not isinstance(data, dict):
        raise MessageError(
            f"the message is a JSON {_json_type(data)}: send an object with {_listing(_FIELDS)}",
            code="message.bad_field",
        )
    _check_version(data.get("reeve"))
    unknown = sorted(set(data) - _FIELDS)
    if unknown:
        raise MessageError(
            f"unknown field {_short(unknown[0])}: known are {_listing(_FIELDS)}", code="message.unknown_field"
        )
    instruction = Instruction(
        id=_instruction_id(_required(data, "id")),
        verb=_text(_required(data, "verb"), "verb", _VERB, "lower-case letters, digits, '_' or '-'"),
        host=_text(_required(data, "host"), "host", _QUEUE, "a host name"),
        args=_object(data.get("args", {}), "args"),
        reply_to=reply_address(data.get("reply_to") or raw.reply_to),
        deadline=_deadline(data.get("deadline")),
        context=dict(trace.adopt(data, raw.headers)),
    )
    if instruction.host != host:
        raise MessageError(
            f"the instruction is for host {_short(instruction.host)}, this is {host!r}: send it to queue "
            f"{queue_name(instruction.host)!r}",
            code="message.wrong_host",
        )
    return instruction


def parse(body: bytes, size: int | None = None, max_bytes: int = MAX_BYTES, max_depth: int = MAX_DEPTH) -> Any:
    """Strict JSON from untrusted bytes: bounded, no duplicate keys, no NaN or infinity, no half characters.

    :raises MessageError: what is wrong with it.
    """
    size = len(body) if size is None else max(size, len(body))
    if size > max_bytes:
        raise MessageError(
            f"the message has {size} bytes: at most {max_bytes} are accepted (option [limits] max_message_bytes)",
            code="message.too_large",
        )
    _check_depth(body, max_depth)
    try:
        text = body.decode("utf-8")
        data = json.loads(text, object_pairs_hook=_no_duplicates, parse_constant=_no_constant, parse_float=_float)
        if b"\\ud" in body or b"\\uD" in body:
            # "\ud800" is legal JSON and no character: it could not be stored or sent on.
            json.dumps(data, ensure_ascii=False).encode()
    except MessageError:
        raise
    except (ValueError, RecursionError) as exc:
        reason = str(exc).splitlines()[0][:120]
        raise MessageError(
            f"the message is not JSON in UTF-8 ({reason}): send one JSON object", code="message.not_json"
        ) from exc
    return data


def readable_reply_address(raw: Raw, max_bytes: int = MAX_BYTES) -> tuple[str, str]:
    """(reply address, instruction id) of a message that was refused, "" for what cannot be read."""
    address, ident = _quiet_address(raw.reply_to), raw.correlation_id
    try:
        data = parse(raw.body, raw.size, max_bytes)
    except MessageError:
        return address, ident if re.fullmatch(r"[A-Za-z0-9._-]{1,128}", ident) else ""
    if isinstance(data, dict):
        address = _quiet_address(data.get("reply_to")) or address
        ident = data.get("id") or ident
    if not isinstance(ident, str) or not re.fullmatch(r"[A-Za-z0-9._-]{1,128}", ident):
        ident = ""
    return address, ident


def reply_address(value: Any) -> str:
    """:raises MessageError: not a queue name. "" for None or ""."""
    if value is None or value == "":
        return ""
    return _text(value, "reply_to", _QUEUE, "a queue name of letters, digits, '.', '_' or '-'")


def queue_name(host: str) -> str:
    """The queue on which `host` takes instructions."""
    return f"reeve.{host}"


def check_host_name(host: str) -> str:
    """:raises MessageError: not usable as part of a queue name."""
    return _text(host, "host", _QUEUE, "letters, digits, '.', '_' or '-'")


def _check_depth(body: bytes, max_depth: int) -> None:
    if body.count(b"{") + body.count(b"[") <= max_depth:
        return
    depth = 0
    for match in _TOKEN.finditer(body):
        token = match[0]
        if token in (b"[", b"{"):
            depth += 1
            if depth > max_depth:
                raise MessageError(
                    f"the message is nested deeper than {max_depth} levels: flatten it", code="message.too_deep"
                )
        elif token in (b"]", b"}"):
            depth -= 1


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) != len(pairs):
        seen: set[str] = set()
        name = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise MessageError(f"the field {_short(name)} is given twice: give it once", code="message.duplicate_key")
    return data


def _no_constant(text: str) -> Any:
    raise MessageError(f"{text} is not a JSON number: give a finite one", code="message.bad_number")


def _float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise MessageError(f"the number {text[:40]} is too large: give a finite one", code="message.bad_number")
    return value


def _check_version(value: Any) -> None:
    if value is None:
        raise MessageError("field 'reeve' is missing: give the format's version, \"1.0\"", code="message.missing_field")
    match = _VERSION.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        raise MessageError(f"field 'reeve' is {_short(value)}: give the format's version, \"1.0\"")
    if int(match[1]) != VERSION[0] or int(match[2]) > VERSION[1]:
        raise MessageError(
            f"format version {match[0]} is not spoken here: send {VERSION[0]}.0 to {VERSION[0]}.{VERSION[1]}",
            code="message.unsupported_version",
        )


def _required(data: Mapping[str, Any], name: str) -> Any:
    if data.get(name) is None:
        raise MessageError(f"field {name!r} is missing: give it", code="message.missing_field")
    return data[name]


def _text(value: Any, name: str, pattern: re.Pattern[str], what: str) -> str:
    if not isinstance(value, str) or not pattern.fullmatch(value):
        raise MessageError(f"field {name!r} is {_short(value)}: give {what}")
    return value


def _object(value: Any, name: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise MessageError(f"field {name!r} is a JSON {_json_type(value)}: give an object")
    return value


def _instruction_id(value: Any) -> str:
    try:
        if isinstance(value, str) and str(uuid_module.UUID(value)) == value:
            return value
    except ValueError:
        pass
    raise MessageError(f"field 'id' is {_short(value)}: give a new UUID, in canonical lower-case form")


def _deadline(value: Any) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= MAX_DEADLINE:
        raise MessageError(f"field 'deadline' is {_short(value)}: give seconds since the epoch, or null")
    return float(value)


def _quiet_address(value: Any) -> str:
    return value if isinstance(value, str) and _QUEUE.fullmatch(value) else ""


def _json_type(value: Any) -> str:
    names = {list: "array", str: "string", bool: "boolean", type(None): "null", dict: "object"}
    return names.get(type(value), "number")


def _listing(names: set[str]) -> str:
    return ", ".join(sorted(names))


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "…"


def _dump(data: Any) -> bytes:
    return json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()
