"""Messages that are no instructions, kept whole for whoever looks into them: why, when, from where, and the bytes.

Bounded in number, in bytes and in age; what is beyond is dropped, the oldest first. A message that was longer than the
limit for messages is kept as far as that limit goes, and cannot be retried.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sqlite3
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from agent import wire
from agent.errors import AgentError
from agent.journal.records import Refused

T = TypeVar("T")

MAX_HEADER_BYTES = 65536
DROPPED = "quarantine_dropped_"
_FIELDS = ("content_type", "content_encoding", "correlation_id", "dialect", "expiration", "reply_to")


@dataclasses.dataclass(frozen=True, slots=True)
class Limits:
    """:ivar body_bytes: kept of one message. :ivar keep_seconds: 0 for ever."""

    messages: int = 1000
    bytes: int = 64 << 20
    keep_seconds: float = 30 * 86400.0
    body_bytes: int = wire.MAX_BYTES


LIMITS = Limits()


@dataclasses.dataclass(frozen=True, slots=True)
class Kept:
    """A refused message.

    :ivar seq: its number, never given to another. :ivar received: seconds since the epoch.
    :ivar raw: as it came. :ivar whole: all of its bytes and headers are there.
    :ivar answered: where its sender was told; "": nowhere.
    """

    seq: int
    received: float
    code: str
    reason: str
    answered: str
    raw: wire.Raw
    whole: bool

    def to_json(self) -> dict[str, Any]:
        """Everything but headers and body."""
        return {
            "seq": self.seq,
            "received": self.received,
            "code": self.code,
            "reason": self.reason,
            "size": self.raw.size,
            "dialect": self.raw.dialect,
            "reply_to": self.answered or self.raw.reply_to,
            "whole": self.whole,
        }


class Quarantine:
    """The table of refused messages; `write` and `read` are the journal's."""

    def __init__(
        self,
        write: Callable[[Callable[[sqlite3.Connection], Any]], Any],
        read: Callable[[], contextlib.AbstractContextManager[sqlite3.Connection]],
        now: Callable[[], float],
        limits: Limits,
    ) -> None:
        self._write = write
        self._read = read
        self._now = now
        self.limits = limits

    def put(self, db: sqlite3.Connection, refused: Refused) -> None:
        """Within a transaction of the journal."""
        raw, why, reply = refused.raw, refused.why, refused.reply
        envelope = {name: getattr(raw, name)[:MAX_HEADER_BYTES] for name in _FIELDS}
        headers = _headers(raw.headers)
        db.execute(
            "INSERT INTO quarantine (received, code, reason, size, body, reply_to, envelope)"
            " VALUES (?, ?, ?, ?, ?, ?, ?)",
            (
                self._now(),
                why.code,
                why.message,
                max(raw.size, len(raw.body)),
                raw.body[: self.limits.body_bytes],
                reply.routing_key if reply else "",
                json.dumps(envelope | {"headers": headers}),
            ),
        )
        self._bound(db)

    def sweep(self, db: sqlite3.Connection) -> None:
        """Drop what is older than it is kept."""
        if self.limits.keep_seconds:
            self._drop(db, "age", "received < ?", self._now() - self.limits.keep_seconds)

    def _bound(self, db: sqlite3.Connection) -> None:
        limits = self.limits
        newest = "seq NOT IN (SELECT seq FROM quarantine ORDER BY seq DESC LIMIT ?)"
        self._drop(db, "number", newest, limits.messages)
        beyond = (
            "seq IN (SELECT seq FROM (SELECT seq, sum(length(body)) OVER (ORDER BY seq DESC) AS held FROM quarantine)"
            " WHERE held > ?)"
        )
        self._drop(db, "bytes", beyond, limits.bytes)

    def _drop(self, db: sqlite3.Connection, reason: str, where: str, value: float) -> None:
        count = db.execute(f"DELETE FROM quarantine WHERE {where}", (value,)).rowcount
        if count > 0:
            db.execute(
                "INSERT INTO meta VALUES (?, ?) ON CONFLICT (key) DO UPDATE SET value = value + excluded.value",
                (DROPPED + reason, count),
            )

    def all(self) -> list[Kept]:
        """Oldest first."""
        return self._select("")

    def get(self, seq: int) -> Kept | None:
        return next(iter(self._select("WHERE seq = ?", seq)), None)

    def drop(self, seq: int | None) -> int:
        """Forget one message, or (None) all; how many there were."""
        where, values = ("", ()) if seq is None else (" WHERE seq = ?", (seq,))
        return int(self._write(lambda db: db.execute(f"DELETE FROM quarantine{where}", values).rowcount))

    def refused_again(self, seq: int, why: AgentError) -> None:
        """It stays, with what is wrong with it now."""
        row = (why.code, why.message, seq)
        self._write(lambda db: db.execute("UPDATE quarantine SET code = ?, reason = ? WHERE seq = ?", row))

    def totals(self) -> dict[str, float]:
        """``bytes`` that are kept, ``oldest_seconds``, the age of the oldest message, and ``dropped_total``.

        The last is how many a limit has dropped since there is this journal.
        """
        with self._read() as db:
            held, oldest = db.execute("SELECT sum(length(body)), min(received) FROM quarantine").fetchone()
            dropped = db.execute(f"SELECT sum(value) FROM meta WHERE key GLOB '{DROPPED}*'").fetchone()[0]
        return {
            "bytes": float(held or 0),
            "oldest_seconds": max(0.0, self._now() - oldest) if oldest is not None else 0.0,
            "dropped_total": float(dropped or 0),
        }

    def _select(self, where: str, *values: int) -> list[Kept]:
        names = "seq, received, code, reason, size, body, reply_to, envelope"
        with self._read() as db:
            rows = db.execute(f"SELECT {names} FROM quarantine {where} ORDER BY seq", values).fetchall()
        return [_kept(*row) for row in rows]


def _kept(
    seq: int, received: float, code: str, reason: str, size: int, body: bytes, answered: str, envelope: str
) -> Kept:
    found = json.loads(envelope)
    headers = found.pop("headers", None)
    raw = wire.Raw(bytes(body), size, headers=headers or {}, **found)
    return Kept(seq, received, code, reason, answered, raw, len(body) == size and headers is not None)


def _headers(headers: Mapping[str, Any]) -> dict[str, Any] | None:
    """As JSON has them; None: they are too large, or hold what JSON has not."""
    try:
        text = json.dumps(dict(headers), allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        return None
    return dict(headers) if len(text) <= MAX_HEADER_BYTES else None
