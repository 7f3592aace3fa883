"""What the benchmarks make of what they see: lines of guestbench, mappings of a process, sparse memory."""

from __future__ import annotations

import contextlib
import mmap
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "bench"))

import density
import guest
import sides
from common import BenchFailed
from guest import Figure

SMAPS = """\
559347b53000-559347b60000 rw-p 00000000 00:00 0                          [heap]
Size:               52 kB
Pss:                40 kB
Pss_Dirty:          12 kB
7ff7ff200000-7ff83f1ff000 rwxp 00000000 00:00 0 
Pss:             36864 kB
7ff8890ba000-7ff8991f0000 rw-s 00000000 00:01 2084                       /memfd:reeve-8aef2998-3473 (deleted)
Pss:             89584 kB
7ff899715000-7ff899a00000 rw-p 00000000 00:00 0 
Pss:              2246 kB
7ff899da2000-7ff89aac6000 r-xp 003a2000 fe:00 1049                       /usr/lib/libunicorn.so.2
Pss:               244 kB
7ffd1b7f7000-7ffd1b7f9000 r-xp 00000000 00:00 0                          [vdso]
Pss:                 0 kB
"""  # noqa: W291 (anonymous mappings end in a blank)


def test_a_figure_is_read_from_what_the_guest_printed() -> None:
    text = 'guestbench --time 1 fork\r\nBENCH {"name": "fork", "value": 2.5, "unit": "ms"}\r\nBENCH-DONE'
    assert guest.parse("fork", text) == Figure(2.5, "ms")


@pytest.mark.parametrize(
    "line",
    [
        "",
        'BENCH {"name": "exec", "value": 2.5, "unit": "ms"}',
        'BENCH {"name": "fork", "value": 0, "unit": "ms"}',
        'BENCH {"name": "fork", "value": "x", "unit": "ms"}',
        'BENCH {"name": "fork", "value": 1, "unit": "fortnights"}',
        'BENCH {"name": "fork"}',
        "BENCH {]}",
    ],
)
def test_what_is_no_figure_of_this_benchmark_is_a_failure(line: str) -> None:
    with pytest.raises(BenchFailed, match="printed no figure"):
        guest.parse("fork", f"{line}\r\nBENCH-DONE")


def test_an_error_in_the_guest_is_passed_on() -> None:
    with pytest.raises(BenchFailed, match="fork failed in the guest: fork: Cannot allocate memory"):
        guest.parse("fork", "BENCH-ERROR fork: Cannot allocate memory\r\n")


def test_the_table_of_benchmarks_is_that_of_the_program() -> None:
    source = (Path(guest.__file__).parent / "guestbench.c").read_text()
    for name in guest.BENCHMARKS:
        assert f'{{ "{name}", bench_{name},' in source


def test_guest_memory_is_apart_from_what_the_process_takes() -> None:
    assert density.parse_smaps(SMAPS) == {
        "guest": 89584 * 1024,
        "translations": 36864 * 1024,
        "anonymous": (40 + 2246) * 1024,
        "files": 244 * 1024,
    }


def test_holes_of_a_sparse_file_cost_nothing() -> None:
    fd = os.memfd_create("reeve-test")
    try:
        os.ftruncate(fd, 64 * mmap.PAGESIZE)
        for page in (0, 1, 10, 40):
            os.pwrite(fd, b"x", page * mmap.PAGESIZE)
        assert density.allocated(fd, 0, 32 * mmap.PAGESIZE) == 3 * mmap.PAGESIZE
        assert density.allocated(fd, 32 * mmap.PAGESIZE, 64 * mmap.PAGESIZE) == mmap.PAGESIZE
        assert density.allocated(fd, 41 * mmap.PAGESIZE, 64 * mmap.PAGESIZE) == 0
    finally:
        os.close(fd)


@contextlib.contextmanager
def holder(*fds: int) -> Iterator[int]:
    """A process that has these descriptors and no others: this one may have what earlier tests left."""
    with subprocess.Popen(["sleep", "600"], pass_fds=fds) as process:
        try:
            yield process.pid
        finally:
            process.kill()


def test_the_extent_of_a_process_is_split_into_the_guest_s_and_xen_s() -> None:
    fd = os.memfd_create("reeve-8aef2998")
    try:
        os.ftruncate(fd, 512 * 4096)
        os.pwrite(fd, b"x", 3 * 4096)
        os.pwrite(fd, b"x" * 8192, 300 * 4096)
        with holder(fd) as pid:
            assert density.extent(pid, 256 * 4096) == (4096, 8192)
    finally:
        os.close(fd)
    with holder() as pid, pytest.raises(BenchFailed, match="holds no guest memory"):
        density.extent(pid, 4096)


def test_this_process_has_memory_and_cpu_time() -> None:
    memory = density.Memory.of(os.getpid())
    assert memory.own > 1 << 20 and memory.files > 0 and memory.tables > 0
    before = sides.cpu_seconds(os.getpid())
    spent = time.process_time()
    assert abs(before - spent) < 1.0 and before > 0
    with subprocess.Popen(["sleep", "60"]) as process:
        assert 0 <= sides.cpu_seconds(process.pid) < 1.0
        process.kill()


@pytest.mark.parametrize("text", ["9.9", "0"])
def test_an_interval_is_long_enough_to_mean_something(text: str) -> None:
    with pytest.raises(Exception, match="give"):
        density.interval(text)
    assert density.interval("10") == 10.0
