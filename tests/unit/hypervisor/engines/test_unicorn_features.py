"""Feature words are found wherever the engine's memory ends."""

from __future__ import annotations

import ctypes
import mmap
import struct
from collections.abc import Iterator

import pytest

from hypervisor.engines.unicorn.features import find

WORDS = struct.pack("<8Q", 11, 22, 3, 4, 5, 6, 77, 88)
PAGE = mmap.PAGESIZE
PROT_RW, PRIVATE_ANONYMOUS = 3, 0x22


def cpuid(leaf: int, _subleaf: int) -> tuple[int, int, int, int]:
    return {1: (0, 0, 22, 11), 0x8000_0001: (0, 0, 88, 77)}[leaf]


@pytest.fixture
def page() -> Iterator[int]:
    """Address of a page with no memory behind it."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    at = libc.mmap(None, 2 * PAGE, PROT_RW, PRIVATE_ANONYMOUS, -1, 0)
    assert libc.munmap(at + PAGE, PAGE) == 0
    yield at
    libc.munmap(at, PAGE)


def test_the_memory_may_end_soon_behind_the_words(page: int) -> None:
    last = page + PAGE - len(WORDS)
    ctypes.memmove(last, WORDS, len(WORDS))
    assert find(page, 256, cpuid) == last
    assert find(page, PAGE - 56, cpuid) == 0
    assert find(page, PAGE, cpuid) == 0
