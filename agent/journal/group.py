"""Group commit: writers that come while another one syncs the disk are committed together, with one sync.

There is no thread for it. Who finds the file free commits what waits, its own operation included; who finds it
busy waits, and then either is done already or is the next to commit. Alone it is one transaction per operation.
"""

from __future__ import annotations

import collections
import contextlib
import sqlite3
import threading
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")

LARGEST_GROUP = 256


class _Waiting:
    __slots__ = ("done", "error", "operation", "result")

    def __init__(self, operation: Callable[[sqlite3.Connection], Any]) -> None:
        self.operation = operation
        self.done = False
        self.result: Any = None
        self.error: BaseException | None = None


class GroupCommit:
    """Write transactions of one connection, from any thread.

    :ivar commits: how many were made, `operations` what they held.
    """

    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db
        self._lock = threading.Lock()
        self._waiting: collections.deque[_Waiting] = collections.deque()
        self.commits = 0
        self.operations = 0

    def run(self, operation: Callable[[sqlite3.Connection], T]) -> T:
        """Run `operation` in a transaction; when this returns it is durable, when it raises nothing of it is left.

        :raises sqlite3.Error: the file's failure. Whatever else `operation` raises comes through.
        """
        mine = _Waiting(operation)
        self._waiting.append(mine)
        with self._lock:
            while not mine.done:
                self._commit()
        if mine.error is not None:
            raise mine.error
        result: T = mine.result
        return result

    def close(self) -> None:
        """Close the connection once no transaction is under way."""
        with self._lock:
            self._db.close()

    def _commit(self) -> None:
        group = [self._waiting.popleft() for _ in range(min(len(self._waiting), LARGEST_GROUP))]
        try:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                for item in group:
                    self._attempt(item, alone=len(group) == 1)
                self._db.execute("COMMIT")
            except BaseException:
                with contextlib.suppress(sqlite3.Error):
                    self._db.execute("ROLLBACK")
                raise
        except BaseException as exc:
            for item in group:
                item.error = item.error or exc
            if not isinstance(exc, Exception):
                raise
        finally:
            self.commits += 1
            self.operations += len(group)
            for item in group:
                item.done = True

    def _attempt(self, item: _Waiting, *, alone: bool) -> None:
        """One operation; if it fails the others of its group stay. :raises sqlite3.Error: the whole group is gone."""
        if alone:
            item.result = item.operation(self._db)
            return
        self._db.execute("SAVEPOINT one")
        try:
            item.result = item.operation(self._db)
        except Exception as exc:
            item.error = exc
            # A full disk, for one, makes SQLite roll back everything by itself.
            if not self._db.in_transaction:
                raise
            self._db.execute("ROLLBACK TO one")
        self._db.execute("RELEASE one")
