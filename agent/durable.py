"""Files that a power cut does not take, and nobody else reads."""

from __future__ import annotations

import os
from pathlib import Path


def sync(path: Path) -> None:
    """Have what was written to a file or made in a folder on the disk. :raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def private(path: str, flags: int) -> int:
    """An `opener` of `open`: for this user alone, and never through a link. :raises OSError."""
    return os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
