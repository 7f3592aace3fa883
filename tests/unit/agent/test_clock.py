"""The host's time of day is set, forwards and backwards, while the agent works."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from agent_rig import Rig, make_rig

from agent import clock, wire
from agent.errors import MessageError
from agent.journal import Accepted, Journal
from agent.journal.quarantine import Limits
from agent.locks import Job, Queues
from agent.rpc import connection as broker
from agent.rpc.consumer import Consumer
from agent.rpc.publisher import Publisher
from agent.wire import Instruction, Outgoing, Raw, Reply

YEAR = 365 * 86400.0
ONE = Instruction("id-1", "list", "node1", {}, "replies.1")


class Host:
    """:ivar day: its time of day; `pass_` moves it along with the clock that nobody sets."""

    def __init__(self) -> None:
        self.day = 1_000_000_000.0
        self.elapsed = 5000.0

    def pass_(self, seconds: float) -> None:
        self.day += seconds
        self.elapsed += seconds

    def journal(self, folder: Path, **limits: Any) -> Journal:
        return Journal(folder / "j.sqlite", lambda: self.day, Limits(**limits), lambda: self.elapsed)


@pytest.fixture
def host() -> Host:
    return Host()


@pytest.fixture
def journal(tmp_path: Path, host: Host) -> Journal:
    return host.journal(tmp_path)


def finish(journal: Journal, keep: float = 100.0) -> None:
    assert journal.accept(ONE) is Accepted.NEW
    journal.finish(Reply("id-1", "node1", "list", {}), keep)
    assert journal.forget() == 0


def test_a_clock_set_forwards_makes_no_outcome_old(journal: Journal, host: Host) -> None:
    finish(journal)
    host.pass_(50)
    host.day += YEAR
    assert journal.forget() == 0
    assert journal.accept(ONE) is Accepted.REPLAYED, "or it would be carried out twice"
    host.pass_(49)
    assert journal.forget() == 0
    host.pass_(2)
    assert journal.forget() == 1


def test_a_clock_set_backwards_keeps_no_outcome_for_ever(journal: Journal, host: Host) -> None:
    finish(journal)
    host.day -= YEAR
    assert journal.forget() == 0 and journal.accept(ONE) is Accepted.REPLAYED
    host.pass_(101)
    assert journal.forget() == 1


def test_a_clock_that_is_set_wrong_and_right_again(journal: Journal, host: Host) -> None:
    finish(journal)
    for jump in (YEAR, -YEAR, -YEAR, YEAR):
        host.day += jump
        assert journal.forget() == 0
        host.pass_(1)
    assert journal.accept(ONE) is Accepted.REPLAYED
    host.pass_(101)
    assert journal.forget() == 1


def test_what_ended_while_the_clock_was_wrong_is_kept_as_long_as_the_rest(
    tmp_path: Path, journal: Journal, host: Host
) -> None:
    host.day += YEAR
    finish(journal)
    journal.close()
    host.day -= YEAR
    host.elapsed = 3.0  # it was started anew
    again = host.journal(tmp_path)
    assert again.forget() == 0 and again.accept(ONE) is Accepted.REPLAYED
    host.pass_(101)
    assert again.forget() == 1
    again.close()


def test_refused_messages_stay_as_long_as_they_are_to(tmp_path: Path, host: Host) -> None:
    journal = host.journal(tmp_path, keep_seconds=1000)
    refuse: Callable[[], None] = lambda: journal.quarantine(Raw(b"x", 1), MessageError("no"), None)  # noqa: E731
    refuse()
    journal.forget()
    host.day += YEAR
    refuse()
    journal.forget()
    assert [kept.seq for kept in journal.refused.all()] == [1, 2]
    host.day -= YEAR
    journal.forget()
    assert [kept.seq for kept in journal.refused.all()] == [1, 2]
    host.pass_(1001)
    journal.forget()
    assert journal.refused.all() == []
    journal.close()


def test_a_reply_that_is_tried_again_soon_does_not_wait_for_the_clock(journal: Journal, host: Host) -> None:
    journal.enqueue(Outgoing("", "replies.1", b""))
    journal.postpone(1.0, 1)
    assert journal.outbox() == []
    host.day -= YEAR
    assert [row.seq for row in journal.outbox()] == [1]


class Nobody:
    """A broker where nobody has the queue."""

    def send(self, messages: list[Outgoing], *, mandatory: bool) -> list[bool]:
        return [False] * len(messages)


def test_a_reply_is_given_up_for_how_often_it_was_tried(
    tmp_path: Path, journal: Journal, host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clock, "elapsed", lambda: host.elapsed)
    publisher = Publisher(f"filesystem://{tmp_path}/broker", journal, reply_seconds=3.0)
    journal.enqueue(Outgoing("", "replies.1", b"", "id-1"))
    host.day += YEAR  # or the broker was away for as long
    for _ in range(3):
        publisher._replies(Nobody(), journal.outbox())  # type: ignore[arg-type]
        assert journal.counts()["outbox"] == 1
        host.pass_(1.0)
    publisher._replies(Nobody(), journal.outbox())  # type: ignore[arg-type]
    journal.settle()
    assert journal.counts()["outbox"] == 0
    journal.enqueue(Outgoing("", "replies.1", b"", "id-2"))
    publisher._replies(Nobody(), journal.outbox())  # type: ignore[arg-type]
    journal.settle()
    assert journal.counts()["outbox"] == 0, "so long again its queue is gone"
    host.day -= YEAR
    host.elapsed += 4.0
    journal.enqueue(Outgoing("", "replies.1", b"", "id-3"))
    publisher._replies(Nobody(), journal.outbox())  # type: ignore[arg-type]
    assert journal.counts()["outbox"] == 1


@pytest.fixture
def rig(tmp_path: Path, host: Host, monkeypatch: pytest.MonkeyPatch) -> Rig:
    monkeypatch.setattr(clock, "elapsed", lambda: host.elapsed)
    return make_rig(tmp_path, now=lambda: host.day)


@pytest.mark.parametrize(
    ("jump", "passes", "code"), [(YEAR, 0, ""), (-YEAR, 0, ""), (-YEAR, 70, "instruction.deadline_exceeded")]
)
def test_the_deadline_of_what_was_begun_stays_where_it_is(
    rig: Rig, host: Host, monkeypatch: pytest.MonkeyPatch, jump: float, passes: float, code: str
) -> None:
    def boundary(name: str) -> None:
        if name == "create:build:done":
            host.day += jump
            host.pass_(passes)

    monkeypatch.setattr("agent.executor.boundary", boundary)
    args = {"name": "web", "memory_mib": 64, "kernel": str(rig.kernel)}
    reply = rig.run("create", args, deadline=host.day + 60)
    assert (reply.error or {"code": ""})["code"] == code
    assert len(rig.toolstack.list_domains()) == (0 if code else 1)
    rig.clean()


def test_a_lock_is_as_old_as_it_is(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    queues = Queues(["work"])
    queues.submit(Job("id-1", "domain", "work"))
    now, elapsed = time.time(), clock.elapsed()
    monkeypatch.setattr(time, "time", lambda: now - YEAR)
    monkeypatch.setattr(clock, "elapsed", lambda: elapsed + 7)
    (lock,) = queues.locks()
    assert 7.0 <= lock["seconds"] < 7.0 + 60


def test_a_folder_is_swept_by_how_long_the_agent_has_seen_it(
    tmp_path: Path, host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clock, "elapsed", lambda: host.elapsed)
    url = f"filesystem://{tmp_path}/broker"
    data = broker.folder(url) / "data"
    name = f"1_x.{broker.REPLY_PREFIX}a.msg"
    (data / name).write_bytes(b"{}")
    os.utime(data / name, (0, 0))
    consumer = Consumer(url, "node1", lambda *raws: None, lambda: 1, lambda exc: None)
    for seconds, there in ((0, True), (3599, True), (302, False)):
        host.elapsed += seconds
        consumer._sweep()
        assert (data / name).exists() is there


def test_a_damaged_file_from_the_future_does_not_wait_for_the_clock(tmp_path: Path) -> None:
    url = f"filesystem://{tmp_path}/broker"
    data = broker.folder(url) / "data"
    path = data / f"1_x.{wire.queue_name('node1')}.msg"
    path.write_bytes(b"{")
    os.utime(path, (time.time() + YEAR,) * 2)
    taken: list[Raw] = []
    consumer = Consumer(url, "node1", lambda *raws: taken.extend(raws), lambda: 1, lambda exc: None, poll_seconds=0.005)
    consumer.start()
    end = time.monotonic() + 30
    while not taken:
        assert time.monotonic() < end
        time.sleep(0.01)  # a poll with a deadline
    consumer.stop()
