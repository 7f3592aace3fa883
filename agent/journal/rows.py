"""Rows of the journal's tables as objects, and back."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Sequence
from typing import Any

from agent import wire
from agent.journal.records import Entry, OutboxRow, Phase, StepRecord, StepState

LONGEST_PAUSE = 60.0
"""Nothing in the outbox is put off for longer."""


def read_entry(db: sqlite3.Connection, ident: str) -> Entry | None:
    """An instruction with its steps. :raises sqlite3.DatabaseError: also where a row holds what nobody wrote."""
    try:
        return _entry(db, ident)
    except (ValueError, TypeError, KeyError) as exc:
        raise sqlite3.DatabaseError(f"the row of instruction {ident[:64]!r} is not readable: {exc}") from exc


def _entry(db: sqlite3.Connection, ident: str) -> Entry | None:
    row = db.execute(
        "SELECT seq, id, verb, host, args, dialect, deadline, domain, phase, plan, error, received, context,"
        " cancelled FROM instructions WHERE id = ?",
        (ident,),
    ).fetchone()
    if row is None:
        return None
    steps = db.execute(
        "SELECT idx, name, state, output, seconds FROM steps WHERE id = ? ORDER BY idx", (ident,)
    ).fetchall()
    seq, ident, verb, host, args, dialect, deadline, domain, phase, plan, error, received, context, cancelled = row
    return Entry(
        seq=seq,
        instruction=wire.Instruction(
            ident, verb, host, json.loads(args), "", deadline, dialect, context=_load(context) or {}
        ),
        domain=domain,
        phase=Phase(phase),
        plan=_load(plan),
        steps=tuple(StepRecord(s[0], s[1], StepState(s[2]), _load(s[3]), s[4]) for s in steps),
        error=_load(error),
        received=received,
        cancelled=cancelled,
    )


def read_outcome(db: sqlite3.Connection, ident: str) -> wire.Reply | None:
    """The reply of a finished instruction."""
    row = db.execute("SELECT reply FROM instructions WHERE id = ? AND finished IS NOT NULL", (ident,)).fetchone()
    try:
        return None if row is None else wire.Reply.from_json(json.loads(row[0]))
    except (ValueError, TypeError, KeyError) as exc:
        raise sqlite3.DatabaseError(f"the outcome of instruction {ident[:64]!r} is not readable: {exc}") from exc


def put_waiter(db: sqlite3.Connection, instruction: wire.Instruction) -> None:
    """Whoever sent it waits for its reply."""
    if instruction.reply_to:
        db.execute(
            "INSERT OR IGNORE INTO waiters (id, reply_to, dialect, correlation, heartbeat) VALUES (?, ?, ?, ?, ?)",
            (
                instruction.id,
                instruction.reply_to,
                instruction.dialect,
                instruction.correlation,
                instruction.heartbeat,
            ),
        )


def put(db: sqlite3.Connection, messages: Sequence[wire.Outgoing], now: float) -> None:
    """Messages into the outbox."""
    db.executemany(
        "INSERT INTO outbox (exchange, routing_key, body, correlation_id, content_type, created)"
        " VALUES (?, ?, ?, ?, ?, ?)",
        [
            (item.exchange, item.routing_key, item.body, item.correlation_id, item.content_type, now)
            for item in messages
        ],
    )


def read_outbox(db: sqlite3.Connection, now: float, limit: int) -> list[OutboxRow]:
    """What is due, oldest first; also what a clock that was set back since has put off for too long."""
    rows = db.execute(
        "SELECT seq, exchange, routing_key, body, correlation_id, content_type, created, attempts"
        " FROM outbox WHERE not_before <= ? OR not_before > ? ORDER BY seq LIMIT ?",
        (now, now + LONGEST_PAUSE, limit),
    ).fetchall()
    return [OutboxRow(*row) for row in rows]


def read_counts(db: sqlite3.Connection) -> dict[str, int]:
    """See `agent.journal.store.Journal.counts`."""
    return {
        name: db.execute(f"SELECT count(*) FROM {what}").fetchone()[0]
        for name, what in (
            ("unfinished", "instructions WHERE finished IS NULL"),
            ("outbox", "outbox"),
            ("claims", "claims"),
            ("quarantine", "quarantine"),
        )
    }


def _load(text: str | None) -> dict[str, Any] | None:
    return None if text is None else dict(json.loads(text))
