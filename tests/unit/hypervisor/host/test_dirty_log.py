"""The kernel's log of writes to a mapping."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from hypervisor.host import dirty_log
from hypervisor.host.dirty_log import Unavailable, WriteLog, packed

PAGES = 1200


class Mapped:
    def __init__(self) -> None:
        self.fd = os.memfd_create("guest")
        os.ftruncate(self.fd, PAGES * 4096)
        self.map = mmap.mmap(self.fd, PAGES * 4096)
        self._anchor = ctypes.c_char.from_buffer(self.map)
        self.address = ctypes.addressof(self._anchor)

    def __del__(self) -> None:
        os.close(self.fd)

    def write(self, *pages: int) -> None:
        for page in pages:
            self.map[page * 4096 + page % 4096] = 1


@pytest.fixture
def mapped() -> Mapped:
    made = Mapped()
    made.write(*range(PAGES // 2))  # the rest are holes
    return made


@pytest.fixture
def log(mapped: Mapped) -> Iterator[WriteLog]:
    try:
        made = WriteLog()
    except Unavailable as exc:
        pytest.skip(str(exc))
    made.start(mapped.address, PAGES * 4096)
    yield made
    made.stop()
    made.close()


def taken(log: WriteLog) -> list[int]:
    return [int(page) for page in np.flatnonzero(log.take())]


def test_each_write_is_told_once(mapped: Mapped, log: WriteLog) -> None:
    assert taken(log) == []
    written = [0, 1, 2, 77, PAGES // 2, PAGES - 1]
    mapped.write(*written)
    assert taken(log) == written
    assert taken(log) == []
    mapped.write(77)
    mapped.write(77)
    assert taken(log) == [77]


def test_reading_is_no_writing(mapped: Mapped, log: WriteLog) -> None:
    assert sum(mapped.map[:]) and taken(log) == []


def test_what_the_kernel_writes_for_this_process_is_seen(mapped: Mapped, log: WriteLog) -> None:
    os.preadv(mapped.fd, [memoryview(mapped.map)[4096 * 9 : 4096 * 9 + 10]], 0)
    assert taken(log) == [9]


def test_other_ways_to_the_memory_are_not_seen(mapped: Mapped, log: WriteLog) -> None:
    """Why driver processes' mappings and holes are told in other ways."""
    os.pwrite(mapped.fd, b"x", 4096 * 3)
    other = mmap.mmap(mapped.fd, 4096)
    other[0] = 1
    mapped.map.madvise(mmap.MADV_REMOVE, 4096 * 20, 4096)
    assert mapped.map[4096 * 20 + 20] == 0 and taken(log) == []


def test_a_written_page_that_left_the_page_table_is_still_told(mapped: Mapped, log: WriteLog) -> None:
    mapped.write(5, 6, 700)
    mapped.map.madvise(mmap.MADV_DONTNEED, 0, PAGES * 4096)
    assert {5, 6, 700} <= set(taken(log))
    mapped.write(8)
    assert taken(log) == [8]


def test_more_stretches_than_one_call_tells(mapped: Mapped, log: WriteLog, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dirty_log, "_REGIONS", 7)
    written = [*range(0, 300, 2), *range(400, 420), PAGES - 1]
    mapped.write(*written)
    assert taken(log) == written


def test_it_begins_anew_and_ends(mapped: Mapped, log: WriteLog) -> None:
    mapped.write(1)
    log.start(mapped.address, PAGES * 4096)
    assert log.on and taken(log) == []
    log.stop()
    log.stop()
    mapped.write(2)
    assert not log.on and len(log.take()) == 0


def test_a_page_that_came_from_elsewhere_ends_it(mapped: Mapped, log: WriteLog) -> None:
    """As when a frame is shared with a neighbour: nobody would tell of its writes."""
    libc: Any = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype, libc.mmap.argtypes = (
        ctypes.c_void_p,
        [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long],
    )
    other = os.memfd_create("other")
    os.ftruncate(other, 4096)
    libc.mmap(mapped.address + 4096 * 10, 4096, 3, 0x11, other, 0)
    os.close(other)
    with pytest.raises(PermissionError):
        log.take()


def test_the_bitmap_has_the_lowest_page_in_the_lowest_bit() -> None:
    pages = np.zeros(20, dtype=bool)
    pages[[0, 3, 9, 19]] = True
    assert packed(pages) == bytes([0b1001, 0b10, 0b1000])
