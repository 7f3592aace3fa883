"""What SQLite raises, in the agent's terms."""

from __future__ import annotations

import sqlite3
from pathlib import Path

from agent.errors import JournalCorrupt, JournalError

_HELD = "another process holds it: `fuser {path}` shows which, end that one; the agent goes on by itself"
_DENIED = "check the owner and mode of the file and its folder, and that its file system is not read-only"
_CURES = {
    sqlite3.SQLITE_BUSY: _HELD,
    sqlite3.SQLITE_LOCKED: _HELD,
    sqlite3.SQLITE_PROTOCOL: _HELD,
    sqlite3.SQLITE_FULL: "make room on its disk; the agent goes on by itself",
    sqlite3.SQLITE_READONLY: _DENIED,
    sqlite3.SQLITE_PERM: _DENIED,
    sqlite3.SQLITE_CANTOPEN: _DENIED,
}


def cure(exc: BaseException, path: Path) -> str:
    """What to do about a failure that is no damage."""
    primary = getattr(exc, "sqlite_errorcode", 0) & 0xFF  # what is above names the case more closely
    return _CURES.get(primary, "check the disk's space and health").format(path=path)


def translated(exc: BaseException, path: Path) -> Exception:
    """The file's failure as a `JournalError`: damage is what no retry cures. Another exception comes back as it is."""
    if isinstance(exc, sqlite3.OperationalError | sqlite3.ProgrammingError):
        return JournalError(f"the journal {path} cannot be used just now ({exc}): {cure(exc, path)}")
    if isinstance(exc, sqlite3.Error):
        return corrupt(path, str(exc))
    return exc if isinstance(exc, Exception) else JournalError(f"the journal was interrupted ({exc!r})")


def corrupt(path: Path, why: str) -> JournalCorrupt:
    return JournalCorrupt(
        f"the journal {path} is damaged ({why}): keep the file and restore it from a backup, or move it away to start "
        "with an empty one (instructions under way are then forgotten)"
    )
