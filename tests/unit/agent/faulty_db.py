"""A journal whose file fails as a disk does: SQLite's own connection, which refuses what writes while it is told to."""

from __future__ import annotations

import sqlite3
import threading
from typing import Any

import pytest

from agent.journal import schema

_WRITES = ("INSERT", "UPDATE", "DELETE")


class Disk:
    """:ivar failing: the message and code of SQLite's error for whatever writes, or None.

    :ivar refused: how often it has been.
    """

    def __init__(self) -> None:
        self.failing: tuple[str, int] | None = None
        self.refused = 0
        self.came = threading.Condition()

    def full(self) -> None:
        self.failing = ("database or disk is full", sqlite3.SQLITE_FULL)

    def broken(self) -> None:
        self.failing = ("disk I/O error", sqlite3.SQLITE_IOERR_WRITE)

    def well(self) -> None:
        self.failing = None

    def check(self, db: sqlite3.Connection, statement: str) -> None:
        if self.failing is None or not statement.lstrip().upper().startswith(_WRITES):
            return
        message, code = self.failing
        if db.in_transaction and code == sqlite3.SQLITE_FULL:
            sqlite3.Connection.execute(db, "ROLLBACK")  # SQLite does it by itself then
        with self.came:
            self.refused += 1
            self.came.notify_all()
        error = sqlite3.OperationalError(message)
        error.sqlite_errorcode = code
        raise error

    def until_refused(self, times: int) -> None:
        """Wait until it has refused so often since now."""
        with self.came:
            end = self.refused + times
            assert self.came.wait_for(lambda: self.refused >= end, 30)


def use_faulty_disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    """What every journal has that is opened from now on."""
    disk = Disk()

    class Faulty(sqlite3.Connection):
        def execute(self, statement: str, *values: Any) -> sqlite3.Cursor:  # type: ignore[override]
            disk.check(self, statement)
            return super().execute(statement, *values)

        def executemany(self, statement: str, *values: Any) -> sqlite3.Cursor:  # type: ignore[override]
            disk.check(self, statement)
            return super().executemany(statement, *values)

    real = sqlite3.connect

    def connect(*args: Any, **options: Any) -> sqlite3.Connection:
        return real(*args, factory=Faulty, **options)

    monkeypatch.setattr(schema.sqlite3, "connect", connect)
    return disk
