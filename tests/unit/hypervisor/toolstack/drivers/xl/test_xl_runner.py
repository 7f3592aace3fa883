"""The runner of xl: how a command ends is judged, and none outlives its time."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from hypervisor import errors
from hypervisor.toolstack.drivers.xl.runner import Output, Runner


def program(folder: Path, body: str) -> Runner:
    path = folder / "xl"
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return Runner(str(path))


def test_what_it_prints_is_returned(tmp_path: Path) -> None:
    assert program(tmp_path, 'echo "$@"; echo $HOME$LC_ALL').run("list", "-v", "; rm x") == "list -v ; rm x\nC\n"


@pytest.mark.parametrize(
    ("status", "stderr", "error"),
    [
        (1, "nobody is an invalid domain identifier (rc=-6)", errors.DomainNotFound),
        (3, "libxl: error: libxl_mem.c:1: not enough free memory", errors.InsufficientMemory),
        (1, "cannot init xl context", errors.HostUnavailable),
        (1, "xc: error: panic: xc_dom_core.c:1: xc_dom_find_loader: no loader found", errors.KernelInvalid),
        (1, "sudo: a password is required", errors.HostFailure),
        (0, "libxl: error: Invalid argument", errors.HostFailure),
        (1, "", errors.HostFailure),
        (-9, "", errors.HostFailure),
    ],
)
def test_status_and_stderr_are_judged(status: int, stderr: str, error: type[errors.ToolstackError]) -> None:
    failure = Output(("verb",), status, "", stderr + "\n\x1b[2J\n").failure()
    assert type(failure) is error
    assert "\n" not in failure.message and "\x1b" not in failure.message


SAMPLES = Path(__file__).parent / "samples"


@pytest.mark.parametrize(
    ("sample", "status", "error"),
    [
        ("create_no-kernel", 3, errors.KernelInvalid),
        ("create_no-memory", 3, errors.InsufficientMemory),
        ("create_slow-script", 3, errors.OperationTimeout),
        ("network-attach_nobody", 1, errors.DomainNotFound),
        ("restore_cut-short", 1, errors.StreamInvalid),
        ("restore_no-image", 1, errors.StreamInvalid),
        ("save_not-booted", 1, errors.WrongState),
    ],
)
def test_what_a_real_xl_complained_of(sample: str, status: int, error: type[errors.ToolstackError]) -> None:
    verb = sample.partition("_")[0]
    failure = Output((verb,), status, "", (SAMPLES / f"xl_{sample}.err").read_text()).failure()
    assert type(failure) is error, failure
    assert "\n" not in failure.message and failure.message.startswith(f"xl {verb}")


def test_harmless_lines_are_no_failure() -> None:
    assert Output(("create",), 0, "", "Parsing config from /x.cfg\nlibxl: info: all well\n").failure() is None
    assert Output(("create",), 1, "", "Parsing config from /x.cfg\n").failure() is not None


@pytest.mark.parametrize(
    "line",
    [
        "Rebooting domain 10",
        "Shutting down domain 10",
        "PV control interface not available: sending ACPI power button event.",
    ],
)
def test_what_shutdown_and_reboot_say_is_no_complaint(line: str) -> None:
    """They say it on stderr, and end with 0."""
    assert Output(("reboot", "-F", "10"), 0, "", line + "\n").failure() is None


def test_a_command_that_hangs_is_killed_with_its_children(tmp_path: Path) -> None:
    runner = program(tmp_path, f"sleep 600 & echo $! > {tmp_path}/child; wait")
    with pytest.raises(errors.OperationTimeout):
        runner.run("list", timeout=0.3)
    child = int((tmp_path / "child").read_text())
    deadline = time.monotonic() + 5
    while os.path.exists(f"/proc/{child}") and "Z" not in Path(f"/proc/{child}/stat").read_text().split()[2]:
        assert time.monotonic() < deadline, "the child lives on"
        time.sleep(0.01)


def test_a_daemon_that_keeps_the_pipes_does_not_hold_us(tmp_path: Path) -> None:
    runner = program(tmp_path, f"sleep 600 & echo $! > {tmp_path}/child; echo done")
    began = time.monotonic()
    try:
        assert runner.run("create", timeout=20) == "done\n"
        assert time.monotonic() - began < 10
    finally:
        os.kill(int((tmp_path / "child").read_text()), 9)


def test_endless_output_is_cut_off(tmp_path: Path) -> None:
    with pytest.raises(errors.HostFailure, match="MiB"):
        program(tmp_path, "exec cat /dev/zero").run("info", timeout=20)


def test_no_program(tmp_path: Path) -> None:
    with pytest.raises(errors.HostUnavailable, match="cannot be run"):
        Runner(str(tmp_path / "nothing")).run("list")


def test_it_runs_where_a_folder_always_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Debian's xl is a script of sh, which says `getcwd() failed` in a folder that was removed."""
    runner, gone = program(tmp_path, "pwd"), tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert runner.run("list") == "/\n"


def test_behind_a_prefix_root_ends_it_itself() -> None:
    command = Runner("xl", ("sudo", "-n")).command(["list"], 30)
    assert command == ["sudo", "-n", "timeout", "--kill-after=2", "31", "xl", "list"]
    with pytest.raises(errors.HostFailure):
        Runner().command(["list", "a\0b"], 1)
