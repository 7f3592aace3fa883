"""Consoles: xenconsoled's log, and ``xl console`` attached by pipes."""

from __future__ import annotations

import contextlib
import os
import select
import subprocess
from pathlib import Path

from hypervisor.errors import HostFailure, HostUnavailable
from hypervisor.toolstack.drivers.xl.runner import Runner, kill

DAY = 86400.0


def log(path: Path, start: int, max_bytes: int) -> bytes:
    """The last bytes of a log, none from before `start`."""
    if max_bytes <= 0:
        return b""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(start if start <= size else 0, size - max_bytes))
            return file.read(max_bytes)
    except FileNotFoundError:
        return b""
    except OSError as exc:
        raise HostFailure(f"console log {path}: {exc.strerror}: see docs/xl.md on xenconsoled's log") from exc


class XlConsole:
    """A `hypervisor.toolstack.api.Console`."""

    def __init__(self, runner: Runner, domid: int) -> None:
        try:
            self._process = subprocess.Popen(
                runner.command(["console", str(domid)], DAY),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=runner.variables(),
                cwd="/",
                start_new_session=True,
                bufsize=0,
            )
        except OSError as exc:
            raise HostUnavailable(f"xl console cannot be run: {exc.strerror}: install Xen's tools") from exc
        assert self._process.stdin is not None and self._process.stdout is not None
        self._in, self._out = self._process.stdin, self._process.stdout

    def read(self, size: int = 65536, timeout: float | None = None) -> bytes:
        if not select.select([self._out], [], [], timeout)[0]:
            return b""
        data = os.read(self._out.fileno(), size)
        if not data:
            raise EOFError("the domain is gone")
        return data

    def write(self, data: bytes) -> None:
        try:
            while data:
                data = data[os.write(self._in.fileno(), data) :]
        except BrokenPipeError:
            raise EOFError("the domain is gone") from None

    def fileno(self) -> int:
        return self._out.fileno()

    def close(self) -> None:
        if self._process.poll() is None:
            kill(self._process)
        for pipe in (self._in, self._out):
            with contextlib.suppress(OSError):
                pipe.close()
