"""Tests that end drivers and servers without a word, as SIGKILL does, leave descriptors that the kernel would close."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator

_frozen = False


def as_the_kernel_does() -> Iterator[None]:
    """Body of a fixture: what is open after a test and was not before is closed, objects' own descriptors by them."""
    global _frozen
    if not _frozen:
        gc.collect()
        gc.freeze()  # or each collection would look at all that was imported
        _frozen = True
    before = _open()
    yield
    gc.collect()
    for fd in _open() - before:
        try:
            os.close(fd)
        except OSError:
            continue  # the folder's own, of the listing


def _open() -> set[int]:
    return {int(name) for name in os.listdir("/proc/self/fd")}
