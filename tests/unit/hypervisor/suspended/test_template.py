"""Templates: a state that is read back as it was, files that were tampered with, and a guest that begins from one."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from harness import GuestRun, build, guest_runs, running

from hypervisor.cpu.policy import CpuPolicy
from hypervisor.errors import StreamInvalid, StreamUnsupported
from hypervisor.suspended.state import ABSENT, GuestState, VcpuState, place
from hypervisor.suspended.template import main, read_state, write_state
from hypervisor.types import PAGE_SIZE

FRAMES = 64


def made() -> GuestState:
    types = np.zeros(70, np.uint8)
    types[60:68] = ABSENT
    policy = CpuPolicy("test", {(1, 0): (1, 2, 3, 4)}, {0xCE: 1 << 63})
    vcpus = (VcpuState(0, b"\0\1" * 50, b"ext"), VcpuState(3, b"x", b"", b"xs", b"ms"))
    return GuestState(64, types, (3, 4), bytes(range(256)) * 16, vcpus, policy, 2_000_000, 1 << 62)


def read(tmp_path: Path, data: bytes, frames: int = FRAMES) -> GuestState:
    path = tmp_path / "state"
    path.write_bytes(data)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        state, found = read_state(descriptor, frames)
    finally:
        os.close(descriptor)
    assert (found == place(state.types, frames)).all()
    return state


@pytest.mark.parametrize("policy", [True, False])
def test_a_state_comes_back(tmp_path: Path, policy: bool) -> None:
    state = made() if policy else dataclasses.replace(made(), policy=None)
    back = read(tmp_path, write_state(state, FRAMES))
    assert (back.types == state.types).all()
    for field in dataclasses.fields(GuestState):
        if field.name != "types":
            assert getattr(back, field.name) == getattr(state, field.name), field.name


def test_a_state_that_was_tampered_with(tmp_path: Path) -> None:
    whole = write_state(made(), FRAMES)
    for data in (b"", whole[:20], whole[:-1], b"x" + whole[1:], whole[:200] + b"?" + whole[201:]):
        with pytest.raises(StreamInvalid):
            read(tmp_path, data)
    with pytest.raises(StreamInvalid, match="64 frames"):
        read(tmp_path, whole, FRAMES + 1)
    with pytest.raises(StreamUnsupported, match="form 2"):
        read(tmp_path, whole[:16] + b"\2" + whole[17:])
    for at, value in ((20, 0xFFFFFFFF), (24, 1 << 40)):  # bytes of JSON, page numbers
        with pytest.raises(StreamInvalid, match="too large"):
            read(
                tmp_path,
                whole[:at] + value.to_bytes(4 if at == 20 else 8, "little") + whole[at + (4 if at == 20 else 8) :],
            )


def test_a_state_that_makes_no_sense(tmp_path: Path) -> None:
    for change in ({"vcpus": ()}, {"bits": 64}, {"shared_info": b""}):
        read(tmp_path, write_state(dataclasses.replace(made(), **change), FRAMES))
    many = dataclasses.replace(made(), types=np.zeros(FRAMES + 1, np.uint8))
    with pytest.raises(StreamInvalid, match="at most 64"):
        read(tmp_path, write_state(many, FRAMES))


@pytest.fixture
def runs() -> Iterator[list[GuestRun]]:
    yield from guest_runs()


@contextlib.contextmanager
def files(tmp_path: Path, stream: bytes) -> Iterator[list[int]]:
    """Descriptors: of the stream, and of two empty files."""
    fds = []
    for name in ("stream", "memory", "state"):
        (tmp_path / name).write_bytes(stream if name == "stream" else b"")
        fds.append(os.open(tmp_path / name, os.O_RDWR))
    try:
        yield fds
    finally:
        for fd in fds:
            os.close(fd)


@pytest.mark.skipif(bool(build.available()), reason=str(build.available()))
def test_a_guests_stream_is_laid_out(runs: list[GuestRun], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = running(runs, "suspend", parks=True)
    run.wait_text("suspend: ready")
    run.suspend()
    stream, frames = run.stream(), run.machine.domain.memory.max_pages
    with files(tmp_path, stream) as fds:
        command = [sys.executable, "-m", "hypervisor.suspended.template", *map(str, fds), str(frames)]
        done = subprocess.run(command, capture_output=True, pass_fds=fds, timeout=60, check=False)
    ready, _, said = done.stdout.partition(b"\n")
    assert (ready, done.stderr) == (b"ready", b"")
    pages = run.call(run.machine.domain.frames.pages)
    assert json.loads(said) == {"bits": 64, "pages": pages}
    memory = tmp_path / "memory"
    assert memory.stat().st_size == frames * PAGE_SIZE > 4 * 512 * memory.stat().st_blocks, "zeros are holes"
    state = read(tmp_path, (tmp_path / "state").read_bytes(), frames)
    assert len(state.present) == pages and state.vcpus[0].id == 0
    for wrong, size, says in (
        (stream[:-40], frames, "cut short"),
        (b"", frames, "ends within"),
        (stream.replace(b"XENF", b"XENG"), frames, "damaged"),
        (stream, pages // 2, "its domain"),
    ):
        with files(tmp_path, wrong) as fds:
            assert main([*map(str, fds), str(size)]) == 1
        said = capsys.readouterr().err
        assert says in said and "\n" not in said
