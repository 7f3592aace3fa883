"""What a message may be: a table of everything it may not."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent import wire
from agent.errors import MessageError

ID = "11111111-2222-3333-4444-555555555555"
GOOD: dict[str, Any] = {"reeve": "1.0", "id": ID, "verb": "list", "host": "node1", "args": {}}


def decode(body: bytes, **fields: Any) -> wire.Instruction:
    return wire.decode(wire.Raw(body, len(body), **fields), "node1")


def changed(**fields: Any) -> bytes:
    return json.dumps({**GOOD, **fields}).encode()


def without(name: str) -> bytes:
    return json.dumps({key: value for key, value in GOOD.items() if key != name}).encode()


BAD = [
    ("message.not_json", b""),
    ("message.not_json", b"hello"),
    ("message.not_json", b"{"),
    ("message.not_json", b'{"reeve": "1.0"'),
    ("message.not_json", b"\xff\xfe"),
    ("message.not_json", b"\xef\xbb\xbf{}"),
    ("message.not_json", b'{"id": "\\ud800"}'),
    ("message.not_json", b"1" * 5000),
    ("message.not_json", b'"' + b'\\"' * 400_000),
    ("message.not_json", b'"\\' * 400_000),
    ("message.not_json", b'"""' * 300_000),
    ("message.too_deep", b"[" * 10_000),
    ("message.too_deep", b"[" * 10_000 + b"]" * 10_000),
    ("message.too_deep", b'{"a":' * 10_000 + b"1" + b"}" * 10_000),
    ("message.too_deep", changed(args=json.loads("[" * 40 + "]" * 40))),
    ("message.too_large", b"x" * (wire.MAX_BYTES + 1)),
    ("message.duplicate_key", b'{"reeve": "1.0", "reeve": "1.0"}'),
    ("message.duplicate_key", b'{"args": {"a": 1, "a": 2}}'),
    ("message.bad_number", b'{"deadline": NaN}'),
    ("message.bad_number", b'{"deadline": -Infinity}'),
    ("message.bad_number", b'{"deadline": 1e999}'),
    ("message.bad_field", b"[]"),
    ("message.bad_field", b"null"),
    ("message.missing_field", b"{}"),
    ("message.missing_field", without("id")),
    ("message.missing_field", without("verb")),
    ("message.missing_field", without("host")),
    ("message.missing_field", changed(host=None)),
    ("message.unknown_field", changed(priority=1)),
    ("message.unknown_field", changed(**{"x" * 1000: 1})),
    ("message.unsupported_version", changed(reeve="2.0")),
    ("message.unsupported_version", changed(reeve="1.1")),
    ("message.unsupported_version", changed(reeve="0.9")),
    ("message.bad_field", changed(reeve=1.0)),
    ("message.bad_field", changed(reeve="1")),
    ("message.bad_field", changed(id="x")),
    ("message.bad_field", changed(id=ID.upper().replace("1", "A"))),
    ("message.bad_field", changed(id=7)),
    ("message.bad_field", changed(verb="Create")),
    ("message.bad_field", changed(verb="create\n")),
    ("message.bad_field", changed(verb=["create"])),
    ("message.bad_field", changed(verb="v" * 100)),
    ("message.bad_field", changed(host="../etc")),
    ("message.bad_field", changed(host={})),
    ("message.bad_field", changed(args=[])),
    ("message.bad_field", changed(args="name=web")),
    ("message.bad_field", changed(reply_to="../../etc/passwd")),
    ("message.bad_field", changed(reply_to=".hidden")),
    ("message.bad_field", changed(reply_to=5)),
    ("message.bad_field", changed(deadline="soon")),
    ("message.bad_field", changed(deadline=True)),
    ("message.bad_field", changed(deadline=-1)),
    ("message.bad_field", changed(deadline=1e18)),
    ("message.wrong_host", changed(host="node2")),
]


@pytest.mark.parametrize(("code", "body"), BAD)
def test_bad_messages_have_one_line_and_a_code(code: str, body: bytes) -> None:
    started = time.monotonic()
    with pytest.raises(MessageError) as caught:
        decode(body)
    assert caught.value.code == code
    assert not caught.value.retryable
    assert "\n" not in caught.value.message and len(caught.value.message) < 400
    assert time.monotonic() - started < 2.0


def test_size_is_checked_before_the_body_is_read() -> None:
    with pytest.raises(MessageError) as caught:
        wire.decode(wire.Raw(b"[" * 10, 100 << 20), "node1")
    assert caught.value.code == "message.too_large" and "104857600" in caught.value.message


@pytest.mark.parametrize("fields", [{"headers": {"compression": "application/x-gzip"}}, {"content_encoding": "utf-16"}])
def test_other_encodings_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(MessageError) as caught:
        decode(changed(), **fields)
    assert caught.value.code == "message.unsupported_encoding"


def test_a_good_message() -> None:
    instruction = decode(changed(verb="create", args={"name": "ü"}, reply_to="r.1", deadline=5))
    assert instruction == wire.Instruction(ID, "create", "node1", {"name": "ü"}, "r.1", 5.0)
    assert decode(wire.encode_instruction(instruction)) == instruction


def test_optional_fields_may_be_null_or_left_out() -> None:
    assert decode(changed(reply_to=None, deadline=None)) == decode(changed())
    assert decode(without("args")).args == {}


def test_the_transport_s_reply_address_is_used_when_the_body_has_none() -> None:
    assert decode(changed(), reply_to="props").reply_to == "props"
    assert decode(changed(reply_to="own"), reply_to="props").reply_to == "own"


def test_brackets_in_strings_are_no_nesting() -> None:
    assert decode(changed(args={"cmdline": "[" * 1000 + '\\"' + "{" * 1000})).args["cmdline"].startswith("[[")


@pytest.mark.parametrize(
    ("body", "properties", "expected"),
    [
        (changed(host="other", reply_to="r"), {}, ("r", ID)),
        (changed(host="other"), {"reply_to": "p", "correlation_id": "c"}, ("p", ID)),
        (b"nonsense", {"reply_to": "p", "correlation_id": "c"}, ("p", "c")),
        (b"nonsense", {"reply_to": "../p", "correlation_id": "a b"}, ("", "")),
        (b"[1]", {"reply_to": "p"}, ("p", "")),
        (changed(id=["x"], reply_to={}), {"reply_to": "p"}, ("p", "")),
        (b"[" * 5000, {"reply_to": "p", "correlation_id": "c"}, ("p", "c")),
    ],
)
def test_reply_address_of_a_refused_message(body: bytes, properties: dict[str, str], expected: tuple[str, str]) -> None:
    assert wire.readable_reply_address(wire.Raw(body, len(body), **properties)) == expected


def test_digest_names_the_content() -> None:
    one = wire.Instruction(ID, "create", "node1", {"a": 1, "b": 2})
    assert one.digest == wire.Instruction("x", "create", "node1", {"b": 2, "a": 1}, "elsewhere", 9.0).digest
    assert one.digest != wire.Instruction(ID, "create", "node1", {"a": 1, "b": 3}).digest
    assert one.digest != wire.Instruction(ID, "destroy", "node1", {"a": 1, "b": 2}).digest


def test_reply_and_report_round_trip() -> None:
    reply = wire.Reply(ID, "node1", "list", {"domains": []}, None, ({"name": "list"},), 1.0, 2.0)
    sent = wire.encode_reply(reply, "r.1")
    assert (sent.exchange, sent.routing_key, sent.correlation_id) == ("", "r.1", ID)
    assert wire.Reply.from_json(json.loads(sent.body)) == reply and json.loads(sent.body)["ok"] is True
    report = wire.Report("capacity", "node1", 1.5, 3, {"memory_free_mib": 5})
    out = wire.encode_report(report)
    assert (out.exchange, out.routing_key) == ("reeve.reports", "capacity.node1")
    assert wire.Report.from_json(json.loads(out.body)) == report


@given(st.binary(max_size=300))
def test_any_bytes_give_an_instruction_or_a_message_error(body: bytes) -> None:
    with pytest.raises(MessageError):
        decode(body)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@given(st.sampled_from([*sorted(GOOD), "reply_to", "deadline"]), JSON_VALUES)
def test_any_value_in_any_field_is_taken_or_refused(field: str, value: Any) -> None:
    body = json.dumps({**GOOD, field: value}).encode()
    try:
        instruction = decode(body)
    except MessageError as exc:
        assert exc.code.startswith("message.")
    else:
        assert decode(wire.encode_instruction(instruction)) == instruction


def test_a_reply_can_be_told_by_its_beginning() -> None:
    """The publisher signs by it what it finds in the outbox."""
    for reply in (wire.Reply("", "node1", error={"code": "x"}), wire.Reply("i", "node1", "list", result={})):
        assert wire.encode_reply(reply, "queue").body.startswith(wire.REPLY_HEAD)
    instruction = wire.Instruction("i", "list", "node1", {})
    assert not wire.encode_instruction(instruction).startswith(wire.REPLY_HEAD)
    assert not wire.encode_report(wire.Report("agent", "node1", 0.0, 1, {})).body.startswith(wire.REPLY_HEAD)
