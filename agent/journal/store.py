"""The journal: every method is one transaction, durable when it returns.

It is safe to call from several threads. A failure of the file is a `JournalError`; nothing was changed then.
"""

from __future__ import annotations

import contextlib
import json
import logging
import sqlite3
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from agent import wire
from agent.errors import AgentError, JournalCorrupt, JournalError
from agent.journal import schema
from agent.journal.records import Accepted, Entry, OutboxRow, Phase, StepRecord, StepState

LOG = logging.getLogger(__name__)

QUARANTINE_BODY_BYTES = 4096
QUARANTINE_ROWS = 1000


class Journal:
    """:param path: the SQLite file; made when missing.

    :raises JournalCorrupt, JournalNewer, JournalError: see `agent.journal.schema.open_file`.
    """

    def __init__(self, path: Path, now: Callable[[], float] = time.time) -> None:
        self.path = path
        self._now = now
        self._lock = threading.RLock()
        self._db = schema.open_file(path)

    def close(self) -> None:
        with self._lock:
            self._db.close()

    def node_id(self) -> str:
        """This node's identity, made once: what marks a domain as ours (a hostname may change)."""
        with self._write() as db:
            db.execute("INSERT OR IGNORE INTO meta VALUES ('node_id', ?)", (str(uuid.uuid4()),))
            return str(db.execute("SELECT value FROM meta WHERE key = 'node_id'").fetchone()[0])

    # Instructions

    def accept(self, instruction: wire.Instruction) -> Accepted:
        """Make an instruction durable; afterwards its message may be acknowledged."""
        with self._write() as db:
            row = db.execute(
                "SELECT digest, finished, reply FROM instructions WHERE id = ?", (instruction.id,)
            ).fetchone()
            if row is None:
                db.execute(
                    "INSERT INTO instructions (id, digest, verb, host, args, dialect, deadline, phase, received)"
                    " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                    (
                        instruction.id,
                        instruction.digest,
                        instruction.verb,
                        instruction.host,
                        json.dumps(instruction.args),
                        instruction.dialect,
                        instruction.deadline,
                        Phase.ACCEPTED,
                        self._now(),
                    ),
                )
                self._wait(db, instruction)
                return Accepted.NEW
            digest, finished, reply = row
            if digest != instruction.digest:
                return Accepted.REUSED
            if finished is None:
                self._wait(db, instruction)
                return Accepted.RUNNING
            if instruction.reply_to:
                stored = wire.Reply.from_json(json.loads(reply))
                answer = wire.encode_reply(stored, instruction.reply_to, instruction.dialect, instruction.correlation)
                self._enqueue(db, answer)
            return Accepted.REPLAYED

    def entry(self, ident: str) -> Entry | None:
        with self._read() as db:
            row = db.execute(
                "SELECT seq, id, verb, host, args, dialect, deadline, domain, phase, plan, error, received"
                " FROM instructions WHERE id = ?",
                (ident,),
            ).fetchone()
            if row is None:
                return None
            steps = db.execute(
                "SELECT idx, name, state, output, seconds FROM steps WHERE id = ? ORDER BY idx", (ident,)
            ).fetchall()
        seq, ident, verb, host, args, dialect, deadline, domain, phase, plan, error, received = row
        return Entry(
            seq=seq,
            instruction=wire.Instruction(ident, verb, host, json.loads(args), "", deadline, dialect),
            domain=domain,
            phase=Phase(phase),
            plan=_load(plan),
            steps=tuple(StepRecord(s[0], s[1], StepState(s[2]), _load(s[3]), s[4]) for s in steps),
            error=_load(error),
            received=received,
        )

    def unfinished(self) -> list[str]:
        """Ids of the instructions not yet finished, in the order they came."""
        with self._read() as db:
            rows = db.execute("SELECT id FROM instructions WHERE finished IS NULL ORDER BY seq").fetchall()
        return [row[0] for row in rows]

    def planned(self, ident: str, plan: Mapping[str, Any], domain: str) -> None:
        with self._write() as db:
            db.execute(
                "UPDATE instructions SET plan = ?, domain = ?, phase = ? WHERE id = ?",
                (json.dumps(plan), domain, Phase.RUNNING, ident),
            )

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
        with self._write() as db:
            db.execute(
                "INSERT INTO steps VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT (id, idx) DO UPDATE SET"
                " state = excluded.state, output = coalesce(excluded.output, output),"
                " seconds = seconds + excluded.seconds",
                (ident, index, name, state, None if output is None else json.dumps(output), seconds),
            )

    def undoing(self, ident: str, error: Mapping[str, Any], failed: int | None = None) -> None:
        """The instruction has failed with `error` and is taken back; `failed` is the index of the step that did."""
        with self._write() as db:
            db.execute(
                "UPDATE instructions SET phase = ?, error = ? WHERE id = ?", (Phase.UNDOING, json.dumps(error), ident)
            )
            if failed is not None:
                db.execute("UPDATE steps SET state = ? WHERE id = ? AND idx = ?", (StepState.FAILED, ident, failed))

    def finish(self, reply: wire.Reply, keep_seconds: float) -> None:
        """Store the outcome, give back its claim and queue the reply for everyone who asked: one transaction.

        :param keep_seconds: how long the same id gets this answer again.
        """
        with self._write() as db:
            db.execute(
                "UPDATE instructions SET phase = ?, error = ?, reply = ?, finished = ?, expires = ? WHERE id = ?",
                (
                    Phase.DONE if reply.ok else Phase.FAILED,
                    None if reply.error is None else json.dumps(reply.error),
                    json.dumps(reply.to_json()),
                    self._now(),
                    self._now() + keep_seconds,
                    reply.id,
                ),
            )
            db.execute("DELETE FROM claims WHERE id = ?", (reply.id,))
            waiters = db.execute(
                "SELECT reply_to, dialect, correlation FROM waiters WHERE id = ?", (reply.id,)
            ).fetchall()
            for reply_to, dialect, correlation in waiters:
                self._enqueue(db, wire.encode_reply(reply, reply_to, dialect, correlation))
            db.execute("DELETE FROM waiters WHERE id = ?", (reply.id,))

    def forget(self) -> int:
        """Drop the finished instructions whose time to keep has passed; how many."""
        with self._write() as db:
            return db.execute("DELETE FROM instructions WHERE expires < ?", (self._now(),)).rowcount

    # Claims

    def take_claim(self, ident: str, domain: str, memory_mib: int, vcpus: int) -> None:
        with self._write() as db:
            db.execute("INSERT OR REPLACE INTO claims VALUES (?, ?, ?, ?)", (ident, domain, memory_mib, vcpus))

    def release_claim(self, ident: str) -> None:
        with self._write() as db:
            db.execute("DELETE FROM claims WHERE id = ?", (ident,))

    def claims(self) -> list[tuple[str, str, int, int]]:
        """(instruction, domain, MiB, vCPUs) of every claim."""
        with self._read() as db:
            return db.execute("SELECT id, domain, memory_mib, vcpus FROM claims ORDER BY id").fetchall()

    # Messages that are no instructions

    def quarantine(self, raw: wire.Raw, why: AgentError, reply: wire.Outgoing | None) -> None:
        """Keep a refused message (its beginning) with the reason, and queue the answer to its sender."""
        with self._write() as db:
            db.execute(
                "INSERT INTO quarantine (received, code, reason, size, body, reply_to) VALUES (?, ?, ?, ?, ?, ?)",
                (
                    self._now(),
                    why.code,
                    why.message,
                    max(raw.size, len(raw.body)),
                    raw.body[:QUARANTINE_BODY_BYTES],
                    reply.routing_key if reply else "",
                ),
            )
            db.execute("DELETE FROM quarantine WHERE seq <= (SELECT max(seq) FROM quarantine) - ?", (QUARANTINE_ROWS,))
            if reply is not None:
                self._enqueue(db, reply)

    def quarantined(self) -> list[dict[str, Any]]:
        names = ("seq", "received", "code", "reason", "size", "body", "reply_to")
        with self._read() as db:
            rows = db.execute(f"SELECT {', '.join(names)} FROM quarantine ORDER BY seq").fetchall()
        return [dict(zip(names, row, strict=True)) for row in rows]

    # Outbox

    def enqueue(self, message: wire.Outgoing) -> None:
        with self._write() as db:
            self._enqueue(db, message)

    def outbox(self, limit: int = 100) -> list[OutboxRow]:
        """What is due to be published, oldest first."""
        with self._read() as db:
            rows = db.execute(
                "SELECT seq, exchange, routing_key, body, correlation_id, content_type, created, attempts"
                " FROM outbox WHERE not_before <= ? ORDER BY seq LIMIT ?",
                (self._now(), limit),
            ).fetchall()
        return [OutboxRow(*row) for row in rows]

    def published(self, seq: int) -> None:
        """The broker has confirmed it, or nobody will ever take it: forget the row."""
        with self._write() as db:
            db.execute("DELETE FROM outbox WHERE seq = ?", (seq,))

    def postpone(self, seq: int, seconds: float) -> None:
        with self._write() as db:
            db.execute(
                "UPDATE outbox SET attempts = attempts + 1, not_before = ? WHERE seq = ?", (self._now() + seconds, seq)
            )

    def counts(self) -> dict[str, int]:
        """Rows that matter for health: ``unfinished``, ``outbox``, ``claims``, ``quarantine``."""
        with self._read() as db:
            return {
                name: db.execute(f"SELECT count(*) FROM {what}").fetchone()[0]
                for name, what in (
                    ("unfinished", "instructions WHERE finished IS NULL"),
                    ("outbox", "outbox"),
                    ("claims", "claims"),
                    ("quarantine", "quarantine"),
                )
            }

    def _wait(self, db: sqlite3.Connection, instruction: wire.Instruction) -> None:
        if instruction.reply_to:
            db.execute(
                "INSERT OR IGNORE INTO waiters VALUES (?, ?, ?, ?)",
                (instruction.id, instruction.reply_to, instruction.dialect, instruction.correlation),
            )

    def _enqueue(self, db: sqlite3.Connection, message: wire.Outgoing) -> None:
        db.execute(
            "INSERT INTO outbox (exchange, routing_key, body, correlation_id, content_type, created)"
            " VALUES (?, ?, ?, ?, ?, ?)",
            (
                message.exchange,
                message.routing_key,
                message.body,
                message.correlation_id,
                message.content_type,
                self._now(),
            ),
        )

    @contextlib.contextmanager
    def _write(self) -> Iterator[sqlite3.Connection]:
        with self._read() as db:
            db.execute("BEGIN IMMEDIATE")
            try:
                yield db
                db.execute("COMMIT")
            except BaseException:
                with contextlib.suppress(sqlite3.Error):
                    db.execute("ROLLBACK")
                raise

    @contextlib.contextmanager
    def _read(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            try:
                yield self._db
            except (sqlite3.OperationalError, sqlite3.ProgrammingError) as exc:
                raise JournalError(
                    f"the journal {self.path} cannot be used just now ({exc}): check the disk's space and health"
                ) from exc
            except sqlite3.DatabaseError as exc:
                raise JournalCorrupt(f"the journal {self.path} is damaged ({exc}): restore it or move it away") from exc


def _load(text: str | None) -> dict[str, Any] | None:
    return None if text is None else dict(json.loads(text))
