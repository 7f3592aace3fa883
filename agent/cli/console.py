"""`reeve domain console` and `console-log`: the guest's hvc0 on this terminal."""

from __future__ import annotations

import argparse
import contextlib
import os
import select
import signal
import sys
import termios
import time
import tty
from collections.abc import Iterator
from types import FrameType
from typing import Any

from agent.cli.base import Common, find_domain
from agent.cli.values import seconds
from hypervisor.errors import DomainNotFound
from hypervisor.toolstack.api import Console, DomainInfo, DomainState, Toolstack

ESCAPE = b"\x1d"  # Ctrl-]
CHUNK = 65536
REPLAY = 8192
REATTACH_SECONDS = 5.0
ENDED = (DomainState.SHUTDOWN, DomainState.CRASHED, DomainState.DYING)
LEFT, DOMAIN_GONE, QUIET, SIGNALLED = "left", "gone", "quiet", "signalled"


class Session:
    """One attachment: copies bytes both ways until the operator leaves, the domain goes or, after the end of
    standard input, the guest is quiet.

    :param linger: seconds without output after the end of standard input before it leaves.
    :param escape: whether Ctrl-] leaves (on a terminal; in a pipe it is data).
    :param wake: a descriptor that ends the session when it becomes readable.
    """

    def __init__(
        self, console: Console, stdin: int, stdout: int, *, linger: float, escape: bool, wake: int | None = None
    ) -> None:
        self.console = console
        self._stdin = stdin
        self._stdout = stdout
        self._linger = linger
        self._escape = escape
        self._wake = wake
        self._input_open = True
        self._heard = time.monotonic()

    def run(self) -> str:
        """Returns why it ended: ``left``, ``gone``, ``quiet`` or ``signalled``."""
        while True:
            timeout = None
            if not self._input_open:
                timeout = self._heard + self._linger - time.monotonic()
                if timeout <= 0:
                    return QUIET
            watched = [self.console.fileno()] + ([self._stdin] if self._input_open else [])
            watched += [] if self._wake is None else [self._wake]
            ready, _, _ = select.select(watched, [], [], timeout)
            if self._wake in ready:
                return SIGNALLED
            if self.console.fileno() in ready and not self._show():
                return DOMAIN_GONE
            if self._stdin in ready and not self._type():
                return LEFT

    def _show(self) -> bool:
        try:
            data = self.console.read(CHUNK, timeout=0)
        except EOFError:
            return False
        self._heard = time.monotonic()
        write_all(self._stdout, data)
        return True

    def _type(self) -> bool:
        try:
            data = os.read(self._stdin, CHUNK)
        except OSError:  # EIO: the terminal hung up
            data = b""
        if not data:
            self._input_open = False
            self._heard = time.monotonic()
            return not self._escape  # a terminal that hung up
        if self._escape and ESCAPE in data:
            before = data[: data.index(ESCAPE)]
            if before:
                self.console.write(before)
            return False
        self.console.write(data)
        return True


def write_all(fd: int, data: bytes) -> None:
    while data:
        data = data[os.write(fd, data) :]


class Signals:
    """Notes SIGTERM and SIGHUP instead of dying of them, so that the terminal is put right first.

    The interpreter writes to a pipe the moment a signal comes. A handler of ours runs too late for that when the
    signal strikes just before `select` blocks, and an exception out of it could strike anywhere and be lost.

    :ivar fd: polls readable once a signal came.
    :ivar number: of the signal that came first, or 0.
    """

    def __init__(self) -> None:
        self.number = 0
        self.fd, self._write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Signals:
        self._wakeup_before = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        for name in (signal.SIGTERM, signal.SIGHUP):
            self._before[name] = signal.signal(name, self._note)
        return self

    def __exit__(self, *_exc: object) -> None:
        for name, handler in self._before.items():
            signal.signal(name, handler)
        signal.set_wakeup_fd(self._wakeup_before)
        os.close(self.fd)
        os.close(self._write)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self.number = self.number or number


@contextlib.contextmanager
def raw_terminal(fd: int) -> Iterator[bool]:
    """Raw mode while inside, if `fd` is a terminal; yields whether it is. The old mode always comes back."""
    if not os.isatty(fd):
        yield False
        return
    before = termios.tcgetattr(fd)
    try:
        tty.setraw(fd, termios.TCSANOW)
        yield True
    finally:
        termios.tcsetattr(fd, termios.TCSANOW, before)


class DomainConsole(Common):
    """Attach this terminal to a domain's console (hvc0). Ctrl-] leaves."""

    examples = (
        ("reeve domain console web", "shows the end of the log, then what the guest prints; what you type goes to it"),
        ("echo uptime | reeve domain console web --replay 0", "send a line, print the answer, leave"),
    )
    notes = (
        "Leaving does not stop the guest. Exit code 0 when you leave or the domain goes away.\n"
        "When standard input is no terminal, Ctrl-] is data and the command ends by itself after the end of the input."
    )

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("domain", metavar="NAME|UUID", help="which domain")
        parser.add_argument(
            "--replay", type=int, default=REPLAY, metavar="BYTES", help=f"of the log to show first (default {REPLAY})"
        )
        parser.add_argument(
            "--linger",
            type=seconds,
            default=2.0,
            metavar="SECONDS",
            help="after the end of a piped input, leave when the guest was quiet so long (default 2)",
        )

    def take_action(self, parsed_args: argparse.Namespace) -> int:
        stdin = sys.stdin.fileno()
        sys.stdout.flush()
        with self.toolstack() as toolstack:
            info = find_domain(toolstack, parsed_args.domain)
            if os.isatty(stdin):
                self.say(f"console of {info.name}: Ctrl-] leaves")
            with Signals() as signals:
                with raw_terminal(stdin) as is_terminal:
                    why = self._attached(toolstack, info, parsed_args, is_terminal, signals.fd)
                if why == SIGNALLED:
                    return 128 + signals.number
            if os.isatty(stdin):
                self.say("" if why == LEFT else f"\ndomain {info.name} has ended")
        return 0

    def _attached(
        self,
        toolstack: Toolstack,
        info: DomainInfo,
        parsed_args: argparse.Namespace,
        is_terminal: bool,
        wake: int,
    ) -> str:
        stdin, stdout = sys.stdin.fileno(), sys.stdout.fileno()
        replay = parsed_args.replay
        while True:
            why = DOMAIN_GONE  # also when it goes, or is remade, just while it is attached to
            with contextlib.suppress(DomainNotFound), contextlib.closing(toolstack.open_console(info.uuid)) as console:
                if replay > 0:
                    write_all(stdout, toolstack.console_log(info.uuid, replay))
                    replay = 0
                session = Session(console, stdin, stdout, linger=parsed_args.linger, escape=is_terminal, wake=wake)
                why = session.run()
            if why != DOMAIN_GONE or not comes_back(toolstack, info.uuid):
                return why


def comes_back(toolstack: Toolstack, uuid: str) -> bool:
    """Whether the domain is there (again) after its console ended, as it is when it was rebooted."""
    deadline = time.monotonic() + REATTACH_SECONDS
    try:
        while True:
            time.sleep(0.05)
            if toolstack.get_domain(uuid).state not in ENDED:
                return True
            if time.monotonic() > deadline:
                return False
    except DomainNotFound:
        return False


class DomainConsoleLog(Common):
    """Print the last of what a domain's guest printed."""

    examples = (
        ("reeve domain console-log web", "the last 64 KiB"),
        ("reeve domain console-log web --bytes 1000", "less of it"),
    )

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("domain", metavar="NAME|UUID", help="which domain")
        parser.add_argument("--bytes", type=int, default=65536, metavar="N", help="at most so many (default 65536)")

    def take_action(self, parsed_args: argparse.Namespace) -> int:
        with self.toolstack() as toolstack:
            data = toolstack.console_log(find_domain(toolstack, parsed_args.domain).uuid, max(parsed_args.bytes, 0))
        self.app.stdout.flush()
        binary = getattr(self.app.stdout, "buffer", None)
        if binary is None:
            self.app.stdout.write(data.decode(errors="replace"))
        else:
            binary.write(data)
            binary.flush()
        return 0
