"""Virtual environments with releases of oslo.messaging from PyPI, and its stock client in one of them."""

from __future__ import annotations

import dataclasses
import json
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

CLIENT = Path(__file__).with_name("oslo_client.py")
ERRORS = Path(__file__).resolve().parents[2] / "reeve_errors.py"
NEW = "18.3.1"
OLD = "12.0.0"
"""February 2020; it needs six, and what else it needs is what the new one needs."""


class OsloMissing(Exception):
    """The packages cannot be had here; says why."""


def make(folder: Path, releases: Sequence[str] = (NEW, OLD)) -> dict[str, str]:
    """The Python of each release's environment. The old one shares the new one's dependencies, so it costs seconds.

    :param releases: `NEW` first.
    :raises OsloMissing: pip cannot install them.
    """
    pythons = {release: folder / release / "bin" / "python" for release in releases}
    for release, python in pythons.items():
        _run(sys.executable, "-m", "venv", "--without-pip", str(folder / release))
        if release == NEW:
            _pip(python, f"oslo.messaging=={NEW}")
            continue
        (shared,) = (folder / NEW).glob("lib/python3*/site-packages")
        (own,) = (folder / OLD).glob("lib/python3*/site-packages")
        (own / "shared.pth").write_text(f"{shared}\n")
        _pip(python, "--no-deps", f"oslo.messaging=={OLD}", "six")
    return {release: str(python) for release, python in pythons.items()}


def _pip(python: Path, *what: str) -> None:
    _run(sys.executable, "-m", "pip", "--python", str(python), "install", "-q", "--no-compile", *what)


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL)
    if done.returncode:
        raise OsloMissing(f"{' '.join(command)}: {done.stderr.strip()[-500:]}")


@dataclasses.dataclass
class OsloClient:
    """The stock client as a process.

    :ivar rabbit: options of its group ``[oslo_messaging_rabbit]``.
    """

    process: subprocess.Popen[bytes]
    buffer: bytes = b""

    @classmethod
    def start(
        cls,
        python: str,
        folder: Path,
        url: str,
        target: dict[str, Any],
        *,
        exchange: str,
        rabbit: dict[str, Any] | None = None,
        exmods: tuple[str, ...] = (),
        version_cap: str | None = None,
    ) -> OsloClient:
        folder.mkdir(exist_ok=True)
        shutil.copy(ERRORS, folder)  # all that a client needs of Reeve
        lines = ["[DEFAULT]", f"transport_url = rabbit{url.removeprefix('amqp')}", f"control_exchange = {exchange}"]
        lines += ["[oslo_messaging_rabbit]", *(f"{name} = {value}" for name, value in (rabbit or {}).items())]
        config = folder / "client.conf"
        config.write_text("\n".join(lines) + "\n")
        env = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
        with open(folder / "client.log", "ab") as log:
            process = subprocess.Popen(
                [python, "-W", "ignore", str(CLIENT), str(config)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=env | {"PYTHONPATH": str(folder)},
            )
        made = cls(process)
        made.send({"target": target, "exmods": list(exmods), "version_cap": version_cap})
        assert made.receive(60) == {"ready": True}
        return made

    def send(self, request: dict[str, Any]) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(request).encode() + b"\n")
        self.process.stdin.flush()

    def receive(self, timeout: float = 60.0) -> dict[str, Any]:
        assert self.process.stdout is not None
        fd, end = self.process.stdout.fileno(), time.monotonic() + timeout
        while b"\n" not in self.buffer:
            ready, _, _ = select.select([fd], [], [], max(0.0, end - time.monotonic()))
            assert ready, f"the client said nothing within {timeout} s"
            data = os.read(fd, 65536)
            assert data, "the client has ended"
            self.buffer += data
        line, _, self.buffer = self.buffer.partition(b"\n")
        return dict(json.loads(line))

    def begin(self, method: str, args: dict[str, Any] | None = None, *, do: str = "call", **prepare: Any) -> None:
        context = prepare.pop("context", {})
        prepare.setdefault("timeout", 30)
        if do == "cast":
            del prepare["timeout"]
        self.send({"do": do, "method": method, "args": args or {}, "prepare": prepare, "context": context})

    def call(self, method: str, args: dict[str, Any] | None = None, **prepare: Any) -> Any:
        """The result. :raises AssertionError: it raised."""
        self.begin(method, args, **prepare)
        answer = self.receive()
        assert "result" in answer, answer
        return answer["result"]

    def raised(self, method: str, args: dict[str, Any] | None = None, **prepare: Any) -> dict[str, Any]:
        """What the call raised: ``kinds`` (the names of its classes), ``module``, ``text`` and attributes."""
        self.begin(method, args, **prepare)
        answer = self.receive()
        assert "raised" in answer, answer
        return dict(answer["raised"])

    def cast(self, method: str, args: dict[str, Any] | None = None, **prepare: Any) -> None:
        assert self.call(method, args, do="cast", **prepare) is None

    def close(self) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(10)
        self.process.stdout.close()
