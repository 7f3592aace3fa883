"""Consoles: xenconsoled's log, and ``xl console`` on a terminal of ours: it takes what is typed from nothing else."""

from __future__ import annotations

import contextlib
import errno
import os
import select
import subprocess
import tty
from pathlib import Path

from hypervisor.errors import HostFailure, HostUnavailable
from hypervisor.toolstack.drivers.xl.runner import Runner, kill

DAY = 86400.0
ESCAPE = b"\x1d"
"""Read alone, this byte ends ``xl console``; Xen 4.17 has no option for another."""
GONE = "the console has ended: its domain is gone, or another process has it open"


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
    """A `hypervisor.toolstack.api.Console`. `ESCAPE` cannot be typed: it is left out."""

    def __init__(self, runner: Runner, domid: int) -> None:
        self._terminal, theirs = os.openpty()
        try:
            tty.setraw(theirs)  # before it is read by ``xl``: nothing is echoed, held back or translated
            self._process = subprocess.Popen(
                runner.command(["console", str(domid)], DAY),
                stdin=theirs,
                stdout=theirs,
                stderr=subprocess.DEVNULL,
                env=runner.variables(),
                cwd="/",
                start_new_session=True,
            )
        except OSError as exc:
            os.close(self._terminal)
            raise HostUnavailable(f"xl console cannot be run: {exc.strerror}: install Xen's tools") from exc
        finally:
            os.close(theirs)

    def read(self, size: int = 65536, timeout: float | None = None) -> bytes:
        if not select.select([self._terminal], [], [], timeout)[0]:
            return b""
        try:
            data = os.read(self._terminal, size)
        except OSError as exc:
            if exc.errno != errno.EIO:  # nobody has the other end
                raise
            data = b""
        if not data:
            raise EOFError(GONE)
        return data

    def write(self, data: bytes) -> None:
        data = data.replace(ESCAPE, b"")
        try:
            while data:
                data = data[os.write(self._terminal, data) :]
        except OSError as exc:
            raise EOFError(GONE) from exc

    def fileno(self) -> int:
        return self._terminal

    def close(self) -> None:
        if self._process.poll() is None:
            kill(self._process)
        with contextlib.suppress(OSError):
            os.close(self._terminal)
