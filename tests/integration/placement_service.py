"""OpenStack's own Placement from PyPI, over SQLite: an environment kept in the user's cache, and a server process."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

RELEASE = "16.0.0"
SERVER = Path(__file__).with_name("placement_server.py")
START_SECONDS = 60.0
CONFIG = """\
[DEFAULT]
log_file = {folder}/placement.log
[api]
auth_strategy = noauth2
[placement_database]
connection = sqlite:///{folder}/placement.sqlite
sync_on_startup = true
sqlite_synchronous = false
"""


class PlacementMissing(Exception):
    """It cannot be had here; says why."""


def environment() -> Path:
    """The Python of an environment that has Placement; made once for a user.

    :raises PlacementMissing: pip cannot install it.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "reeve" / "tests"
    made = cache / f"placement-{RELEASE}-py{sys.version_info[0]}{sys.version_info[1]}"
    cache.mkdir(parents=True, exist_ok=True)
    with open(cache / "placement.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # other tests may want it just now
        if not (made / "bin" / "python").exists():
            shutil.rmtree(made, ignore_errors=True)
            with tempfile.TemporaryDirectory(dir=cache) as work:
                fresh = Path(work) / "venv"
                _run(sys.executable, "-m", "venv", "--without-pip", str(fresh))
                python = str(fresh / "bin" / "python")
                _run(
                    sys.executable, "-m", "pip", "--python", python, "install", "-q", f"openstack-placement=={RELEASE}"
                )
                fresh.rename(made)  # whole or not at all
    return made / "bin" / "python"


def _run(*command: str) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired as exc:
        raise PlacementMissing(f"{' '.join(command)}: it takes too long") from exc
    if done.returncode:
        raise PlacementMissing(f"{' '.join(command)}: {done.stderr.strip()[-500:]}")


@contextlib.contextmanager
def placement(folder: Path) -> Iterator[str]:
    """A running Placement with an empty database; its URL. Any token is taken, ``admin`` may do everything.

    :raises PlacementMissing: it cannot be installed.
    """
    python = environment()
    folder.mkdir(exist_ok=True)
    (folder / "placement.conf").write_text(CONFIG.format(folder=folder))
    env = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
    with open(folder / "stderr", "wb") as log:
        process = subprocess.Popen(
            [str(python), "-W", "ignore", str(SERVER), str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env=env,
        )
    assert process.stdin is not None and process.stdout is not None
    try:
        port = process.stdout.readline().strip()
        assert port.isdigit(), f"Placement did not start: {(folder / 'stderr').read_text()[-2000:]}"
        yield f"http://127.0.0.1:{int(port)}"
    finally:
        process.stdin.close()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(10)
        process.stdout.close()
