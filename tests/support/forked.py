"""Programs started by forking a process that has imported them already: milliseconds each, not a second of imports.

A test that kills an agent a hundred times starts it three hundred times. What runs is the program's own ``main`` in a
process of its own, with its own arguments, environment and folder. `Forked` has the part of `subprocess.Popen` that
rigs use. The server is this module run as a script; it ends when its standard input does.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import importlib
import json
import os
import pkgutil
import random
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

START_SECONDS = 60.0
_BACKLOG = 64


class Forked:
    """One process. :param program: ``module:function``, which takes the arguments and returns the exit status."""

    def __init__(self, program: str, argv: Sequence[str], env: Mapping[str, str], cwd: str = "/") -> None:
        self.args = [program, *argv]
        self.returncode: int | None = None
        self._link = socket.socket(socket.AF_UNIX)
        self._link.settimeout(START_SECONDS)
        self._link.connect(str(_server()))
        request = {"program": program, "argv": list(argv), "env": dict(env), "cwd": cwd}
        self._link.sendall(json.dumps(request).encode() + b"\n")
        self._lines = self._link.makefile("rb")
        self.pid = int(self._lines.readline())

    def poll(self) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0.0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """:raises subprocess.TimeoutExpired: it runs on."""
        if self.returncode is None:
            self._link.settimeout(timeout)
            try:
                # The status is a few bytes, written at once: what is there is whole.
                status = self._link.recv(64)
            except (TimeoutError, BlockingIOError):
                raise subprocess.TimeoutExpired(self.args, timeout or 0.0) from None
            if not status:
                raise RuntimeError(f"nobody knows how process {self.pid} ended: its parent is gone")
            self.returncode = int(status)
            self._link.close()
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _server() -> Path:
    """The socket of this process's server, which is started now if there is none (any more)."""
    path, server = _started()
    if server.poll() is not None:
        _started.cache_clear()
        path, _ = _started()
    return path


@functools.cache
def _started() -> tuple[Path, subprocess.Popen[bytes]]:
    folder = tempfile.TemporaryDirectory(prefix="reeve-fork-")
    path = Path(folder.name) / "socket"
    command = [sys.executable, __file__, str(path)]
    server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd="/")
    assert server.stdin is not None and server.stdout is not None
    assert server.stdout.readline() == b"ready\n"

    def end() -> None:
        # A test of descriptors may have closed this one, too.
        with contextlib.suppress(OSError):
            server.stdin.close()  # type: ignore[union-attr]
        if server.poll() is None:
            server.kill()
        server.wait(10)
        folder.cleanup()

    atexit.register(end)
    return path, server


def _run(request: dict[str, Any]) -> int:
    """In the new process: become what `Popen` would have made."""
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    sys.argv = list(request["argv"])
    random.seed()
    # Read when it is imported, which was before.
    importlib.import_module("agent.faults")._KILL_AT = os.environ.get("REEVE_TEST_KILL_AT", "")
    module, _, name = request["program"].partition(":")
    try:
        return int(getattr(importlib.import_module(module), name)(request["argv"]) or 0)
    except SystemExit as exc:
        return exc.code if isinstance(exc.code, int) else 1
    except BaseException:
        traceback.print_exc()
        return 1


def _parent(link: socket.socket) -> None:
    """A process that has one child, tells its number and, in the end, how it ended."""
    with link.makefile("rb") as lines:
        request = json.loads(lines.readline())
    pid = os.fork()
    if pid == 0:
        link.close()
        status = _run(request)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status & 0xFF)
    os.setsid()  # a signal to the group of the tests is for the child, not for its witness
    with contextlib.suppress(OSError):
        link.sendall(b"%d\n" % pid)
        _, status = os.waitpid(pid, 0)
        link.sendall(b"%d\n" % os.waitstatus_to_exitcode(status))


def serve(path: str) -> None:
    for module in ("agent.service", "hypervisor.toolstack.drivers.fake", "hypervisor.toolstack.drivers.embedded"):
        importlib.import_module(module)
    for found in pkgutil.iter_modules(importlib.import_module("plugins").__path__, "plugins."):
        importlib.import_module(found.name)
    gc.freeze()
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen(_BACKLOG)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    os.write(1, b"ready\n")
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 1)
    server = os.getpid()
    if os.fork() == 0:  # ends with the tests, however they end, and takes the server along
        with contextlib.suppress(OSError):
            while os.read(0, 1):
                pass
            if os.getppid() == server:
                os.kill(server, signal.SIGKILL)
        os._exit(0)
    os.dup2(null, 0)
    os.close(null)
    while True:
        link, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            _parent(link)
            os._exit(0)
        link.close()


if __name__ == "__main__":
    serve(sys.argv[1])
