"""The journal: every method is one transaction, durable when it returns.

It is safe to call from several threads; those that write at the same time share one sync of the disk
(`agent.journal.group`). A failure of the file is a `JournalError`; nothing was changed then.
"""

from __future__ import annotations

import contextlib
import json
import logging
import sqlite3
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from agent import clock, dialects, wire
from agent.errors import AgentError
from agent.journal import schema
from agent.journal.failures import translated
from agent.journal.group import GroupCommit
from agent.journal.quarantine import LIMITS, Limits, Quarantine
from agent.journal.records import Accepted, Entry, OutboxRow, Phase, Refused, StepState, Waiter
from agent.journal.retention import Retention
from agent.journal.rows import put, put_waiter, read_counts, read_entry, read_outbox, read_outcome

LOG = logging.getLogger(__name__)

T = TypeVar("T")


class Journal:
    """:param path: the SQLite file; made when missing.

    :param now: the time of day. :param elapsed: a clock that nobody sets.
    :param limits: of the quarantine. :ivar refused: the quarantine itself.
    :raises JournalCorrupt, JournalNewer, JournalError: see `agent.journal.schema.open_file`.
    """

    def __init__(
        self,
        path: Path,
        now: Callable[[], float] = time.time,
        limits: Limits = LIMITS,
        elapsed: Callable[[], float] = clock.elapsed,
    ) -> None:
        self.path = path
        self._now = now
        self._retention = Retention(now, elapsed)
        self._db = schema.open_file(path)
        self._group = GroupCommit(self._db)
        # Readers have a connection of their own: they need not wait for the disk.
        self._reader = schema.open_reader(path)
        self._lock = threading.RLock()
        self.refused = Quarantine(self._write, self._read, now, limits)
        self._sent: set[int] = set()  # rows of the outbox that are only waiting to be removed

    def close(self) -> None:
        self._group.close()
        with self._lock:
            self._reader.close()

    @property
    def trouble(self) -> str:
        """Why the file took nothing when it was last written to, in one line; "" while it does."""
        failure = self._group.failure
        return "" if failure is None else str(translated(failure, self.path))

    def probe(self) -> None:
        """Write something: see whether `trouble` is over. :raises JournalError: it is not."""
        self._execute("INSERT OR REPLACE INTO meta VALUES ('probed', ?)", (repr(self._now()),))

    def node_id(self) -> str:
        """This node's identity, made once: what marks a domain as ours (a hostname may change)."""

        def operation(db: sqlite3.Connection) -> str:
            db.execute("INSERT OR IGNORE INTO meta VALUES ('node_id', ?)", (str(uuid.uuid4()),))
            return str(db.execute("SELECT value FROM meta WHERE key = 'node_id'").fetchone()[0])

        return self._write(operation)

    # Instructions

    def accept(self, instruction: wire.Instruction) -> Accepted:
        """Make one instruction durable; see `take_in`."""
        (outcome,) = self.take_in([instruction])
        assert outcome is not None
        return outcome

    def take_in(self, items: Sequence[wire.Instruction | wire.Outgoing | Refused]) -> list[Accepted | None]:
        """Make what came durable, with one sync; afterwards the messages may be acknowledged.

        :param items: instructions, answers that need no instruction, and messages that were refused.
        :returns: what became of each instruction, None for the others.
        """

        def operation(db: sqlite3.Connection) -> list[Accepted | None]:
            outcomes: list[Accepted | None] = []
            for item in items:
                if isinstance(item, wire.Instruction):
                    outcomes.append(self._accept(db, item))
                    continue
                if isinstance(item, Refused):
                    self.refused.put(db, item)
                    if item.reply is not None:
                        self._enqueue(db, item.reply)
                else:
                    self._enqueue(db, item)
                outcomes.append(None)
            return outcomes

        return self._write(operation)

    def _accept(self, db: sqlite3.Connection, instruction: wire.Instruction) -> Accepted:
        digest = instruction.digest
        new = db.execute(
            "INSERT INTO instructions (id, digest, verb, host, args, dialect, deadline, phase, received, context)"
            " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (id) DO NOTHING",
            (
                instruction.id,
                digest,
                instruction.verb,
                instruction.host,
                json.dumps(instruction.args),
                instruction.dialect,
                instruction.deadline,
                Phase.ACCEPTED,
                self._now(),
                json.dumps(instruction.context) if instruction.context else None,
            ),
        ).rowcount
        if new:
            put_waiter(db, instruction)
            return Accepted.NEW
        row = db.execute("SELECT digest, finished FROM instructions WHERE id = ?", (instruction.id,)).fetchone()
        known, finished = row
        if known != digest:
            return Accepted.REUSED
        if finished is None:
            put_waiter(db, instruction)
            return Accepted.RUNNING
        if instruction.reply_to and (stored := read_outcome(db, instruction.id)) is not None:
            self._enqueue(
                db,
                dialects.encode_reply(stored, instruction.reply_to, instruction.dialect, instruction.correlation),
            )
        return Accepted.REPLAYED

    def entry(self, ident: str) -> Entry | None:
        with self._read() as db:
            return read_entry(db, ident)

    def unfinished(self) -> list[str]:
        """Ids of the instructions not yet finished, in the order they came."""
        with self._read() as db:
            rows = db.execute("SELECT id FROM instructions WHERE finished IS NULL ORDER BY seq").fetchall()
        return [row[0] for row in rows]

    def listeners(self) -> list[Waiter]:
        """Those who wait for an instruction that is not finished and want to hear that it is still under way."""
        with self._read() as db:
            rows = db.execute(
                "SELECT id, reply_to, dialect, correlation, heartbeat FROM waiters WHERE heartbeat > 0"
            ).fetchall()
        return [Waiter(*row) for row in rows]

    def planned(self, ident: str, plan: Mapping[str, Any], domain: str, notices: Sequence[wire.Outgoing] = ()) -> None:
        """:param notices: messages that tell of it, for the outbox."""
        row = (json.dumps(plan), domain, Phase.RUNNING, ident)

        def operation(db: sqlite3.Connection) -> None:
            db.execute("UPDATE instructions SET plan = ?, domain = ?, phase = ? WHERE id = ?", row)
            self._enqueue(db, *notices)

        self._write(operation)

    def step(
        self,
        ident: str,
        index: int,
        name: str,
        state: StepState,
        output: Mapping[str, Any] | None = None,
        seconds: float = 0.0,
    ) -> None:
        """One line of the step log; a step's later lines replace its state and add to its time."""
        self._execute(
            "INSERT INTO steps VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT (id, idx) DO UPDATE SET"
            " state = excluded.state, output = coalesce(excluded.output, output),"
            " seconds = seconds + excluded.seconds",
            (ident, index, name, state, None if output is None else json.dumps(output), seconds),
        )

    def undoing(self, ident: str, error: Mapping[str, Any], failed: int | None = None) -> None:
        """The instruction has failed with `error` and is taken back; `failed` is the index of the step that did."""

        def operation(db: sqlite3.Connection) -> None:
            db.execute(
                "UPDATE instructions SET phase = ?, error = ? WHERE id = ?", (Phase.UNDOING, json.dumps(error), ident)
            )
            if failed is not None:
                db.execute("UPDATE steps SET state = ? WHERE id = ? AND idx = ?", (StepState.FAILED, ident, failed))

        self._write(operation)

    def cancel(self, ident: str) -> None:
        """Note that an instruction is not wanted any more; no effect on one that has ended."""
        self._execute("UPDATE instructions SET cancelled = ? WHERE id = ? AND finished IS NULL", (self._now(), ident))

    def outcome(self, ident: str) -> wire.Reply | None:
        """What a finished instruction came to."""
        with self._read() as db:
            return read_outcome(db, ident)

    def forward(self, ident: str) -> None:
        """The instruction cannot be taken back any more: it goes on."""
        self._execute("UPDATE instructions SET phase = ?, error = NULL WHERE id = ?", (Phase.RUNNING, ident))

    def finish(self, reply: wire.Reply, keep_seconds: float, notices: Sequence[wire.Outgoing] = ()) -> None:
        """Store the outcome, give back its claim and queue the reply for everyone who asked: one transaction.

        :param keep_seconds: how long the same id gets this answer again.
        :param notices: messages that tell of it, for the outbox.
        """
        self._write(self._finish(reply, keep_seconds, notices))

    def finish_later(
        self,
        reply: wire.Reply,
        keep_seconds: float,
        done: Callable[[Exception | None], None],
        notices: Sequence[wire.Outgoing] = (),
    ) -> None:
        """The same without waiting for the disk. :param done: called in some thread; None: it is durable now."""
        self._group.later(
            self._finish(reply, keep_seconds, notices),
            lambda exc: done(None if exc is None else translated(exc, self.path)),
        )

    def settle(self) -> None:
        """Wait until everything begun before is durable."""
        self._write(lambda db: None)

    def _finish(
        self, reply: wire.Reply, keep_seconds: float, notices: Sequence[wire.Outgoing]
    ) -> Callable[[sqlite3.Connection], None]:
        phase = Phase.DONE if reply.ok else Phase.FAILED
        error = None if reply.error is None else json.dumps(reply.error)
        row = (phase, error, json.dumps(reply.to_json()), self._now(), self._now() + keep_seconds, reply.id)

        def operation(db: sqlite3.Connection) -> None:
            db.execute(
                "UPDATE instructions SET phase = ?, error = ?, reply = ?, finished = ?, expires = ? WHERE id = ?", row
            )
            db.execute("DELETE FROM claims WHERE id = ?", (reply.id,))
            waiters = db.execute(
                "DELETE FROM waiters WHERE id = ? RETURNING reply_to, dialect, correlation", (reply.id,)
            ).fetchall()
            for reply_to, dialect, correlation in waiters:
                self._enqueue(db, dialects.encode_reply(reply, reply_to, dialect, correlation))
            self._enqueue(db, *notices)

        return operation

    def forget(self) -> int:
        """Drop finished instructions and refused messages whose time to keep has passed; how many of the former."""
        count = self._retention.sweep(self._write)
        self._write(self.refused.sweep)
        return count

    # Claims

    def take_claim(self, ident: str, domain: str, memory_mib: int, vcpus: int) -> None:
        self._execute("INSERT OR REPLACE INTO claims VALUES (?, ?, ?, ?)", (ident, domain, memory_mib, vcpus))

    def release_claim(self, ident: str) -> None:
        self._execute("DELETE FROM claims WHERE id = ?", (ident,))

    def claims(self) -> list[tuple[str, str, int, int]]:
        """(instruction, domain, MiB, vCPUs) of every claim."""
        with self._read() as db:
            return db.execute("SELECT id, domain, memory_mib, vcpus FROM claims ORDER BY id").fetchall()

    # Messages that are no instructions

    def quarantine(self, raw: wire.Raw, why: AgentError, reply: wire.Outgoing | None) -> None:
        """Keep a refused message with the reason, and queue the answer to its sender."""
        self.take_in([Refused(raw, why, reply)])

    def release(self, seq: int, item: wire.Instruction | wire.Outgoing | None) -> Accepted | None:
        """Take in a message of the quarantine after all, and take it out of there, in one transaction.

        :param item: what was made of it. :returns: what became of the instruction; it stays where it is `REUSED`.
        :raises KeyError: it is not there any more, and nothing was taken in.
        """

        def operation(db: sqlite3.Connection) -> Accepted | None:
            if db.execute("SELECT 1 FROM quarantine WHERE seq = ?", (seq,)).fetchone() is None:
                raise KeyError(seq)
            outcome = None
            if isinstance(item, wire.Instruction):
                outcome = self._accept(db, item)
            elif item is not None:
                self._enqueue(db, item)
            if outcome is not Accepted.REUSED:
                db.execute("DELETE FROM quarantine WHERE seq = ?", (seq,))
            return outcome

        return self._write(operation)

    # Outbox

    def enqueue(self, message: wire.Outgoing) -> None:
        self.take_in([message])

    def remember(self, key: str, value: str | None, messages: Sequence[wire.Outgoing] = ()) -> None:
        """Keep a note of the agent's own (None: leave it as it is), and queue messages along with it."""

        def operation(db: sqlite3.Connection) -> None:
            if value is not None:
                db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, value))
            self._enqueue(db, *messages)

        self._write(operation)

    def recall(self, key: str) -> str | None:
        with self._read() as db:
            row = db.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
        return None if row is None else str(row[0])

    def outbox(self, limit: int = 100) -> list[OutboxRow]:
        """What is due to be published, oldest first: also what a clock that was set back has put off."""
        with self._read() as db:
            rows = read_outbox(db, self._now(), limit + len(self._sent))
            return [row for row in rows if row.seq not in self._sent][:limit]

    def published(self, *seqs: int) -> None:
        """The broker has confirmed them, or nobody will ever take them: `outbox` has them no more.

        On the disk they go with the next transaction. If the agent dies before, they are sent again.
        """
        if not seqs:
            return
        with self._lock:
            self._sent.update(seqs)
            gone = [(seq,) for seq in self._sent]  # also those that could not be removed last time

        def removed(exc: BaseException | None) -> None:
            if exc is not None:
                LOG.warning("replies that were sent stay in the journal for now: %s", exc)
                return
            with self._lock:
                self._sent.difference_update(row[0] for row in gone)

        self._group.later(lambda db: db.executemany("DELETE FROM outbox WHERE seq = ?", gone), removed, urgent=False)

    def postpone(self, seconds: float, *seqs: int) -> None:
        """:param seconds: up to `agent.journal.rows.LONGEST_PAUSE`."""
        rows = [(self._now() + seconds, seq) for seq in seqs]
        statement = "UPDATE outbox SET attempts = attempts + 1, not_before = ? WHERE seq = ?"
        if rows:
            self._write(lambda db: db.executemany(statement, rows))

    def counts(self) -> dict[str, int]:
        """Rows that matter for health: ``unfinished``, ``outbox``, ``claims``, ``quarantine``."""
        with self._read() as db:
            return read_counts(db)

    def _enqueue(self, db: sqlite3.Connection, *messages: wire.Outgoing) -> None:
        put(db, messages, self._now())

    def _execute(self, statement: str, values: Sequence[Any]) -> int:
        """One statement as a transaction; how many rows it changed."""
        return self._write(lambda db: db.execute(statement, values).rowcount)

    def _write(self, operation: Callable[[sqlite3.Connection], T]) -> T:
        with self._errors():
            return self._group.run(operation)

    @contextlib.contextmanager
    def _read(self) -> Iterator[sqlite3.Connection]:
        with self._lock, self._errors():
            yield self._reader

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as exc:
            raise translated(exc, self.path) from exc
