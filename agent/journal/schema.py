"""The journal's file: SQLite in WAL mode, every commit synced to the disk."""

from __future__ import annotations

import os
import sqlite3
from pathlib import Path

from agent.errors import JournalError, JournalNewer
from agent.journal.failures import corrupt, cure

VERSION = 4
APPLICATION_ID = 0x52454556
"""``REEV``; stored in the file's header, so that another program's database is not taken for a journal."""

BUSY_SECONDS = 5.0

# No WITHOUT ROWID: quick_check of some SQLite versions (3.40) takes such a table for damaged when the columns of its
# primary key do not come first.
DDL = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE instructions (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    digest TEXT NOT NULL,
    verb TEXT NOT NULL,
    host TEXT NOT NULL,
    args TEXT NOT NULL,
    dialect TEXT NOT NULL,
    deadline REAL,
    domain TEXT NOT NULL DEFAULT '',
    phase TEXT NOT NULL,
    plan TEXT,
    error TEXT,
    reply TEXT,
    received REAL NOT NULL,
    finished REAL,
    expires REAL,
    context TEXT,
    cancelled REAL
);
CREATE INDEX instructions_unfinished ON instructions (seq) WHERE finished IS NULL;
CREATE INDEX instructions_expiring ON instructions (expires) WHERE expires IS NOT NULL;
CREATE TABLE waiters (
    id TEXT NOT NULL REFERENCES instructions (id) ON DELETE CASCADE,
    reply_to TEXT NOT NULL,
    dialect TEXT NOT NULL,
    correlation TEXT NOT NULL DEFAULT '',
    heartbeat REAL NOT NULL DEFAULT 0,
    PRIMARY KEY (id, reply_to, correlation)
);
CREATE TABLE steps (
    id TEXT NOT NULL REFERENCES instructions (id) ON DELETE CASCADE,
    idx INTEGER NOT NULL,
    name TEXT NOT NULL,
    state TEXT NOT NULL,
    output TEXT,
    seconds REAL NOT NULL DEFAULT 0,
    PRIMARY KEY (id, idx)
);
CREATE TABLE claims (
    id TEXT PRIMARY KEY REFERENCES instructions (id) ON DELETE CASCADE,
    domain TEXT NOT NULL,
    memory_mib INTEGER NOT NULL,
    vcpus INTEGER NOT NULL
);
CREATE TABLE outbox (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    exchange TEXT NOT NULL,
    routing_key TEXT NOT NULL,
    body BLOB NOT NULL,
    correlation_id TEXT NOT NULL,
    content_type TEXT NOT NULL,
    created REAL NOT NULL,
    attempts INTEGER NOT NULL DEFAULT 0,
    not_before REAL NOT NULL DEFAULT 0
);
CREATE TABLE quarantine (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    received REAL NOT NULL,
    code TEXT NOT NULL,
    reason TEXT NOT NULL,
    size INTEGER NOT NULL,
    body BLOB NOT NULL,
    reply_to TEXT NOT NULL,
    envelope TEXT NOT NULL DEFAULT '{}'
);
"""

MIGRATIONS = {
    1: "ALTER TABLE instructions ADD COLUMN context TEXT;"
    " ALTER TABLE waiters ADD COLUMN heartbeat REAL NOT NULL DEFAULT 0;",
    3: "ALTER TABLE instructions ADD COLUMN cancelled REAL;",
    2: "ALTER TABLE quarantine ADD COLUMN envelope TEXT NOT NULL DEFAULT '{}';",
}
"""What leads from a version to the next one. Columns are added at the end, as `DDL` has them."""


def open_reader(path: Path) -> sqlite3.Connection:
    """A second connection to an open journal, which only reads. :raises JournalError: it cannot be opened."""
    try:
        db = sqlite3.connect(path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False)
        db.execute("PRAGMA query_only=ON")
    except sqlite3.Error as exc:
        raise JournalError(f"the journal {path} cannot be opened ({exc}): check the folder's owner and space") from exc
    return db


def open_file(path: Path) -> sqlite3.Connection:
    """Open the journal, making it if there is none.

    :raises JournalCorrupt: the file is damaged or no journal.
    :raises JournalNewer: a newer Reeve wrote it.
    :raises JournalError: it cannot be opened or written.
    """
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
        _not_emptied(path)
        db = sqlite3.connect(path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False)
    except (OSError, sqlite3.Error) as exc:
        raise JournalError(f"the journal {path} cannot be opened ({exc}): check the folder's owner and space") from exc
    try:
        _prepare(db, path)
    except sqlite3.OperationalError as exc:
        db.close()
        raise JournalError(f"the journal {path} cannot be used ({exc}): {cure(exc, path)}") from exc
    except sqlite3.DatabaseError as exc:
        db.close()
        raise corrupt(path, str(exc)) from exc
    except JournalError:
        db.close()
        raise
    return db


def _prepare(db: sqlite3.Connection, path: Path) -> None:
    version = db.execute("PRAGMA user_version").fetchone()[0]
    application = db.execute("PRAGMA application_id").fetchone()[0]
    tables = db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
    if application != APPLICATION_ID and (tables or application):
        raise corrupt(path, "it is a database of another program")
    if version > VERSION:
        raise JournalNewer(
            f"the journal {path} has schema version {version}, this agent knows {VERSION}: start the newer agent, "
            "or give another [journal] path"
        )
    for row in db.execute("PRAGMA quick_check(1)"):
        if row[0] != "ok":
            raise corrupt(path, row[0])
    db.execute("PRAGMA journal_mode=WAL")
    db.execute("PRAGMA synchronous=FULL")
    db.execute("PRAGMA foreign_keys=ON")
    # Who commits also moves the log into the file, and everyone waits: seldom is better. At most 16 MiB of log.
    db.execute("PRAGMA wal_autocheckpoint=4000")
    if not tables:
        db.executescript(
            f"BEGIN IMMEDIATE; {DDL} PRAGMA application_id={APPLICATION_ID}; PRAGMA user_version={VERSION}; COMMIT;"
        )
        return
    for old in range(version, VERSION):
        db.executescript(f"BEGIN IMMEDIATE; {MIGRATIONS[old]} PRAGMA user_version={old + 1}; COMMIT;")


def _not_emptied(path: Path) -> None:
    """SQLite throws the log of an empty file away: whatever emptied it, what is in the log is not to go along."""
    log = path.with_name(path.name + "-wal")
    if path.stat().st_size == 0 and log.exists() and log.stat().st_size > 0:
        raise corrupt(path, f"it is empty, but {log.name} is not")
