"""bench/rpc.py: its numbers, and that it notices what must not happen."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "bench"))

import rpc
from common import BenchFailed, render
from rpc_noop import Noop

from agent.loader import Verb


class Message:
    def __init__(self, msg_id: str, failure: str | None = None) -> None:
        inner = {"result": {}, "failure": failure, "ending": True, "_msg_id": msg_id}
        self.body = json.dumps({"oslo.version": "2.0", "oslo.message": json.dumps(inner)})


@pytest.fixture
def sender() -> rpc.Sender:
    made = rpc.Sender.__new__(rpc.Sender)
    made._due, made.latencies = {"m1": 0.0}, []
    return made


def test_percentiles_are_of_sorted_seconds() -> None:
    values = [n / 1000 for n in range(1, 101)]
    assert rpc.percentile(values, 0.5) == 51.0
    assert rpc.percentile(values, 0.99) == 100.0
    assert rpc.percentile([0.002], 0.99) == 2.0


def test_a_reply_counts_once(sender: rpc.Sender) -> None:
    sender._on_reply(Message("m1"))
    assert len(sender.latencies) == 1 and not sender._due
    with pytest.raises(BenchFailed, match="answered twice"):
        sender._on_reply(Message("m1"))


def test_a_failure_ends_the_benchmark(sender: rpc.Sender) -> None:
    with pytest.raises(BenchFailed, match="a call failed: no such verb"):
        sender._on_reply(Message("m1", "no such verb"))


def test_a_reply_that_does_not_come_ends_the_benchmark(sender: rpc.Sender, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sender, "wait", lambda seconds: False)
    with pytest.raises(BenchFailed, match="1 calls have no reply"):
        sender._patiently()


def test_the_table_has_both_sides() -> None:
    result: dict[str, Any] = dict.fromkeys(("reeve_per_s", "p50_ms", "p99_ms"), 1.0)
    result |= dict.fromkeys(("oslo_per_s", "oslo_p50_ms", "oslo_p99_ms"), 2.0)
    assert "oslo.messaging" in render(rpc.table(result))


def test_the_verb_is_one_that_the_agent_takes() -> None:
    verb = Verb.of(Noop())
    verb.check({"n": 1})
    assert not verb.plugin.read_only, "its outcome is kept like that of a verb that changes something"
