"""Files that the host process makes for an operator: whole or not at all, and for its user only."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

from hypervisor.errors import SpecInvalid


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[int]:
    """A file that gets its name at the end, and only if all went well. Guests' secrets: for this user only."""
    flags = os.O_WRONLY | os.O_CLOEXEC
    part = None
    try:
        out = os.open(path.parent, flags | os.O_TMPFILE, 0o600)
    except OSError as exc:
        if exc.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT):
            raise
        part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
        out = os.open(part, flags | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    try:
        yield out
        if part is not None:
            os.link(part, path)
        else:
            # The descriptor makes Python follow the link to the file without a name (AT_SYMLINK_FOLLOW), and no more.
            os.link(f"/proc/self/fd/{out}", path, src_dir_fd=out)
    finally:
        os.close(out)
        if part is not None:
            os.unlink(part)


def checked(text: str) -> Path:
    path = Path(text)
    if not path.is_absolute() or "\0" in text or len(path.name) > 200:
        raise SpecInvalid(f"path {text[:200]!r} is not usable: give an absolute one, its name at most 200 characters")
    if os.path.lexists(path):
        raise already(path)
    if not path.parent.is_dir():
        raise SpecInvalid(f"{path.parent} is no folder: make it, or give another path")
    return path


def already(path: Path) -> SpecInvalid:
    return SpecInvalid(f"{path} is there already: remove it, or give another path")
