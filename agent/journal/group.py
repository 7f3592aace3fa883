"""Group commit: writers that come while another one syncs the disk are committed together, with one sync.

Who finds the file free commits what waits, its own operation included; who finds it busy waits, and then either is
done already or is the next to commit. Alone it is one transaction per operation. Operations that nobody waits for
are committed by a thread of their own, or along with others.
"""

from __future__ import annotations

import collections
import contextlib
import logging
import sqlite3
import threading
from collections.abc import Callable
from typing import Any, TypeVar

LOG = logging.getLogger(__name__)

T = TypeVar("T")

LARGEST_GROUP = 256
LAZY_SECONDS = 0.05
CLOSE_SECONDS = 30.0


class _Waiting:
    __slots__ = ("callback", "done", "error", "operation", "result")

    def __init__(
        self,
        operation: Callable[[sqlite3.Connection], Any],
        callback: Callable[[BaseException | None], None] | None = None,
    ) -> None:
        self.operation = operation
        self.callback = callback
        self.done = False
        self.result: Any = None
        self.error: BaseException | None = None


class GroupCommit:
    """Write transactions of one connection, from any thread.

    :ivar commits: how many were made, `operations` what they held.
    :ivar failure: why the last one could not be written; None again when something has been.
    """

    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db
        self._lock = threading.Lock()
        self._waiting: collections.deque[_Waiting] = collections.deque()
        self._wake = threading.Event()
        self._urgent = threading.Event()
        self._closing = False
        self._thread: threading.Thread | None = None
        self.commits = 0
        self.operations = 0
        self.failure: sqlite3.Error | None = None

    def run(self, operation: Callable[[sqlite3.Connection], T]) -> T:
        """Run `operation` in a transaction; when this returns it is durable, when it raises nothing of it is left.

        It may be run twice (what the first run did is rolled back then), so it changes nothing but the database.

        :raises sqlite3.Error: the file's failure. Whatever else `operation` raises comes through.
        """
        mine = _Waiting(operation)
        self._waiting.append(mine)
        committed: list[_Waiting] = []
        try:
            with self._lock:
                while not mine.done:
                    committed += self._commit()
        finally:
            _call_back(committed)
        if mine.error is not None:
            raise mine.error
        result: T = mine.result
        return result

    def later(
        self,
        operation: Callable[[sqlite3.Connection], Any],
        callback: Callable[[BaseException | None], None],
        *,
        urgent: bool = True,
    ) -> None:
        """The same without waiting: `callback` is called in some thread when it is durable (None) or has failed.

        :param urgent: False lets it wait `LAZY_SECONDS` for others to be committed with.
        """
        self._waiting.append(_Waiting(operation, callback))
        if self._thread is None:
            with self._lock:
                if self._thread is None:
                    self._thread = threading.Thread(target=self._main, name="journal", daemon=True)
                    self._thread.start()
        if urgent:
            self._urgent.set()
        self._wake.set()

    def close(self) -> None:
        """Commit what waits, then close the connection."""
        self._closing = True
        self._urgent.set()
        self._wake.set()
        if self._thread is not None:
            self._thread.join(CLOSE_SECONDS)
        with self._lock:
            self._db.close()

    def _main(self) -> None:
        while True:
            self._wake.wait()
            self._wake.clear()
            self._urgent.wait(LAZY_SECONDS)
            self._urgent.clear()
            while self._waiting:
                with self._lock:
                    committed = self._commit() if self._waiting else []
                _call_back(committed)
            if self._closing:
                return

    def _commit(self) -> list[_Waiting]:
        """Commit what waits; those of it that are to be told."""
        group = [self._waiting.popleft() for _ in range(min(len(self._waiting), LARGEST_GROUP))]
        before = self._db.total_changes
        try:
            self._db.execute("BEGIN IMMEDIATE")  # whoever holds the file makes all of them wait: once, not twice
            try:
                self._fill(group, apart=False)
            except Exception:
                if len(group) == 1:
                    raise
                # Once more, each behind a savepoint: whose failure is it?
                self._db.execute("BEGIN IMMEDIATE")
                self._fill(group, apart=True)
        except BaseException as exc:
            for item in group:
                item.error = item.error or exc
            if not isinstance(exc, Exception):
                raise
        finally:
            self._look(group, wrote=self._db.total_changes != before)
            self.commits += 1
            self.operations += len(group)
            for item in group:
                item.done = True
        return [item for item in group if item.callback is not None]

    def _look(self, group: list[_Waiting], *, wrote: bool) -> None:
        """Note whether the file takes what is written. A transaction that changed nothing says nothing of it."""
        failed = next((item.error for item in group if isinstance(item.error, sqlite3.OperationalError)), None)
        if failed is not None or wrote:
            self.failure = failed

    def _fill(self, group: list[_Waiting], *, apart: bool) -> None:
        """Into the transaction that was begun, and end it."""
        try:
            for item in group:
                if apart:
                    self._attempt(item)
                else:
                    item.result = item.operation(self._db)
            self._db.execute("COMMIT")
        except BaseException:
            with contextlib.suppress(sqlite3.Error):
                self._db.execute("ROLLBACK")
            raise

    def _attempt(self, item: _Waiting) -> None:
        """One operation; if it fails the others of its group stay. :raises sqlite3.Error: the whole group is gone."""
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


def _call_back(items: list[_Waiting]) -> None:
    for item in items:
        assert item.callback is not None
        try:
            item.callback(item.error)
        except Exception:
            LOG.exception("a mistake in what follows a commit")
