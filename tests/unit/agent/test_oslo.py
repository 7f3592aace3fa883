"""oslo.messaging's form: what its stock client sends and takes, and what a hostile one may send."""

from __future__ import annotations

import bz2
import json
import uuid
import zlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent import dialects, oslo, wire
from agent.errors import MessageError

UNIQUE = "0123456789abcdef0123456789abcdef"
CALL: dict[str, Any] = {
    "method": "create",
    "args": {"name": "web"},
    "version": "1.0",
    "_msg_id": "f" * 32,
    "_reply_q": "reply_" + "a" * 32,
    "_timeout": None,
    "_unique_id": UNIQUE,
    "_context_request_id": "req-1",
}
SERVICE = oslo.Service("1.3", frozenset({"reeve"}))


def raw(request: Any, **fields: Any) -> wire.Raw:
    body = json.dumps({"oslo.version": "2.0", "oslo.message": json.dumps(request)}).encode()
    return plain(body, **fields)


def plain(body: bytes, **fields: Any) -> wire.Raw:
    return wire.Raw(body, len(body), "application/json", "utf-8", dialect=oslo.DIALECT, **fields)


def decode(message: wire.Raw, service: oslo.Service = SERVICE, max_bytes: int = 4096) -> Any:
    return dialects.decode(message, "node1", max_bytes, service, now=100.0)


def without(*names: str) -> dict[str, Any]:
    return {name: value for name, value in CALL.items() if name not in names}


def inner(message: wire.Outgoing | None) -> dict[str, Any]:
    assert message is not None
    envelope = json.loads(message.body)
    assert set(envelope) == {"oslo.version", "oslo.message"} and envelope["oslo.version"] == "2.0"
    return dict(json.loads(envelope["oslo.message"]))


def test_a_call_becomes_an_instruction() -> None:
    instruction = decode(raw(CALL, expiration="60000"))
    assert instruction == wire.Instruction(
        id=str(uuid.UUID(UNIQUE)),
        verb="create",
        host="node1",
        args={"name": "web"},
        reply_to="reply_" + "a" * 32,
        deadline=160.0,
        dialect=oslo.DIALECT,
        correlation="f" * 32,
        context={"request_id": "req-1"},
    )


def test_a_cast_waits_for_nothing() -> None:
    instruction = decode(raw(without("_msg_id", "_reply_q", "_timeout")))
    assert (instruction.reply_to, instruction.correlation, instruction.deadline) == ("", "", None)


def test_a_body_without_envelope_is_the_request() -> None:
    assert decode(plain(json.dumps(CALL).encode())) == decode(raw(CALL))


@pytest.mark.parametrize("pack", [(zlib.compress, "application/x-gzip"), (bz2.compress, "application/x-bz2")])
def test_compression_of_the_client(pack: Any) -> None:
    compress, name = pack
    body = compress(raw(CALL).body)
    assert decode(plain(body, headers={"compression": name})) == decode(raw(CALL))
    bomb = plain(compress(b"[" * (1 << 24)), headers={"compression": name})
    with pytest.raises(MessageError) as caught:
        decode(bomb)
    assert caught.value.code == "message.too_large"
    with pytest.raises(MessageError) as caught:
        decode(plain(b"no such thing", headers={"compression": name}))
    assert caught.value.code == "message.unsupported_encoding"


def test_the_same_message_has_the_same_id() -> None:
    assert decode(raw(CALL)).id == decode(raw(CALL)).id
    odd = decode(raw(CALL | {"_unique_id": "msg 7"})).id, decode(raw(CALL | {"_unique_id": "msg-7"})).id
    assert odd[0] == str(uuid.UUID("f" * 32)), "not printable: the call's own id counts"
    assert odd[1] == decode(raw(CALL | {"_unique_id": "msg-7"})).id != odd[0]
    assert decode(raw(without("_unique_id", "_msg_id"))).id != decode(raw(without("_unique_id", "_msg_id"))).id


@pytest.mark.parametrize(
    ("timeout", "expected"),
    [(None, 0.0), (10, 5.0), (1, 0.5), ("20", 10.0), (0, 0.0), (-5, 0.0), (True, 0.0), ("x", 0.0), (1e12, 86400.0)],
)
def test_heartbeats_come_twice_in_the_callers_timeout(timeout: Any, expected: float) -> None:
    assert decode(raw(CALL | {"_timeout": timeout})).heartbeat == expected
    assert decode(raw(without("_msg_id", "_reply_q") | {"_timeout": timeout})).heartbeat == 0.0


def test_secrets_are_taken_out_of_the_context_and_its_size_is_bounded() -> None:
    context = {"_context_auth_token": "s3cret", "_context_user": "u", "_context_x": {"password": "p", "n": [1]}}
    assert decode(raw(CALL | context)).context == {
        "request_id": "req-1",
        "auth_token": "***",
        "user": "u",
        "x": {"password": "***", "n": [1]},
    }
    large = decode(raw(CALL | {"_context_catalog": "x" * 20000}), max_bytes=1 << 20).context
    assert large == {"request_id": "req-1", "shortened": True}


def test_deadlines_can_be_left_to_the_broker() -> None:
    assert decode(raw(CALL, expiration="60000"), oslo.Service(call_deadlines=False)).deadline is None
    assert decode(raw(CALL, expiration="soon")).deadline is None


@pytest.mark.parametrize(
    ("version", "spoken"),
    [
        *((version, True) for version in ("1.0", "1.3", "1.2.9")),
        *((version, False) for version in ("1.3.1", "1.4", "2.0", "0.9", "1", "x.y", None, 1.0, "1.0.0.0", [])),
    ],
)
def test_versions(version: Any, spoken: bool) -> None:
    message = raw(CALL | {"version": version})
    if spoken:
        assert decode(message).verb == "create"
        return
    with pytest.raises(MessageError) as caught:
        decode(message)
    assert caught.value.code == "message.unsupported_version"
    failure = json.loads(inner(dialects.encode_refusal(message, caught.value, "node1"))["failure"])
    assert (failure["class"], failure["module"]) == ("UnsupportedVersion", "oslo_messaging.rpc.dispatcher")
    assert (failure["args"], failure["kwargs"]) == ([version], {"method": "create"})


def test_a_missing_version_is_the_first() -> None:
    assert decode(raw(without("version"))).verb == "create"


@pytest.mark.parametrize(("namespace", "spoken"), [(None, True), ("reeve", True), ("", False), ("other", False)])
def test_namespaces(namespace: Any, spoken: bool) -> None:
    message = raw(CALL | {"namespace": namespace})
    if spoken:
        assert decode(message).verb == "create"
        return
    with pytest.raises(MessageError) as caught:
        decode(message)
    assert caught.value.code == "message.unsupported_version"


BAD = [
    ("message.not_json", plain(b"{")),
    ("message.bad_field", plain(b"[]")),
    ("message.bad_field", raw([])),
    ("message.bad_field", plain(b'{"oslo.version": "2.0", "oslo.message": {}}')),
    ("message.not_json", plain(b'{"oslo.version": "2.0", "oslo.message": "{"}')),
    ("message.bad_field", plain(b'{"oslo.version": "3.0", "oslo.message": "{}"}')),
    ("message.bad_field", plain(b'{"oslo.version": "2.1", "oslo.message": "{}"}')),
    ("message.missing_field", raw({})),
    ("message.missing_field", raw(CALL | {"method": 7})),
    ("message.bad_field", raw(CALL | {"args": []})),
    ("message.bad_field", raw(CALL | {"_msg_id": 5})),
    ("message.bad_field", raw(CALL | {"_reply_q": "reeve.node1"})),
    ("message.bad_field", raw(CALL | {"_reply_q": "reply_" + "x" * 300})),
    ("message.bad_field", raw(without("_reply_q"))),
    ("message.too_deep", raw(CALL | {"args": {"x": json.loads("[" * 40 + "]" * 40)}})),
    ("message.too_large", raw(CALL | {"args": {"x": "y" * 5000}})),
    ("message.duplicate_key", plain(b'{"oslo.version": "2.0", "oslo.message": "{\\"a\\": 1, \\"a\\": 2}"}')),
    ("message.unsupported_encoding", plain(b"x", headers={"compression": "application/x-brotli"})),
    ("instruction.unknown_verb", raw(CALL | {"method": "_private"})),
    ("instruction.unknown_verb", raw(CALL | {"method": "__init__"})),
    ("instruction.unknown_verb", raw(CALL | {"method": "a.b"})),
    ("instruction.unknown_verb", raw(CALL | {"method": ""})),
]


@pytest.mark.parametrize(("code", "message"), BAD, ids=[f"{n}-{row[0]}" for n, row in enumerate(BAD)])
def test_what_is_refused(code: str, message: wire.Raw) -> None:
    with pytest.raises(MessageError) as caught:
        decode(message)
    assert caught.value.code == code and "\n" not in str(caught.value)
    answer = dialects.encode_refusal(message, caught.value, "node1", 4096)
    if answer is not None:
        data = inner(answer)
        assert (data["result"], data["ending"], data["_msg_id"]) == (None, True, "f" * 32)
        failure = json.loads(data["failure"])
        expected = "NoSuchMethod" if code == "instruction.unknown_verb" else oslo.class_name(code)
        assert failure["class"] == expected


def test_a_refused_call_is_answered_and_a_cast_is_not() -> None:
    why = MessageError("no", code="instruction.unknown_verb")
    answer = dialects.encode_refusal(raw(CALL | {"method": "_x"}), why, "node1")
    assert answer is not None and (answer.exchange, answer.routing_key) == ("", CALL["_reply_q"])
    assert dialects.encode_refusal(raw(without("_msg_id")), why, "node1") is None
    assert dialects.encode_refusal(plain(b"nonsense"), why, "node1") is None


def test_ping() -> None:
    ping = without("version") | {"method": oslo.PING, "args": {"any": 1}}
    assert inner(decode(raw(ping)))["result"] == "pong"
    assert decode(raw({name: value for name, value in ping.items() if name != "_msg_id"})) is None
    with pytest.raises(MessageError) as caught:
        decode(raw(ping | {"version": "2.0"}))
    assert caught.value.code == "message.unsupported_version"


def test_a_result() -> None:
    reply = wire.Reply("id-1", "node1", "create", {"domain": {"name": "ä"}})
    message = dialects.encode_reply(reply, "reply_a", oslo.DIALECT, "m1")
    assert (message.exchange, message.routing_key, message.content_type) == ("", "reply_a", "application/json")
    data = inner(message)
    assert (data["result"], data["failure"], data["ending"]) == ({"domain": {"name": "ä"}}, None, True)
    assert data["_msg_id"] == "m1"
    assert dialects.encode_reply(reply, "reply_a", oslo.DIALECT, "m1") == message, "sent twice it is one message"
    other = dialects.encode_reply(reply, "reply_a", oslo.DIALECT, "m2")
    assert inner(other)["_unique_id"] != data["_unique_id"]


def test_a_failure() -> None:
    error = {"code": "domain.not_found", "message": "no domain x", "retryable": False, "undone": True}
    reply = wire.Reply("id-1", "node1", "show", error=error)
    data = inner(dialects.encode_reply(reply, "reply_a", oslo.DIALECT, "m1"))
    assert data["result"] is None and data["ending"] is True and isinstance(data["failure"], str)
    failure = json.loads(data["failure"])
    assert set(failure) == {"class", "module", "message", "tb", "args", "kwargs"}
    assert (failure["class"], failure["module"]) == ("DomainNotFound", "reeve_errors")
    assert failure["args"] == ["no domain x"] and isinstance(failure["tb"], list)
    assert failure["kwargs"] == {
        "code": "domain.not_found",
        "retryable": False,
        "undone": True,
        "host": "node1",
        "instruction": "id-1",
    }


def test_an_unknown_verb_is_no_such_method() -> None:
    error = {"code": "instruction.unknown_verb", "message": "there is no verb 'x'", "retryable": False}
    message = dialects.encode_reply(wire.Reply("id-1", "n", "x", error=error), "reply_a", oslo.DIALECT, "m1")
    failure = json.loads(inner(message)["failure"])
    assert (failure["class"], failure["args"]) == ("NoSuchMethod", ["x"])
    assert failure["module"] == "oslo_messaging.rpc.dispatcher"


def test_a_heartbeat_is_no_ending() -> None:
    data = inner(oslo.encode_heartbeat("reply_a", "m1"))
    assert (data["result"], data["failure"], data["ending"], data["_msg_id"]) == (None, None, False, "m1")
    assert data["_unique_id"] != inner(oslo.encode_heartbeat("reply_a", "m1"))["_unique_id"]


def test_an_unknown_dialect() -> None:
    with pytest.raises(ValueError, match="no dialect 'x'"):
        dialects.encode_reply(wire.Reply("id", "n"), "q", "x")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)
FIELDS = st.sampled_from([*CALL, "namespace", "_context_x"])


@given(st.dictionaries(FIELDS, JSON), st.booleans(), st.text())
def test_any_request_is_taken_or_refused(changes: dict[str, Any], envelope: bool, expiration: str) -> None:
    request = CALL | changes
    message = raw(request) if envelope else plain(json.dumps(request).encode())
    message = wire.Raw(message.body, message.size, dialect=oslo.DIALECT, expiration=expiration)
    try:
        got = decode(message)
    except MessageError as exc:
        assert "\n" not in exc.code
        answer = dialects.encode_refusal(message, exc, "node1")
        assert answer is None or inner(answer)["_msg_id"] == request["_msg_id"]
        return
    assert got is None or isinstance(got, wire.Outgoing | wire.Instruction)


@given(st.binary(max_size=200))
def test_any_body_is_taken_or_refused(body: bytes) -> None:
    with pytest.raises(MessageError):
        decode(plain(body))
