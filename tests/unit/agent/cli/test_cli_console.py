"""`reeve domain console` as an operator has it: in a process of its own, on a pseudo-terminal and in a pipe."""

from __future__ import annotations

import os
import pty
import select
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from agent.cli.console import DOMAIN_GONE, LEFT, QUIET, Session, raw_terminal

SECONDS = 20.0
RUN = [sys.executable, "-m", "agent.cli.main"]


class Terminal:
    """`reeve domain console` on a pseudo-terminal.

    :ivar shown: everything it has written.
    """

    def __init__(self, argv: list[str]) -> None:
        self.master, self.slave = pty.openpty()
        self.before = termios.tcgetattr(self.slave)
        self.shown = b""
        self.process = subprocess.Popen(argv, stdin=self.slave, stdout=self.slave, stderr=self.slave)

    def until(self, wanted: bytes | Callable[[], bool]) -> None:
        deadline = time.monotonic() + SECONDS
        while not (wanted() if callable(wanted) else wanted in self.shown):
            assert time.monotonic() < deadline, f"{wanted!r} not in {self.shown!r}"
            if select.select([self.master], [], [], 0.05)[0]:
                self.shown += os.read(self.master, 65536)

    def until_attached(self, reeve: Any, uuid: str) -> None:
        """The terminal is raw a moment before the console is attached: print until something is shown."""

        def shown() -> bool:
            reeve.host.guest_print(uuid, b"attached?")
            return b"attached?" in self.shown

        self.until(shown)

    def type(self, data: bytes) -> None:
        os.write(self.master, data)

    def is_raw(self) -> bool:
        return not termios.tcgetattr(self.slave)[3] & (termios.ICANON | termios.ECHO)

    def ended(self) -> int:
        self.until(lambda: self.process.poll() is not None)
        return int(self.process.returncode)

    def assert_restored(self) -> None:
        assert termios.tcgetattr(self.slave) == self.before

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(timeout=10)
        os.close(self.master)
        os.close(self.slave)


@pytest.fixture
def terminal(reeve: Any) -> Iterator[Callable[..., Terminal]]:
    opened: list[Terminal] = []

    def open_one(*words: str) -> Terminal:
        opened.append(Terminal([*RUN, *reeve.options, "domain", "console", *words]))
        return opened[-1]

    yield open_one
    for item in opened:
        item.close()


def test_what_is_typed_is_answered_and_ctrl_bracket_leaves(reeve: Any, terminal: Any) -> None:
    info = reeve.domain("web")
    console = terminal("web")
    console.until(b"fake guest web")  # the log is replayed
    console.until(console.is_raw)
    console.type(b"echo demo-$((40+2))\r")
    console.until(b"\r\ndemo-42\r\n")
    console.type(b"\x1d")
    assert console.ended() == 0
    console.assert_restored()
    assert reeve.host.get_domain(info.uuid).state == "running"


def test_it_says_how_to_leave(reeve: Any, terminal: Any) -> None:
    reeve.domain("web")
    console = terminal("web")
    console.until(b"console of web: Ctrl-] leaves")
    console.type(b"\x1d")
    assert console.ended() == 0


def test_ctrl_c_goes_to_the_guest(reeve: Any, terminal: Any) -> None:
    reeve.domain("web")
    console = terminal("web", "--replay", "0")
    console.until(console.is_raw)
    console.type(b"\x03\recho alive\r")
    console.until(b"\r\nalive\r\n")
    console.type(b"last words\x1dnot these")
    assert console.ended() == 0
    assert b"not these" not in reeve.host.console_log(reeve.host.list_domains()[0].uuid)


def test_it_ends_with_the_domain(reeve: Any, terminal: Any) -> None:
    info = reeve.domain("web")
    console = terminal("web")
    console.until(console.is_raw)
    console.until_attached(reeve, info.uuid)
    reeve.host.destroy(info.uuid)
    assert console.ended() == 0
    console.until(b"domain web has ended")
    console.assert_restored()


def test_it_stays_over_a_reboot(reeve: Any, terminal: Any) -> None:
    info = reeve.domain("web")
    console = terminal("web", "--replay", "0")
    console.until(console.is_raw)
    console.until_attached(reeve, info.uuid)
    reeve.host.reboot(info.uuid)
    console.until(b"fake guest web")
    console.type(b"\x1d")
    assert console.ended() == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_restores_the_terminal(reeve: Any, terminal: Any, number: signal.Signals) -> None:
    reeve.domain("web")
    console = terminal("web")
    console.until(console.is_raw)
    console.process.send_signal(number)
    assert console.ended() == 128 + number
    console.assert_restored()


def test_a_failure_while_attached_restores_the_terminal(reeve: Any, terminal: Any) -> None:
    reeve.domain("web")
    console = terminal("web")
    console.until(console.is_raw)
    os.remove(reeve.folder / "host" / "fake.sqlite")
    (reeve.folder / "host" / "fake.sqlite").write_bytes(b"garbage" * 1000)
    console.type(b"echo x\r")
    console.until(lambda: console.process.poll() is not None or not console.is_raw() or b"echo x" in console.shown)
    console.type(b"\x1d")
    console.ended()
    console.assert_restored()


def test_a_domain_that_is_not_there_leaves_the_terminal_alone(reeve: Any, terminal: Any) -> None:
    console = terminal("nobody")
    assert console.ended() == 1
    console.until(b"error: domain.not_found: ")
    console.assert_restored()


def piped(reeve: Any, data: bytes, *options: str) -> subprocess.CompletedProcess[bytes]:
    argv = [*RUN, *reeve.options, "domain", "console", "web", *options]
    return subprocess.run(argv, input=data, capture_output=True, timeout=SECONDS, check=False)


def test_in_a_pipe_it_sends_the_input_and_prints_the_answer(reeve: Any) -> None:
    reeve.domain("web")
    done = piped(reeve, b"echo one\necho two\n", "--replay", "0", "--linger", "0.5")
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"\r\none\r\n" in done.stdout and b"\r\ntwo\r\n" in done.stdout
    assert b"fake guest" not in done.stdout


def test_in_a_pipe_ctrl_bracket_is_data(reeve: Any) -> None:
    info = reeve.domain("web")
    assert piped(reeve, b"echo a\x1db\n", "--linger", "0.3").returncode == 0
    assert b"a\x1db" in reeve.host.console_log(info.uuid)


def test_in_a_pipe_it_ends_with_the_domain(reeve: Any) -> None:
    reeve.domain("web")
    done = piped(reeve, b"poweroff\n", "--linger", "15")
    assert done.returncode == 0
    assert reeve.host.list_domains() == []


class Script:
    """A console that plays back what it is given; its file descriptor is always readable."""

    def __init__(self, *reads: bytes) -> None:
        self.reads = list(reads)
        self.written: list[bytes] = []
        self._read, self._write = os.pipe()
        os.write(self._write, b"x")

    def read(self, size: int = 65536, timeout: float | None = None) -> bytes:
        if not self.reads:
            raise EOFError("gone")
        return self.reads.pop(0)

    def write(self, data: bytes) -> None:
        self.written.append(data)

    def fileno(self) -> int:
        return self._read

    def close(self) -> None:
        os.close(self._read)
        os.close(self._write)


def test_a_session_copies_until_the_domain_is_gone() -> None:
    console = Script(b"one ", b"two")
    stdin_read, stdin_write = os.pipe()
    out_read, out_write = os.pipe()
    assert Session(console, stdin_read, out_write, linger=1, escape=True).run() == DOMAIN_GONE
    assert os.read(out_read, 100) == b"one two"
    for fd in (stdin_read, stdin_write, out_read, out_write):
        os.close(fd)
    console.close()


@pytest.mark.parametrize(
    ("typed", "escape", "written", "why"),
    [
        (b"abc\x1ddef", True, [b"abc"], LEFT),
        (b"\x1d", True, [], LEFT),
        (b"", True, [], LEFT),
        (b"a\x1db", False, [b"a\x1db"], QUIET),
        (b"", False, [], QUIET),
    ],
)
def test_how_a_session_ends_by_its_input(typed: bytes, escape: bool, written: list[bytes], why: str) -> None:
    console = Script(b"never read")
    os.read(console.fileno(), 1)  # nothing to show
    stdin_read, stdin_write = os.pipe()
    os.write(stdin_write, typed)
    os.close(stdin_write)
    assert Session(console, stdin_read, 1, linger=0.01, escape=escape).run() == why
    assert console.written == written
    os.close(stdin_read)
    console.close()


def test_raw_mode_is_for_terminals_only() -> None:
    read, write = os.pipe()
    with raw_terminal(read) as is_terminal:
        assert is_terminal is False
    os.close(read)
    os.close(write)


def test_raw_mode_ends_with_an_exception() -> None:
    master, slave = pty.openpty()
    before = termios.tcgetattr(slave)
    with pytest.raises(RuntimeError), raw_terminal(slave) as is_terminal:
        assert is_terminal
        assert termios.tcgetattr(slave) != before
        raise RuntimeError("inside")
    assert termios.tcgetattr(slave) == before
    os.close(master)
    os.close(slave)
