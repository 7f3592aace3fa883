"""The driver's events into the outbox, also those that nobody saw."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable

import pytest
from agent_rig import HOST, Rig

from agent import lifecycle
from agent.lifecycle import UNSEEN, Lifecycle, unseen
from agent.notices import Notices
from hypervisor.errors import HostUnavailable
from hypervisor.toolstack.api import DomainEvent


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lifecycle, "SETTLE_SECONDS", 0.01)
    monkeypatch.setattr(lifecycle, "AGAIN_SECONDS", 0.01)


def until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        threading.Event().wait(0.005)


def made(rig: Rig, interval: float = 1000) -> Lifecycle:
    return Lifecycle(rig.toolstack, rig.journal, Notices(HOST, time.time), lambda: None, interval=interval)


def told(rig: Rig) -> list[tuple[str, str, str]]:
    bodies = [json.loads(row.body) for row in rig.journal.outbox(1000) if row.routing_key.startswith("lifecycle.")]
    return [(body["data"]["event"], body["data"]["uuid"], body["data"]["detail"]) for body in bodies]


def test_events_are_stored_as_they_come(rig: Rig) -> None:
    life = made(rig)
    life.start()
    unsubscribe = rig.toolstack.subscribe(life.happened)
    uuid = rig.create()
    rig.toolstack.crash(uuid)
    until(lambda: "crashed" in [kind for kind, _, _ in told(rig)])
    unsubscribe()
    life.stop()
    assert [kind for kind, _, detail in told(rig) if detail != UNSEEN][-1] == "crashed"


def test_the_end_stores_what_came_before_it(rig: Rig) -> None:
    life = made(rig)
    life.start()
    for number in range(50):
        life.happened(DomainEvent("created", f"u{number}", 1.0))
    life.stop()
    assert [uuid for _, uuid, _ in told(rig)] == [f"u{number}" for number in range(50)]


def test_what_happened_while_the_agent_was_away(rig: Rig) -> None:
    stays, goes, crashes = rig.create("stays"), rig.create("goes"), rig.create("crashes")
    assert made(rig).store([], look=True) == 0, "of what was there before the first start nothing is known"
    rig.toolstack.destroy(goes)
    rig.toolstack.crash(crashes)
    rig.toolstack.pause(stays)
    new = rig.create("new")
    life = made(rig)
    assert life.store([], look=True) == 4
    assert set(told(rig)) == {
        ("destroyed", goes, UNSEEN), ("crashed", crashes, UNSEEN), ("paused", stays, UNSEEN), ("created", new, UNSEEN),
    }  # fmt: skip
    assert life.store([], look=True) == 0, "once"


def test_what_was_seen_is_not_told_twice(rig: Rig) -> None:
    life = made(rig)
    life.store([], look=True)
    uuid = rig.create()
    assert life.store([DomainEvent("created", uuid, 1.0), DomainEvent("unpaused", uuid, 1.1)], look=True) == 2
    assert life.store([], look=True) == 0


def test_a_host_that_is_away_is_no_end_of_its_domains(rig: Rig) -> None:
    uuid = rig.create()
    life = made(rig)
    life.store([], look=True)
    rig.toolstack.inject_error("list_domains", HostUnavailable("away"))
    with pytest.raises(HostUnavailable):
        life.store([], look=True)
    rig.toolstack.inject_error("list_domains", HostUnavailable("away"))
    assert life.store([DomainEvent("crashed", uuid, 1.0)], look=False) == 1, "an event waits for no host"
    assert [kind for kind, _, _ in told(rig)] == ["crashed"]


def test_a_journal_that_fails_is_tried_again(rig: Rig) -> None:
    rig.journal._db.execute("CREATE TRIGGER full BEFORE INSERT ON outbox BEGIN SELECT raise(ABORT, 'disk full'); END")
    life = made(rig)
    life.start()
    life.happened(DomainEvent("crashed", "u", 1.0))
    rig.journal._db.execute("DROP TRIGGER full")
    until(lambda: [kind for kind, _, _ in told(rig)] == ["crashed"])
    life.stop()


def test_a_full_outbox_takes_no_more(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(lifecycle, "MAX_WAITING", 1)
    life = made(rig)
    for number in range(4):
        life.store([DomainEvent("created", f"u{number}", 1.0)], look=False)
    assert len(told(rig)) == 2 and "are dropped" in caplog.text


def test_between_two_looks() -> None:
    before = {"a": [1, "running"], "b": [2, "paused"], "c": [3, "running"], "d": [4, "running"]}
    after = {"a": [1, "running"], "b": [2, "running"], "c": [7, "running"], "e": [5, "shutdown"]}
    assert [(event.kind, event.uuid) for event in unseen(before, after, 1.0)] == [
        ("unpaused", "b"), ("rebooted", "c"), ("created", "e"), ("shutdown", "e"), ("destroyed", "d"),
    ]  # fmt: skip
