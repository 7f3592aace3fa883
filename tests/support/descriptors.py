"""Tests that end drivers and servers without a word, as SIGKILL does, leave descriptors that the kernel would close."""

from __future__ import annotations

import contextlib
import gc
import io
import mmap
import os
import select
import socket
from collections.abc import Iterator

import pytest

_frozen = False
_OWNERS = (socket.socket, io.FileIO, select.epoll)


def as_the_kernel_does(request: pytest.FixtureRequest) -> Iterator[None]:
    """Body of a fixture: what is open after a test and was not before is closed, objects' own descriptors by them.

    A number that an object still has is left alone: the object would close it once more, one day, and by then it may
    be anybody's. (SQLite's locks were lost to that: "locking protocol", in a test that had nothing to do with it.)
    """
    global _frozen
    if not _frozen:
        gc.collect()
        gc.freeze()  # or each collection would look at all that was imported
        _frozen = True
    before = _open()
    yield
    request.node.funcargs.clear()  # pytest keeps what fixtures made until after their teardown
    gc.collect()
    if left := _open() - before:
        for fd in left - _owned(left):
            with contextlib.suppress(OSError):  # a thread that still ends has just closed it
                os.close(fd)


def _open() -> set[int]:
    found = {int(name) for name in os.listdir("/proc/self/fd")}
    return {fd for fd in found if os.path.exists(f"/proc/self/fd/{fd}")}  # not the folder's own, of the listing


def _owned(left: set[int]) -> set[int]:
    """Descriptors of objects that live. Which ones a `mmap` has cannot be asked: while there is one, all of `left`."""
    found = set()
    for item in gc.get_objects():
        if isinstance(item, mmap.mmap) and not item.closed:
            return left
        if isinstance(item, _OWNERS) and not getattr(item, "closed", False):
            found.add(item.fileno())
    return found
