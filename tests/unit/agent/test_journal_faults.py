"""The journal's file fails: what is said, what is left, and that it goes on when the fault is gone."""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest
from faulty_db import Disk, use_faulty_disk

from agent.errors import JournalCorrupt, JournalError
from agent.journal import Accepted, Journal, group, schema
from agent.wire import Instruction, Reply

ONE = Instruction("id-1", "create", "node1", {"name": "web"}, "replies.1")


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    return use_faulty_disk(monkeypatch)


@pytest.fixture
def journal(tmp_path: Path, disk: Disk) -> Iterator[Journal]:
    made = Journal(tmp_path / "j.sqlite")
    yield made
    made.close()


def line(error: JournalError) -> str:
    assert "\n" not in str(error)
    return str(error)


@pytest.mark.parametrize("fault", ["full", "broken"])
def test_while_the_disk_takes_nothing_it_says_so_and_afterwards_all_is_well(
    journal: Journal, disk: Disk, fault: str
) -> None:
    assert journal.accept(ONE) is Accepted.NEW and journal.trouble == ""
    getattr(disk, fault)()
    with pytest.raises(JournalError) as caught:
        journal.take_in([Instruction("id-2", "list", "node1", {}, ""), Instruction("id-3", "list", "node1", {}, "")])
    assert caught.value.code == "journal.unavailable" and caught.value.retryable
    assert ("make room on its disk" if fault == "full" else "disk's space and health") in line(caught.value)
    assert journal.trouble == line(caught.value)
    assert journal.unfinished() == ["id-1"], "it is read all the same"
    journal.settle()
    assert journal.trouble, "a transaction that writes nothing proves nothing"
    with pytest.raises(JournalError):
        journal.probe()
    disk.well()
    journal.probe()
    assert journal.trouble == ""
    assert journal.accept(Instruction("id-2", "list", "node1", {}, "")) is Accepted.NEW
    assert journal.accept(ONE) is Accepted.RUNNING


def test_what_is_refused_for_its_own_sake_is_no_trouble(journal: Journal) -> None:
    with pytest.raises(KeyError):
        journal.release(77, None)
    assert journal.trouble == ""


def test_a_lock_of_another_process_is_named_and_waited_for_once(journal: Journal) -> None:
    asked: list[str] = []
    journal._db.set_trace_callback(asked.append)
    journal._db.execute("PRAGMA busy_timeout=20")
    other = sqlite3.Connection(journal.path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    together = [group._Waiting(lambda db: db.execute("DELETE FROM claims"), lambda error: None) for _ in range(2)]
    with journal._group._lock:
        journal._group._waiting += together
        assert journal._group._commit() == together
    assert [type(item.error) for item in together] == [sqlite3.OperationalError] * 2
    assert asked.count("BEGIN IMMEDIATE") == 1, "whoever asks on their behalf waits once"
    assert "another process holds it" in journal.trouble and f"fuser {journal.path}" in journal.trouble
    other.execute("ROLLBACK")
    other.close()
    journal.probe()
    assert journal.trouble == "" and journal.accept(ONE) is Accepted.NEW


def test_a_file_that_is_held_at_the_start_is_explained(
    tmp_path: Path, journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal.close()
    monkeypatch.setattr(schema, "BUSY_SECONDS", 0.02)
    other = sqlite3.Connection(journal.path, isolation_level=None)
    other.execute("PRAGMA locking_mode=EXCLUSIVE")
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(JournalError, match="another process holds it: `fuser") as caught:
        Journal(journal.path)
    assert caught.value.retryable and line(caught.value)
    other.close()
    Journal(journal.path).close()


def _truncated(path: Path) -> None:
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size // 2)


def _overwritten(path: Path) -> None:
    with open(path, "r+b") as file:
        file.seek(100)
        file.write(b"\xa5" * 4000)


def _plan(path: Path) -> None:
    db = sqlite3.connect(path)
    db.execute("UPDATE instructions SET args = '{\"name\": ' WHERE id = 'id-1'")
    db.commit()
    db.close()


def _phase(path: Path) -> None:
    db = sqlite3.connect(path)
    db.execute("UPDATE instructions SET phase = 'danced' WHERE id = 'id-1'")
    db.commit()
    db.close()


@pytest.mark.parametrize("damage", [_truncated, _overwritten, _plan, _phase])
def test_damage_is_found_before_anything_is_done(journal: Journal, damage: object) -> None:
    for number in range(50):
        journal.accept(Instruction(f"id-{number}", "create", "node1", {"text": "y" * 500}, ""))
    journal.close()
    damage(journal.path)  # type: ignore[operator]
    with pytest.raises(JournalCorrupt, match="move it away") as caught:
        again = Journal(journal.path)
        try:
            for ident in again.unfinished():
                again.entry(ident)
        finally:
            again.close()
    assert not caught.value.retryable and line(caught.value)


def test_an_outcome_that_is_not_readable_is_damage(journal: Journal) -> None:
    journal.accept(ONE)
    journal.finish(Reply("id-1", "node1", "create", {}), 60)
    journal._db.execute("UPDATE instructions SET reply = '{'")
    for ask in (lambda: journal.outcome("id-1"), lambda: journal.accept(ONE)):
        with pytest.raises(JournalCorrupt, match="not readable"):
            ask()


def test_a_file_that_was_emptied_is_not_taken_for_a_new_one(tmp_path: Path, journal: Journal) -> None:
    journal.accept(ONE)
    left = tmp_path / "left"
    left.mkdir()
    shutil.copy(journal.path.with_name("j.sqlite-wal"), left / "j.sqlite-wal")  # as a kill leaves it
    (left / "j.sqlite").touch()
    before = (left / "j.sqlite-wal").read_bytes()
    with pytest.raises(JournalCorrupt, match=r"it is empty, but j\.sqlite-wal is not") as caught:
        Journal(left / "j.sqlite")
    assert line(caught.value) and (left / "j.sqlite-wal").read_bytes() == before != b""
