from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from agent_rig import HOST, Rig

from agent import reports
from agent.reports import Reporter
from agent.resources import ResourceClaims
from agent.wire import Report
from hypervisor.errors import HostUnavailable
from hypervisor.toolstack.api import DomainEvent


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reports, "SETTLE_SECONDS", 0.01)


def make(rig: Rig, sent: list[Report], **options: Any) -> Reporter:
    claims = ResourceClaims(rig.toolstack, rig.journal)
    return Reporter(HOST, rig.toolstack, claims, sent.append, extra=lambda: {"verbs": ["list"]}, **options)


def until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        threading.Event().wait(0.005)


def kinds(sent: list[Report], kind: str) -> list[Report]:
    return [report for report in sent if report.kind == kind]


def test_capacity_at_start_on_change_and_no_more(rig: Rig) -> None:
    sent: list[Report] = []
    reporter = make(rig, sent, interval=1000)
    reporter.start()
    until(lambda: kinds(sent, "capacity"))
    first = kinds(sent, "capacity")[0].data
    assert first["memory_free_mib"] == 16384 and first["driver"] == "fake" and first["verbs"] == ["list"]
    reporter.changed()
    rig.create()
    until(lambda: kinds(sent, "capacity")[-1].data["memory_free_mib"] == 16320)
    reporter.changed()
    reporter.stop()
    assert len(kinds(sent, "capacity")) <= 3
    assert [report.data["event"] for report in kinds(sent, "agent")] == ["started", "stopping"]
    assert [report.seq for report in sent] == list(range(1, len(sent) + 1))


def test_capacity_at_intervals(rig: Rig) -> None:
    sent: list[Report] = []
    reporter = make(rig, sent, interval=0.02)
    reporter.start()
    until(lambda: len(kinds(sent, "capacity")) >= 3)
    reporter.stop()
    assert {report.host for report in sent} == {HOST}


def test_lifecycle_events_are_passed_on(rig: Rig) -> None:
    events: list[DomainEvent] = []
    reporter = make(rig, [], interval=1000, lifecycle=events.append)
    reporter.start()
    uuid = rig.create()
    rig.toolstack.crash(uuid)
    until(lambda: "crashed" in [event.kind for event in events])
    assert all(event.uuid == uuid for event in events)
    reporter.stop()
    count = len(events)
    rig.ok("destroy", {"uuid": uuid})
    assert len(events) == count


def test_a_host_that_is_away_is_no_report_and_no_end(rig: Rig) -> None:
    sent: list[Report] = []
    reporter = make(rig, sent)
    rig.toolstack.inject_error("host_info", HostUnavailable("away"))
    assert not reporter.capacity(always=True)
    assert sent == []
    assert reporter.capacity(always=True) and reporter.capacity(always=False)
    assert len(sent) == 1


def test_a_host_that_was_away_at_the_start_is_asked_again(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reports, "AGAIN_SECONDS", 0.02)
    sent: list[Report] = []
    rig.toolstack.inject_error("host_info", HostUnavailable("away"), times=2)
    reporter = make(rig, sent, interval=1000)
    reporter.start()
    until(lambda: kinds(sent, "capacity"))
    reporter.stop()
