"""What SQLite raises, in the agent's terms."""

from __future__ import annotations

import sqlite3
from pathlib import Path

from agent.errors import JournalCorrupt, JournalError


def translated(exc: BaseException, path: Path) -> Exception:
    """The file's failure as a `JournalError`: damage is what no retry cures. Another exception comes back as it is."""
    if isinstance(exc, sqlite3.OperationalError | sqlite3.ProgrammingError):
        return JournalError(f"the journal {path} cannot be used just now ({exc}): check the disk's space and health")
    if isinstance(exc, sqlite3.Error):
        return JournalCorrupt(f"the journal {path} is damaged ({exc}): restore it or move it away")
    return exc if isinstance(exc, Exception) else JournalError(f"the journal was interrupted ({exc!r})")
