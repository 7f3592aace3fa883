"""Notifications of instructions: both forms, in the transaction of what they tell of."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path
from typing import Any

import pytest
from agent_rig import HOST, Rig, make_rig

from agent import wire
from agent.errors import JournalError
from agent.notices import MAX_PAYLOAD_BYTES, Notices, OsloTopics, queues
from hypervisor.toolstack.api import DomainEvent

PARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


@pytest.fixture
def both(tmp_path: Path) -> Rig:
    notices = Notices(HOST, lambda: 1767225600.5, topics=OsloTopics("nova", ("notifications", "billing")))
    return make_rig(tmp_path, notices=notices)


def told(rig: Rig) -> tuple[list[dict[str, Any]], list[tuple[str, dict[str, Any]]]]:
    """(native ones, oslo's with their routing keys) in the outbox."""
    native, oslo = [], []
    for row in rig.journal.outbox(1000):
        if row.exchange == wire.REPORT_EXCHANGE:
            native.append(json.loads(row.body))
        elif row.exchange == "nova":
            outer = json.loads(row.body)
            assert outer["oslo.version"] == "2.0"
            oslo.append((row.routing_key, json.loads(outer["oslo.message"])))
    return native, oslo


def test_a_create_begins_and_ends(both: Rig) -> None:
    context = {"request_id": "req-1", "user": "u", "traceparent": PARENT}
    reply = both.run("create", {"name": "web", "memory_mib": 64, "kernel": str(both.kernel)}, context=context)
    native, oslo = told(both)
    assert [(item["type"], item["data"]["event"]) for item in native] == [
        ("instruction", "create.start"), ("instruction", "create.end"),
    ]  # fmt: skip
    data = native[1]["data"]
    assert reply.result is not None
    uuid = reply.result["domain"]["uuid"]
    assert (data["instruction"], data["uuid"], data["request"], data["traceparent"]) == (
        reply.id, uuid, "req-1", PARENT,
    )  # fmt: skip
    assert data["result"] == reply.result and [item["seq"] for item in native] == [1, 2]
    assert [key for key, _ in oslo] == ["notifications.info", "billing.info"] * 2
    end = oslo[2][1]
    assert end.pop("payload")["result"] == reply.result
    assert end == {
        "message_id": data["id"], "_unique_id": data["id"].replace("-", ""), "publisher_id": "reeve-agent.node1",
        "event_type": "domain.create.end", "priority": "INFO", "timestamp": "2026-01-01 00:00:00.500000",
        "_context_request_id": "req-1", "_context_user": "u", "_context_traceparent": PARENT,
    }  # fmt: skip
    both.journal.close()


def test_failures_and_what_is_not_told(both: Rig) -> None:
    missing = "11111111-2222-3333-4444-555555555555"
    both.refused("domain.not_found", "destroy", {"uuid": missing})
    both.refused("instruction.unknown_verb", "frobnicate")
    both.ok("list")
    native, oslo = told(both)
    assert [item["data"]["event"] for item in native] == ["destroy.error"]
    assert native[0]["data"]["error"]["code"] == "domain.not_found" and native[0]["data"]["uuid"] == missing
    assert [(key, item["priority"]) for key, item in oslo] == [
        ("notifications.error", "ERROR"),
        ("billing.error", "ERROR"),
    ]
    both.journal.close()


def test_no_outcome_no_notification(both: Rig) -> None:
    """They are in one transaction: what cannot be stored is not told, and it is told once when it can."""
    both.journal._db.execute(
        "CREATE TRIGGER full BEFORE UPDATE ON instructions WHEN new.finished IS NOT NULL"
        " BEGIN SELECT raise(ABORT, 'disk full'); END"
    )
    ident = both.accept("create", {"name": "web", "memory_mib": 64, "kernel": str(both.kernel)})
    with pytest.raises((JournalError, sqlite3.Error)):
        both.executor.run(ident)
    assert [item["data"]["event"] for item in told(both)[0]] == ["create.start"]
    both.journal._db.execute("DROP TRIGGER full")
    both.executor.run(ident)
    assert [item["data"]["event"] for item in told(both)[0]] == ["create.start", "create.end"]
    both.journal.close()


def test_ids_are_those_of_what_happened() -> None:
    notices = Notices(HOST, lambda: 1.0)
    event = DomainEvent("crashed", "u", 7.5, "panic")
    once, again = (json.loads(notices.happened(event)[0].body) for _ in range(2))
    assert once["data"] == again["data"] and (once["seq"], again["seq"]) == (1, 2)
    other = json.loads(notices.happened(DomainEvent("crashed", "u", 7.6, "panic"))[0].body)
    assert other["data"]["id"] != once["data"]["id"]
    (oslo,) = Notices(HOST, lambda: 1.0, native=False, topics=OsloTopics("x", ("n",))).happened(event)
    assert (oslo.exchange, oslo.routing_key) == ("x", "n.error")
    assert Notices(HOST, lambda: 1.0, native=False).happened(event) == []


def test_a_huge_result_is_left_out() -> None:
    instruction = wire.Instruction("11111111-2222-3333-4444-555555555555", "show", HOST, {})
    reply = wire.Reply(instruction.id, HOST, "show", {"x": "y" * MAX_PAYLOAD_BYTES})
    (message,) = Notices(HOST, lambda: 1.0).ends(instruction, "", reply)
    assert json.loads(message.body)["data"]["result"] is None


def test_the_queues_of_the_topics() -> None:
    assert queues(["a", "b"]) == ["a.info", "a.error", "b.info", "b.error"]
