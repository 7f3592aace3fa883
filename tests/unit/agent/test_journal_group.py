"""Group commit: many writers, few syncs, and each gets its own outcome."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.journal import group as group_module
from agent.journal.group import LARGEST_GROUP, GroupCommit


@pytest.fixture
def db(tmp_path: Path) -> Iterator[sqlite3.Connection]:
    made = sqlite3.connect(tmp_path / "db", isolation_level=None, check_same_thread=False)
    made.execute("CREATE TABLE t (n INTEGER PRIMARY KEY)")
    yield made
    made.close()


def insert(number: int) -> object:
    return lambda db: db.execute("INSERT INTO t VALUES (?)", (number,)).lastrowid


def rows(db: sqlite3.Connection) -> list[int]:
    return [row[0] for row in db.execute("SELECT n FROM t ORDER BY n")]


def together(group: GroupCommit, operations: list[object]) -> list[object]:
    """Run operations that all wait for the same commit; their results or exceptions."""
    outcomes: list[object] = [None] * len(operations)
    entered, go_on = threading.Event(), threading.Event()

    def hold(_db: sqlite3.Connection) -> None:
        entered.set()
        assert go_on.wait(10)

    def run(index: int) -> None:
        try:
            outcomes[index] = group.run(operations[index])  # type: ignore[arg-type]
        except Exception as exc:
            outcomes[index] = exc

    holder = threading.Thread(target=lambda: group.run(hold))
    holder.start()
    assert entered.wait(10)
    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(operations))]
    for number, thread in enumerate(threads, 1):
        thread.start()
        while len(group._waiting) < number:
            threading.Event().wait(0.001)
    go_on.set()
    for thread in (holder, *threads):
        thread.join(10)
    return outcomes


def test_alone_an_operation_is_a_transaction(db: sqlite3.Connection) -> None:
    group = GroupCommit(db)
    assert group.run(insert(3)) == 3  # type: ignore[arg-type]
    with pytest.raises(sqlite3.IntegrityError):
        group.run(insert(3))  # type: ignore[arg-type]
    assert rows(db) == [3] and not db.in_transaction


def test_those_who_wait_share_a_commit(db: sqlite3.Connection) -> None:
    group = GroupCommit(db)
    assert together(group, [insert(n) for n in range(1, 11)]) == list(range(1, 11))
    assert rows(db) == list(range(1, 11))
    assert (group.commits, group.operations) == (2, 11)


def test_one_that_fails_takes_no_other_along(db: sqlite3.Connection) -> None:
    def half(db: sqlite3.Connection) -> None:
        db.execute("INSERT INTO t VALUES (50)")
        raise ValueError("no")

    outcomes = together(GroupCommit(db), [insert(1), half, insert(1), insert(2)])
    assert isinstance(outcomes[1], ValueError) and isinstance(outcomes[2], sqlite3.IntegrityError)
    assert (outcomes[0], outcomes[3]) == (1, 2)
    assert rows(db) == [1, 2] and not db.in_transaction


def test_when_the_file_rolls_back_by_itself_nobody_is_told_of_success(db: sqlite3.Connection) -> None:
    def full(db: sqlite3.Connection) -> None:
        db.execute("ROLLBACK")  # as SQLite does by itself when the disk is full
        raise sqlite3.OperationalError("database or disk is full")

    outcomes = together(GroupCommit(db), [insert(1), full, insert(2)])
    assert [type(outcome) for outcome in outcomes] == [sqlite3.OperationalError] * 3
    assert rows(db) == []


def test_a_commit_that_fails_is_everybodys_failure(tmp_path: Path) -> None:
    class Refusing(sqlite3.Connection):
        def execute(self, sql: str, *values: object) -> sqlite3.Cursor:  # type: ignore[override]
            if sql == "COMMIT" and rows_of(self) > 1:
                raise sqlite3.OperationalError("disk I/O error")
            return super().execute(sql, *values)  # type: ignore[arg-type]

    def rows_of(db: sqlite3.Connection) -> int:
        return int(sqlite3.Connection.execute(db, "SELECT count(*) FROM t").fetchone()[0])

    db = sqlite3.connect(tmp_path / "db", isolation_level=None, check_same_thread=False, factory=Refusing)
    db.execute("CREATE TABLE t (n INTEGER PRIMARY KEY)")
    group = GroupCommit(db)
    outcomes = together(group, [insert(1), insert(2)])
    assert [type(outcome) for outcome in outcomes] == [sqlite3.OperationalError] * 2
    assert rows(db) == [] and not db.in_transaction
    assert group.run(insert(1)) == 1  # type: ignore[arg-type]
    group.close()


def test_a_group_is_bounded(db: sqlite3.Connection) -> None:
    group = GroupCommit(db)
    count = LARGEST_GROUP + 10
    assert len(set(map(str, together(group, [insert(n) for n in range(count)])))) == count
    assert group.commits == 3


def test_nobody_waits_for_what_comes_later(db: sqlite3.Connection) -> None:
    group, told = GroupCommit(db), []
    done = threading.Event()

    def callback(error: BaseException | None) -> None:
        told.append((type(error), db.in_transaction))
        if len(told) == 2:
            done.set()

    group.later(insert(1), callback)  # type: ignore[arg-type]
    group.later(insert(1), callback)  # type: ignore[arg-type]
    assert done.wait(10)
    assert told == [(type(None), False), (sqlite3.IntegrityError, False)] and rows(db) == [1]
    group.close()


def test_what_is_not_urgent_goes_with_the_next_commit_or_soon(
    db: sqlite3.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(group_module, "LAZY_SECONDS", 3600)
    group, told = GroupCommit(db), threading.Event()
    group.later(insert(1), lambda error: told.set(), urgent=False)  # type: ignore[arg-type]
    assert group.run(insert(2)) == 2 and told.is_set() and group.commits == 1  # type: ignore[arg-type]
    group.later(insert(3), lambda error: None, urgent=False)  # type: ignore[arg-type]
    group._closing = True
    group._urgent.set()
    assert group._thread is not None
    group._thread.join(10)
    assert rows(db) == [1, 2, 3], "closing commits what waits"


def test_lazy_operations_are_not_forgotten(db: sqlite3.Connection, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(group_module, "LAZY_SECONDS", 0.01)
    group, told = GroupCommit(db), threading.Event()
    group.later(insert(1), lambda error: told.set(), urgent=False)  # type: ignore[arg-type]
    assert told.wait(10)
    group.close()


def test_a_mistake_in_a_callback_stops_nobody(db: sqlite3.Connection) -> None:
    group, told = GroupCommit(db), threading.Event()
    group.later(insert(1), lambda error: 1 / 0)  # type: ignore[arg-type,return-value]
    group.later(insert(2), lambda error: told.set())  # type: ignore[arg-type]
    assert told.wait(10) and rows(db) == [1, 2]
    group.close()
