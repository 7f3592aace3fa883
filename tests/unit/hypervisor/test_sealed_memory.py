"""Shared memory whose size nobody changes."""

from __future__ import annotations

import os

import pytest

from hypervisor.sealed_memory import sealed_memory


def test_its_size_is_sealed() -> None:
    fd = sealed_memory("test", 8192)
    other = os.dup(fd)
    for size in (0, 4096, 1 << 20):
        with pytest.raises(PermissionError):
            os.ftruncate(other, size)
    assert os.pwrite(fd, b"x", 8191) == 1
    assert (os.fstat(fd).st_size, os.get_inheritable(fd)) == (8192, False)
    os.close(fd)
    os.close(other)


def test_no_descriptor_is_left_of_one_that_cannot_be() -> None:
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(OSError):
        sealed_memory("test", -1)
    assert len(os.listdir("/proc/self/fd")) == before
