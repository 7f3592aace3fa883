from __future__ import annotations

import json
import threading
import uuid
from pathlib import Path
from typing import Any

import pytest
from agent_rig import HOST, make_rig

from agent import oslo, trace, wire
from agent.context import log_fields
from agent.rpc.peers import BrokerPeers

PARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


@pytest.mark.parametrize(
    ("value", "kept"),
    [
        (PARENT, PARENT),
        ("cc-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-03-what-comes", PARENT),
        ("cc-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-02", PARENT[:-2] + "00"),
        (PARENT + "-more", ""),
        ("ff" + PARENT[2:], ""),
        (PARENT.upper(), ""),
        ("00-" + "0" * 32 + "-00f067aa0ba902b7-01", ""),
        ("00-4bf92f3577b34da6a3ce929d0e0e4736-" + "0" * 16 + "-01", ""),
        (PARENT + "\n", ""),
        ("", ""),
        (None, ""),
        (7, ""),
        ([PARENT], ""),
    ],
)
def test_what_is_a_traceparent(value: Any, kept: str) -> None:
    assert trace.parent(value) == kept


@pytest.mark.parametrize("state", ["", "a=1\n", "x" * 513, ",".join("abcdefgh" * 5), 7])
def test_a_bad_state_goes_and_the_parent_stays(state: Any) -> None:
    assert trace.adopt({"traceparent": PARENT, "tracestate": state}) == {"traceparent": PARENT}


def native(headers: dict[str, Any] | None = None, **fields: Any) -> wire.Instruction:
    body = {"reeve": "1.0", "id": str(uuid.uuid4()), "verb": "list", "host": HOST} | fields
    return wire.decode(wire.Raw(json.dumps(body).encode(), 0, headers=headers or {}), HOST)


def test_a_native_message_carries_it_as_a_field_or_as_a_header() -> None:
    other = PARENT.replace("4bf9", "aaaa")
    assert native(traceparent=PARENT, tracestate="a=1").context == {"traceparent": PARENT, "tracestate": "a=1"}
    assert native({"traceparent": PARENT}).context == {"traceparent": PARENT}
    assert native({"traceparent": other}, traceparent=PARENT).context == {"traceparent": PARENT}
    assert native(traceparent="nonsense", tracestate=["a"]).context == {}, "ignored, never refused"
    sent = native(traceparent=PARENT, tracestate="a=1")
    assert wire.decode(wire.Raw(wire.encode_instruction(sent), 0), HOST) == sent


def test_a_message_of_oslo_messaging_carries_it_in_its_context_or_as_a_header() -> None:
    def decoded(headers: dict[str, Any], **context: Any) -> dict[str, Any]:
        request = {"method": "list", "args": {}} | {f"_context_{name}": value for name, value in context.items()}
        found = oslo.decode(wire.Raw(json.dumps(request).encode(), 0, headers=headers), HOST, 1 << 20, oslo.SERVICE, 0)
        assert isinstance(found, wire.Instruction)
        return found.context

    assert decoded({}, traceparent=PARENT, user="u") == {"traceparent": PARENT, "user": "u"}
    assert decoded({"traceparent": PARENT}, user="u") == {"traceparent": PARENT, "user": "u"}
    assert decoded({}, traceparent="x", tracestate="y", user="u") == {"user": "u"}
    assert decoded({}, traceparent=PARENT, much="x" * 20000)["traceparent"] == PARENT


def test_replies_of_both_forms_have_it(tmp_path: Path) -> None:
    rig = make_rig(tmp_path)
    assert rig.run("list", context={"traceparent": PARENT}).traceparent == PARENT
    assert "traceparent" not in json.loads(rig.journal.outbox()[0].body) or rig.run("list").traceparent == ""
    reply = wire.Reply("i", HOST, "list", {"a": 1}, traceparent=PARENT)
    inner = json.loads(json.loads(oslo.encode_reply(reply, "reply_x", "m").body)["oslo.message"])
    assert inner["_context_traceparent"] == PARENT and inner["result"] == {"a": 1}
    assert "traceparent" not in wire.Reply("i", HOST).to_json()
    rig.journal.close()


def test_the_trace_of_a_block() -> None:
    with log_fields("i", traced={"traceparent": PARENT}):
        with log_fields("i", "d"):
            assert trace.current() == {"traceparent": PARENT}
        with log_fields("j", traced={}):
            assert trace.current() == {}
    assert trace.current() == {}


def test_what_is_sent_to_other_agents_has_it(tmp_path: Path) -> None:
    sent: list[wire.Outgoing] = []
    peers = BrokerPeers(f"filesystem://{tmp_path}/broker", threading.Event(), sent.append)
    with log_fields("i", traced={"traceparent": PARENT, "tracestate": "a=1"}):
        peers.tell("node2", "list", {}, ident=str(uuid.uuid4()))
    told = json.loads(sent[0].body)
    assert (told["traceparent"], told["tracestate"]) == (PARENT, "a=1")
