"""Xen's own checker of saved domains, from a source tree of Xen outside of this one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

VARIABLE = "REEVE_XEN_TREE"


def missing() -> str:
    """Why the checker cannot be run, "" when it can."""
    tree = os.environ.get(VARIABLE)
    if not tree:
        return f"{VARIABLE} names no source tree of Xen: set it to one to run its verify-stream-v2"
    return "" if _script(tree).is_file() else f"{VARIABLE}={tree} has no {_script(tree)}"


def verify(image: str | Path) -> str:
    """What `verify-stream-v2 --verbose` says. :raises AssertionError: it refuses the image."""
    tree = os.environ[VARIABLE]
    command = [sys.executable, str(_script(tree)), "-f", "xl", "-v", "-i", str(image)]
    environment = {**os.environ, "PYTHONPATH": str(Path(tree) / "tools/python")}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def _script(tree: str) -> Path:
    return Path(tree) / "tools/python/scripts/verify-stream-v2"
