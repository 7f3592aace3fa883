"""The two sides: waiting for what a guest prints, QEMU's process, and whose children are whose."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from agent.images.store import Image, ImageFile

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "bench"))

from common import PROMPT, READY, BenchFailed
from sides import Meter, QemuGuest, Terminal, children, descendants

FAKE_QEMU = """#!/bin/sh
echo "booting $*"
read line
echo "REEVE-GUEST-READY 1.25"
echo "typed $line"
exec sleep 60
"""


def scripted(*parts: bytes) -> Callable[[float], bytes]:
    """A reader that gives one part at a time, then the end."""
    left = list(parts)

    def read(_seconds: float) -> bytes:
        if not left:
            raise EOFError
        return left.pop(0)

    return read


def test_a_pattern_may_come_in_pieces_and_the_rest_is_kept() -> None:
    terminal = Terminal("a guest", scripted(b"[1.0] boot\r\nREEVE-GUE", b"ST-READY 4.47\r\n\r\n/ ", b"# "), print)
    assert terminal.until(READY, 5).endswith(b"REEVE-GUEST-READY 4.47")
    assert terminal.until(PROMPT, 5) == b"\r\n\r\n/ # "


def test_the_end_of_a_guest_shows_its_last_words() -> None:
    terminal = Terminal("a guest", scripted(b"Kernel panic - not syncing\r\n\r\n"), print)
    with pytest.raises(BenchFailed, match=r"a guest ended before .*Kernel panic"):
        terminal.until(READY, 5)


def test_silence_has_a_deadline() -> None:
    terminal = Terminal("a guest", lambda seconds: b"", print)
    with pytest.raises(BenchFailed, match=r"within 0\.05 s; it printed nothing"):
        terminal.until(READY, 0.05)


@pytest.fixture
def image(tmp_path: Path) -> Image:
    part = ImageFile("vmlinuz", 1, "")
    return Image("test", tmp_path, part, ImageFile("initrd.img", 1, ""), "console=hvc0")


def test_qemu_gets_the_kernel_and_its_console_and_is_ended(image: Image, tmp_path: Path) -> None:
    fake = tmp_path / "qemu"
    fake.write_text(FAKE_QEMU)
    fake.chmod(0o755)
    with QemuGuest(image, 128, str(fake)) as guest:
        command = guest.terminal.until(rb"booting .*\n", 10).decode()
        guest.terminal.type(b"hello\n")
        guest.terminal.until(READY, 10)
        assert guest.terminal.until(rb"typed .*\n", 10) == b"\ntyped hello\n"
        found = children(os.getpid())
        assert found
    assert "-accel tcg -smp 1 -m 128 -nographic -no-reboot" in command
    assert f"-kernel {tmp_path}/vmlinuz" in command and f"-initrd {tmp_path}/initrd.img" in command
    assert command.strip().endswith(f"-append console=ttyS0 -initrd {tmp_path}/initrd.img")
    assert len(children(os.getpid())) < len(found)


def test_a_qemu_that_cannot_be_started_is_one_clear_failure(image: Image, tmp_path: Path) -> None:
    with pytest.raises(BenchFailed, match="install qemu-system-x86"):
        QemuGuest(image, 128, str(tmp_path / "missing"))


def test_children_are_found_by_their_parent() -> None:
    with subprocess.Popen(["sleep", "60"]) as process:
        assert process.pid in children(os.getpid())
        assert children(process.pid) == []
        process.kill()


def test_cpu_time_of_all_below_a_process() -> None:
    """Of one that works, one that sleeps and one that is gone."""
    work = "end = time.process_time() + 0.3\nwhile time.process_time() < end: pass\n"
    script = f"import time\n{work}print('done', flush=True)\n"
    shell = subprocess.Popen(
        ["sh", "-c", 'read go; "$0" -c "$1"; read end', sys.executable, script + "input()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert shell.stdin is not None and shell.stdout is not None
    try:
        assert descendants(shell.pid) == [shell.pid]
        shell.stdin.write("go\n")
        shell.stdin.flush()
        deadline = time.monotonic() + 20
        while len(descendants(shell.pid)) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.001)  # a poll with a deadline
        meter = Meter(lambda: [*descendants(shell.pid), 1 << 22])
        meter.start()
        assert shell.stdout.readline() == "done\n"
        assert 0.05 < meter.stop() < 5.0
    finally:
        shell.kill()
        shell.communicate()
