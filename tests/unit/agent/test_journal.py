from __future__ import annotations

import dataclasses
import json
import sqlite3
import stat
import threading
from pathlib import Path

import pytest

from agent import oslo
from agent.errors import JournalCorrupt, JournalError, JournalNewer
from agent.journal import Accepted, Journal, Phase, StepState, Waiter, schema
from agent.wire import Instruction, Outgoing, Reply

ONE = Instruction("id-1", "create", "node1", {"name": "web"}, "replies.1", 99.0)


class Clock:
    def __init__(self) -> None:
        self.time = 1000.0

    def __call__(self) -> float:
        return self.time


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def journal(tmp_path: Path, clock: Clock) -> Journal:
    return Journal(tmp_path / "j.sqlite", clock, elapsed=clock)


def finished(ident: str = "id-1", **fields: object) -> Reply:
    return dataclasses.replace(Reply(ident, "node1", "create", {"x": 1}), **fields)


def test_the_file_is_private_and_synced(journal: Journal) -> None:
    assert stat.S_IMODE(journal.path.stat().st_mode) == 0o600
    with journal._read() as db:
        assert db.execute("PRAGMA journal_mode").fetchone()[0] == "wal"
        assert db.execute("PRAGMA synchronous").fetchone()[0] == 2


def test_everything_survives_closing(tmp_path: Path, journal: Journal, clock: Clock) -> None:
    node = journal.node_id()
    assert journal.accept(ONE) is Accepted.NEW
    journal.planned("id-1", {"steps": [{"step": "build"}]}, "uuid-1")
    journal.step("id-1", 0, "build", StepState.BEGUN)
    journal.take_claim("id-1", "uuid-1", 64, 2)
    journal.enqueue(Outgoing("", "q", b"hello", "c"))
    before = journal.entry("id-1")
    journal.close()
    again = Journal(tmp_path / "j.sqlite", clock, elapsed=clock)
    assert again.node_id() == node
    assert again.entry("id-1") == before and before is not None
    assert (before.phase, before.domain) == (Phase.RUNNING, "uuid-1")
    assert (before.steps[0].name, before.steps[0].state) == ("build", StepState.BEGUN)
    assert before.instruction == dataclasses.replace(ONE, reply_to="")
    assert again.unfinished() == ["id-1"]
    assert again.claims() == [("id-1", "uuid-1", 64, 2)]
    assert [row.body for row in again.outbox()] == [b"hello"]


def test_a_duplicate_is_never_new(journal: Journal) -> None:
    assert journal.accept(ONE) is Accepted.NEW
    assert journal.accept(ONE) is Accepted.RUNNING
    assert journal.accept(dataclasses.replace(ONE, reply_to="replies.2")) is Accepted.RUNNING
    assert journal.accept(dataclasses.replace(ONE, args={"name": "other"})) is Accepted.REUSED
    journal.finish(finished(), 100)
    assert sorted(row.routing_key for row in journal.outbox()) == ["replies.1", "replies.2"]
    for row in journal.outbox():
        journal.published(row.seq)
    assert journal.accept(dataclasses.replace(ONE, reply_to="replies.3")) is Accepted.REPLAYED
    (row,) = journal.outbox()
    assert row.routing_key == "replies.3" and Reply.from_json(json.loads(row.body)) == finished()
    assert journal.accept(dataclasses.replace(ONE, reply_to="")) is Accepted.REPLAYED
    assert len(journal.outbox()) == 1


def test_every_correlation_gets_its_reply(journal: Journal) -> None:
    for correlation in ("a", "b", "a"):
        journal.accept(dataclasses.replace(ONE, correlation=correlation))
    journal.finish(finished(), 100)
    journal.accept(dataclasses.replace(ONE, correlation="c"))
    assert sorted(row.correlation_id for row in journal.outbox()) == ["a", "b", "c"]


def test_finish_gives_the_claim_back_and_closes_the_row(journal: Journal) -> None:
    journal.accept(ONE)
    journal.take_claim("id-1", "uuid-1", 64, 2)
    journal.undoing("id-1", {"code": "x.y", "message": "m", "retryable": False})
    entry = journal.entry("id-1")
    assert entry is not None and entry.phase is Phase.UNDOING and entry.error is not None
    journal.finish(finished(result=None, error={"code": "x.y"}), 100)
    entry = journal.entry("id-1")
    assert entry is not None and entry.phase is Phase.FAILED
    assert journal.counts() == {"unfinished": 0, "outbox": 1, "claims": 0, "quarantine": 0}


def test_step_lines_add_up(journal: Journal) -> None:
    journal.accept(ONE)
    journal.step("id-1", 0, "build", StepState.BEGUN)
    journal.step("id-1", 0, "build", StepState.DONE, {"domid": 3}, 1.5)
    journal.step("id-1", 0, "build", StepState.UNDONE)
    entry = journal.entry("id-1")
    assert entry is not None
    (record,) = entry.steps
    assert (record.state, record.output, record.seconds) == (StepState.UNDONE, {"domid": 3}, 1.5)


def test_old_answers_are_forgotten_but_nothing_unfinished(journal: Journal, clock: Clock) -> None:
    journal.accept(ONE)
    journal.accept(dataclasses.replace(ONE, id="id-2"))
    journal.finish(finished(), 100)
    clock.time += 99
    assert journal.forget() == 0
    clock.time += 2
    assert journal.forget() == 1
    assert journal.entry("id-1") is None and journal.unfinished() == ["id-2"]
    assert journal.accept(ONE) is Accepted.NEW


def test_outbox_keeps_order_and_postpones(journal: Journal, clock: Clock) -> None:
    for name in "abc":
        journal.enqueue(Outgoing("", name, b""))
    first = journal.outbox()[0]
    journal.postpone(10, first.seq)
    assert [row.routing_key for row in journal.outbox()] == ["b", "c"]
    clock.time += 11
    assert [(row.routing_key, row.attempts) for row in journal.outbox()] == [("a", 1), ("b", 0), ("c", 0)]


@pytest.mark.parametrize("damage", ["text", "middle"])
def test_a_damaged_file_is_refused_and_kept(tmp_path: Path, journal: Journal, damage: str) -> None:
    for number in range(50):
        journal.accept(dataclasses.replace(ONE, id=f"id-{number}", args={"text": "y" * 500}))
    journal.close()
    path = tmp_path / "j.sqlite"
    data = bytearray(path.read_bytes())
    if damage == "text":
        data[:] = b"this is no database at all, but it is long enough to look like a file " * 100
    else:
        data[4096:-4096] = b"\xa5" * (len(data) - 8192)
    path.write_bytes(data)
    with pytest.raises(JournalCorrupt, match="damaged") as caught:
        Journal(path)
    assert caught.value.code == "journal.corrupt" and not caught.value.retryable
    assert path.read_bytes() == bytes(data)


def test_a_newer_file_is_refused(tmp_path: Path, journal: Journal) -> None:
    journal.close()
    db = sqlite3.connect(tmp_path / "j.sqlite")
    db.execute(f"PRAGMA user_version={schema.VERSION + 1}")
    db.close()
    with pytest.raises(JournalNewer, match=f"version {schema.VERSION + 1}"):
        Journal(tmp_path / "j.sqlite")


def test_another_program_s_database_is_refused(tmp_path: Path) -> None:
    db = sqlite3.connect(tmp_path / "other.sqlite")
    db.execute("CREATE TABLE theirs (x)")
    db.close()
    with pytest.raises(JournalCorrupt, match="another program"):
        Journal(tmp_path / "other.sqlite")


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(JournalError, match="cannot be opened"):
        Journal(tmp_path / "file" / "j.sqlite")


def test_a_failing_file_is_a_retryable_error_and_changes_nothing(journal: Journal) -> None:
    pages = journal._db.execute("PRAGMA page_count").fetchone()[0]
    journal._db.execute(f"PRAGMA max_page_count={pages}")
    with pytest.raises(JournalError) as caught:
        journal.accept(dataclasses.replace(ONE, args={"text": "x" * 100000}))
    assert caught.value.code == "journal.unavailable" and caught.value.retryable
    assert journal.unfinished() == []
    journal._db.execute("PRAGMA max_page_count=1073741823")
    assert journal.accept(ONE) is Accepted.NEW


def test_a_locked_file_is_a_retryable_error(journal: Journal) -> None:
    other = sqlite3.connect(journal.path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    journal._db.execute("PRAGMA busy_timeout=50")
    with pytest.raises(JournalError, match="locked"):
        journal.accept(ONE)
    other.execute("ROLLBACK")
    other.close()
    assert journal.accept(ONE) is Accepted.NEW


def test_who_listens_and_what_the_sender_said_of_itself_survive(tmp_path: Path, journal: Journal) -> None:
    asked = dataclasses.replace(ONE, dialect=oslo.DIALECT, correlation="m1", heartbeat=5.0, context={"user": "u"})
    journal.accept(asked)
    journal.accept(dataclasses.replace(ONE, id="id-2"))
    journal.close()
    again = Journal(tmp_path / "j.sqlite")
    assert again.listeners() == [Waiter("id-1", "replies.1", oslo.DIALECT, "m1", 5.0)]
    entry = again.entry("id-1")
    assert entry is not None and entry.instruction.context == {"user": "u"}
    again.finish(finished(), 60)
    assert again.listeners() == []
    (row,) = again.outbox()
    assert json.loads(json.loads(row.body)["oslo.message"])["_msg_id"] == "m1"


def test_a_journal_of_version_1_is_brought_up_to_date(tmp_path: Path) -> None:
    path = tmp_path / "old.sqlite"
    db = sqlite3.connect(path)
    old = schema.DDL.replace(",\n    context TEXT,\n    cancelled REAL", "").replace(
        "    heartbeat REAL NOT NULL DEFAULT 0,\n", ""
    )
    old = old.replace(",\n    envelope TEXT NOT NULL DEFAULT '{}'", "")
    db.executescript(f"{old} PRAGMA application_id={schema.APPLICATION_ID}; PRAGMA user_version=1;")
    db.execute(
        "INSERT INTO instructions (id, digest, verb, host, args, dialect, phase, received)"
        " VALUES ('id-1', ?, 'create', 'node1', '{\"name\": \"web\"}', 'reeve/1.0', 'accepted', 1.0)",
        (ONE.digest,),
    )
    db.execute("INSERT INTO waiters VALUES ('id-1', 'replies.1', 'reeve/1.0', '')")
    db.execute("INSERT INTO quarantine VALUES (7, 1.0, 'message.not_json', 'why', 3, x'616263', '')")
    db.commit()
    db.close()
    journal = Journal(path)
    entry = journal.entry("id-1")
    assert entry is not None and entry.instruction.args == {"name": "web"} and entry.instruction.context == {}
    assert journal.accept(ONE) is Accepted.RUNNING
    journal.finish(finished(), 60)
    assert len(journal.outbox()) == 1
    (kept,) = journal.refused.all()
    assert (kept.seq, kept.raw.body, kept.whole) == (7, b"abc", False)  # its headers were not kept
    columns = {}
    for name, file in (("new", tmp_path / "new.sqlite"), ("old", path)):
        with Journal(file)._read() as reader:
            tables = [row[0] for row in reader.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
            columns[name] = {table: reader.execute(f"PRAGMA table_info({table})").fetchall() for table in tables}
            assert reader.execute("PRAGMA user_version").fetchone()[0] == schema.VERSION
    assert columns["new"] == columns["old"]


def test_readers_do_not_wait_for_a_writer(journal: Journal) -> None:
    entered, go_on = threading.Event(), threading.Event()

    def slow(_db: sqlite3.Connection) -> None:
        entered.set()
        assert go_on.wait(10)

    journal.accept(ONE)
    writer = threading.Thread(target=lambda: journal._write(slow))
    writer.start()
    assert entered.wait(10)
    assert journal.entry("id-1") is not None
    go_on.set()
    writer.join(10)


def test_what_was_sent_is_not_in_the_outbox_even_before_it_is_removed(journal: Journal) -> None:
    for number in range(3):
        journal.enqueue(Outgoing("", "q", b"%d" % number))
    first, second, third = journal.outbox()
    journal._db.execute("CREATE TEMP TRIGGER broken BEFORE DELETE ON outbox BEGIN SELECT RAISE(ABORT, 'no'); END")
    journal.published(first.seq)
    journal.settle()
    assert journal.counts()["outbox"] == 3, "it could not be removed"
    assert journal.outbox() == [second, third] and journal.outbox(limit=1) == [second]
    journal._db.execute("DROP TRIGGER broken")
    journal.published(second.seq)
    journal.settle()
    assert journal.outbox() == [third] and journal.counts()["outbox"] == 1


def test_an_outcome_that_is_stored_later(journal: Journal) -> None:
    journal.accept(ONE)
    told: list[Exception | None] = []
    journal.finish_later(finished(), 60, told.append)
    journal.settle()
    assert told == [None] and journal.counts()["outbox"] == 1
