"""oslo.messaging's RPC form: its requests to instructions, outcomes to what its stock client takes. Pure.

A request is an envelope ``{"oslo.version": "2.0", "oslo.message": "<JSON>"}``; the JSON within has ``method``,
``args``, ``version``, ``namespace``, ``_unique_id``, ``_context_<name>``…, and for a call ``_msg_id``, ``_reply_q``
and ``_timeout``. The method's name is the verb, its keyword arguments are the verb's. `docs/rpc.md` has it for senders.

Source: ``oslo_messaging/_drivers/{amqpdriver,common,amqp}.py`` and ``rpc/dispatcher.py``, releases 12.0.0 to 18.3.1.
"""

from __future__ import annotations

import bz2
import dataclasses
import json
import lzma
import re
import uuid
import zlib
from collections.abc import Mapping
from typing import Any

from agent import trace, wire
from agent.errors import MessageError
from agent.redact import redact

DIALECT = "oslo/2.0"
ENVELOPE_VERSION = "2.0"
RPC_VERSION = "1.0"
"""Version of the methods, as a client's target names it. A new verb or argument raises the minor number."""

PING = "oslo_rpc_server_ping"
PING_VERSION = "1.0"
ERRORS_MODULE = "reeve_errors"
"""Where a client finds the classes of our failures: the file of that name in this distribution."""

MAX_CONTEXT_BYTES = 16384
SHORTEST_HEARTBEAT = 0.5
LONGEST_HEARTBEAT = 86400.0

_DISPATCHER = "oslo_messaging.rpc.dispatcher"
_METHOD = re.compile(r"[a-z][a-z0-9_-]{0,63}")
_REPLY_QUEUE = re.compile(r"reply_[!-~]{1,240}")
_TOKEN = re.compile(r"[!-~]{1,128}")
_VERSION = re.compile(r"([0-9]{1,6})\.([0-9]{1,6})(?:\.([0-9]{1,6}))?")
_NAMES = uuid.UUID("5d2c7f0e-7a3e-4c56-9f0b-0a7f6c1e54b1")


@dataclasses.dataclass(frozen=True, slots=True)
class Service:
    """What this server says it is.

    :ivar namespaces: accepted besides "no namespace".
    :ivar call_deadlines: a call's time to live is its instruction's deadline, too.
    """

    version: str = RPC_VERSION
    namespaces: frozenset[str] = frozenset()
    call_deadlines: bool = True


SERVICE = Service()


def decode(
    raw: wire.Raw, host: str, max_bytes: int, service: Service, now: float
) -> wire.Instruction | wire.Outgoing | None:
    """A request as an instruction, or the answer to a ping; None when there is nothing to do.

    :raises MessageError: it is no request, or one for other methods than ours.
    """
    request = _request(raw, max_bytes)
    method = request.get("method")
    if not isinstance(method, str):
        raise MessageError("the request has no 'method': name the verb", code="message.missing_field")
    args = request.get("args")
    if not isinstance(args, dict) and args is not None:
        raise MessageError("'args' of the request is no object: send keyword arguments")
    reply_q, msg_id = _reply_address(request)
    if method == PING and request.get("namespace") is None and _compatible(PING_VERSION, _version(request)):
        return _ending(reply_q, msg_id, "pong") if msg_id else None
    _check_target(request, method, service)
    if not _METHOD.fullmatch(method):
        raise MessageError(f"there is no method {method[:64]!r}: {_ASK}", code="instruction.unknown_verb")
    return wire.Instruction(
        id=_instruction_id(request),
        verb=method,
        host=host,
        args=args or {},
        reply_to=reply_q,
        deadline=_deadline(raw.expiration, now) if service.call_deadlines else None,
        dialect=DIALECT,
        correlation=msg_id,
        context=trace.merged(_context(request), raw.headers),
        heartbeat=_heartbeat(request.get("_timeout")) if msg_id else 0.0,
    )


_ASK = "`reeve schema` lists what there is"


def encode_reply(reply: wire.Reply, reply_to: str, msg_id: str) -> wire.Outgoing:
    """The outcome of an instruction: its result, or a failure that the client can rebuild."""
    if reply.error is None:
        return _ending(reply_to, msg_id, reply.result, ident=reply.id, traceparent=reply.traceparent)
    if reply.error["code"] == "instruction.unknown_verb":
        failure = _no_such_method(reply.verb, reply.host)
    else:
        failure = _failure(reply.error, reply.host, reply.id)
    return _ending(reply_to, msg_id, None, failure, reply.id, reply.traceparent)


def encode_refusal(raw: wire.Raw, why: MessageError, host: str, max_bytes: int) -> wire.Outgoing | None:
    """The failure for the caller of a refused request; None for a cast, and when it cannot be read who called."""
    try:
        request = _request(raw, max_bytes, any_version=True)
        reply_q, msg_id = _reply_address(request)
    except MessageError:
        return None
    if not msg_id:
        return None
    method = str(request.get("method"))[:64]
    if why.code == "message.unsupported_version":
        failure = _unsupported_version(_version(request), method, host)
    elif why.code == "instruction.unknown_verb":
        failure = _no_such_method(method, host)
    else:
        failure = _failure(why.to_json() | {"undone": True}, host, "")
    return _ending(reply_q, msg_id, None, failure)


def encode_heartbeat(reply_to: str, msg_id: str) -> wire.Outgoing:
    """A sign of life: the caller's monitor starts to count anew."""
    return _message(reply_to, msg_id, {"result": None, "failure": None, "ending": False}, uuid.uuid4().hex)


def notification(exchange: str, routing_key: str, message: Mapping[str, Any]) -> wire.Outgoing:
    """What oslo.messaging's notifier (driver ``messagingv2``) sends."""
    return wire.Outgoing(exchange, routing_key, _enveloped(message), correlation_id=str(message["message_id"]))


def class_name(code: str) -> str:
    """The class of an error code: ``domain.not_found`` is ``DomainNotFound``."""
    return "".join(word.capitalize() for word in re.split(r"[^a-zA-Z0-9]+", code) if word)


def version_problem(version: str) -> str:
    """Why `version` is none of a target, or ""."""
    return "" if _VERSION.fullmatch(version) else f"{version!r} is not MAJOR.MINOR"


# Requests


def _request(raw: wire.Raw, max_bytes: int, *, any_version: bool = False) -> dict[str, Any]:
    """What is in the envelope; a body without an envelope is the request itself."""
    outer = wire.parse(*_unpacked(raw, max_bytes), max_bytes)
    if isinstance(outer, dict) and "oslo.version" in outer and "oslo.message" in outer:
        version, inner = outer["oslo.version"], outer["oslo.message"]
        if not any_version and not _compatible(ENVELOPE_VERSION, version):
            raise MessageError(
                f"envelope version {str(version)[:20]!r} is not spoken here: send {ENVELOPE_VERSION}",
                code="message.bad_field",
            )
        if not isinstance(inner, str):
            raise MessageError("'oslo.message' is no string: put the request's JSON into it")
        outer = wire.parse(inner.encode(), None, max_bytes)
    if not isinstance(outer, dict):
        raise MessageError("the request is no JSON object: send one with 'method' and 'args'")
    return outer


def _unpacked(raw: wire.Raw, max_bytes: int) -> tuple[bytes, int]:
    """(body, its size) without the compression that ``kombu_compression`` may have given it; bounded."""
    packing = raw.headers.get("compression")
    if raw.content_encoding not in ("", "utf-8", "UTF-8", "binary"):
        raise MessageError("the body is not UTF-8: send JSON in UTF-8", code="message.unsupported_encoding")
    if not packing:
        return raw.body, raw.size
    if raw.size > max_bytes:
        return raw.body, raw.size  # refused for its size by the parser
    try:
        if packing in ("application/x-gzip", "gzip"):
            body = zlib.decompressobj().decompress(raw.body, max_bytes + 1)
        elif packing in ("application/x-bz2", "bzip2"):
            body = bz2.BZ2Decompressor().decompress(raw.body, max_bytes + 1)
        elif packing in ("application/x-lzma", "lzma"):
            body = lzma.LZMADecompressor(memlimit=128 << 20).decompress(raw.body, max_bytes + 1)
        else:
            raise MessageError(
                f"the compression {str(packing)[:40]!r} is not spoken here: use gzip, bzip2 or none",
                code="message.unsupported_encoding",
            )
    except (zlib.error, OSError, EOFError, ValueError, lzma.LZMAError) as exc:
        raise MessageError(
            f"the body cannot be decompressed ({exc}): send it again", code="message.unsupported_encoding"
        ) from exc
    return body, len(body)


def _reply_address(request: Mapping[str, Any]) -> tuple[str, str]:
    """(reply queue, message id) of a call, empty for a cast."""
    msg_id, reply_q = request.get("_msg_id"), request.get("_reply_q")
    if msg_id is None:
        return "", ""
    if not isinstance(msg_id, str) or not _TOKEN.fullmatch(msg_id):
        raise MessageError("'_msg_id' is not 1 to 128 printable characters: give a new UUID")
    if not isinstance(reply_q, str) or not _REPLY_QUEUE.fullmatch(reply_q):
        raise MessageError("'_reply_q' names no reply queue: give reply_ and a new UUID")
    return reply_q, msg_id


def _version(request: Mapping[str, Any]) -> Any:
    return request.get("version", "1.0")


def _check_target(request: Mapping[str, Any], method: str, service: Service) -> None:
    namespace, version = request.get("namespace"), _version(request)
    known = namespace is None or (isinstance(namespace, str) and namespace in service.namespaces)
    if known and _compatible(service.version, version):
        return
    what = f"version {str(version)[:20]}" if known else f"namespace {str(namespace)[:64]!r}"
    raise MessageError(
        f"{what} of method {method[:64]!r} is not spoken here: the version is {service.version}, with no namespace"
        + "".join(f" or {name!r}" for name in sorted(service.namespaces)),
        code="message.unsupported_version",
    )


def _compatible(ours: str, theirs: Any) -> bool:
    """Same major number, and minor (then revision) not above ours."""
    mine = _VERSION.fullmatch(ours)
    match = _VERSION.fullmatch(theirs) if isinstance(theirs, str) else None
    if match is None or mine is None or int(match[1]) != int(mine[1]):
        return False
    return (int(match[2]), int(match[3] or 0)) <= (int(mine[2]), int(mine[3] or 0))


def _instruction_id(request: Mapping[str, Any]) -> str:
    """The same for the same message, however often it is delivered."""
    for name in ("_unique_id", "_msg_id"):
        value = request.get(name)
        if not isinstance(value, str) or not _TOKEN.fullmatch(value):
            continue
        try:
            return str(uuid.UUID(hex=value)) if len(value) in (32, 36) else str(uuid.uuid5(_NAMES, value))
        except ValueError:
            return str(uuid.uuid5(_NAMES, value))
    return str(uuid.uuid4())


def _deadline(expiration: str, now: float) -> float | None:
    return now + int(expiration) / 1000 if re.fullmatch(r"[0-9]{1,12}", expiration) else None


def _heartbeat(timeout: Any) -> float:
    """Half of what the caller's monitor waits, as the stock server does it."""
    if isinstance(timeout, str) and re.fullmatch(r"[0-9]{1,9}", timeout):
        timeout = int(timeout)
    if isinstance(timeout, bool) or not isinstance(timeout, int | float) or timeout <= 0:
        return 0.0
    return min(max(timeout / 2, SHORTEST_HEARTBEAT), LONGEST_HEARTBEAT)


def _context(request: Mapping[str, Any]) -> dict[str, Any]:
    """The caller's context without its secrets; only the request ids of one that is too large."""
    context = {name[9:]: value for name, value in request.items() if name.startswith("_context_")}
    kept = redact(context)
    if len(json.dumps(kept)) > MAX_CONTEXT_BYTES:
        names = ("request_id", "global_request_id", *trace.NAMES)
        kept = {name: str(kept[name])[: trace.MAX_STATE] for name in names if name in kept} | {"shortened": True}
    return dict(kept)


# Replies


def _no_such_method(method: str, host: str) -> dict[str, Any]:
    text = f"Endpoint does not support RPC method {method}"
    return _exception("NoSuchMethod", _DISPATCHER, text, [method], {}, f"reeve on {host}: {_ASK}")


def _unsupported_version(version: Any, method: str, host: str) -> dict[str, Any]:
    text = f"Endpoint does not support RPC version {version}. Attempted method: {method}"
    return _exception("UnsupportedVersion", _DISPATCHER, text, [version], {"method": method}, f"reeve on {host}")


def _failure(error: Mapping[str, Any], host: str, ident: str) -> dict[str, Any]:
    code = str(error["code"])
    details = {
        "code": code,
        "retryable": bool(error.get("retryable")),
        "undone": bool(error.get("undone")),
        "host": host,
        "instruction": ident,
    }
    trace = ", ".join(f"{name} {value}" for name, value in details.items() if value != "")
    message = str(error["message"])
    return _exception(class_name(code), ERRORS_MODULE, message, [message], details, f"reeve: {trace}")


def _exception(
    name: str, module: str, message: str, args: list[Any], kwargs: dict[str, Any], trace: str
) -> dict[str, Any]:
    return {"class": name, "module": module, "message": message, "tb": [trace + "\n"], "args": args, "kwargs": kwargs}


def _ending(
    reply_to: str,
    msg_id: str,
    result: Any,
    failure: dict[str, Any] | None = None,
    ident: str = "",
    traceparent: str = "",
) -> wire.Outgoing:
    text = None if failure is None else json.dumps(failure)
    traced = {"_context_traceparent": traceparent} if traceparent else {}
    # Always the same for the same call: a client that drops duplicates may do so.
    unique = uuid.uuid5(_NAMES, f"{msg_id} {ident}").hex
    return _message(reply_to, msg_id, {"result": result, "failure": text, "ending": True} | traced, unique, ident)


def _message(reply_to: str, msg_id: str, data: dict[str, Any], unique: str, ident: str = "") -> wire.Outgoing:
    body = _enveloped(data | {"_msg_id": msg_id, "_unique_id": unique})
    return wire.Outgoing("", reply_to, body, correlation_id=ident)


def _enveloped(message: Mapping[str, Any]) -> bytes:
    return json.dumps({"oslo.version": ENVELOPE_VERSION, "oslo.message": json.dumps(message)}).encode()
