"""One agent a state folder."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import Any

from agent.errors import AlreadyRunning, ConfigError


def lock_folder(folder: Path) -> Any:
    """Be the only agent of a state folder; the lock ends with the process or ``close()``.

    :raises AlreadyRunning: another agent has it.
    :raises ConfigError: the folder cannot be made.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        file = open(folder / "agent.lock", "a+")  # noqa: SIM115 - held for the process's life
    except OSError as exc:
        raise ConfigError(
            f"the state folder {folder} cannot be used ({exc.strerror}): give --agent-state-dir one that you own"
        ) from exc
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as exc:
        file.seek(0)
        pid = file.read(20).strip()
        file.close()
        raise AlreadyRunning(
            f"another reeve-agent (pid {pid or '?'}) uses the state folder {folder}: stop it, or give this one "
            "another --agent-state-dir"
        ) from exc
    file.truncate(0)
    file.write(f"{os.getpid()}\n")
    file.flush()
    return file
