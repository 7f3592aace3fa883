"""RAM of a domain that begins as a copy of another's: pages of a template, copied by the kernel when they are written.

The template is a file that nobody changes, with the same pages in the same order. It is mapped privately over the RAM
of the domain's extent, so that clones share what none of them has written. Nobody but the domain process sees such a
page: a frame that others map too (rings of the host process, granted frames of driver processes) is *moved* first: its
contents are copied to its place in the domain's own memfd, and that is mapped over it, where engine and Python find it
at the address it always had. A moved frame stays there.

Each moved frame costs the process up to two memory areas of some 65000, and none when its neighbours moved too.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from typing import Any

import numpy as np

from hypervisor.devices.link_window import map_memory, unmap_memory, view_of
from hypervisor.memory.physical import DomainMemory
from hypervisor.types import PAGE_SIZE

MAX_MOVED = 20000
"""Frames moved one by one; beyond that all of them go at once."""
_CHUNK = 256
_READ_WRITE = mmap.PROT_READ | mmap.PROT_WRITE
_MAP_FIXED = 0x10
_MAP_NORESERVE = 0x4000

Array = np.ndarray[Any, Any]


class CowMemory:
    """For the run loop's thread: the guest must not run while frames move.

    :param memory: its first `pages` pages become the template's. Nothing of them may be in use yet.
    :param own: the domain's memfd, which must be empty there; has to stay open.
    :param template: used here only, and not owned.
    :raises OSError.
    """

    def __init__(self, memory: DomainMemory, own: int, template: int, pages: int) -> None:
        self._memory = memory
        self._own = own
        self._pages = pages
        self._moved = np.zeros(pages, bool)
        private = mmap.MAP_PRIVATE | _MAP_FIXED | _MAP_NORESERVE
        map_memory(pages * PAGE_SIZE, _READ_WRITE, private, template, 0, memory.address)

    def __len__(self) -> int:
        """Frames that still are the template's or private copies."""
        return self._pages - int(np.count_nonzero(self._moved))

    def among(self, indexes: Array) -> Array:
        """Which of some frames are the template's or private copies, a bool for each."""
        inside = indexes < self._pages
        return inside & ~self._moved[np.where(inside, indexes, 0)]

    def share(self, index: int) -> None:
        """From now on the frame is where others can see it: in the domain's memfd. :raises OSError."""
        if index >= self._pages or self._moved[index]:
            return
        if self._pages - len(self) >= MAX_MOVED:
            self.settle()
            return
        self._copy(index, 1)
        self._map_own(index, 1)

    def settle(self) -> None:
        """Move all frames. :raises OSError: some are not moved; it can be tried again."""
        for first, count in list(self._runs(0, self._pages)):
            for start in range(first, first + count, _CHUNK):
                self._copy(start, min(_CHUNK, first + count - start))
            self._map_own(first, count)

    def punch(self, first: int, count: int) -> None:
        """Frames that the guest gave back: they read as zeros and cost nothing. :raises OSError."""
        for start, size in list(self._runs(first, min(first + count, self._pages))):
            self._map_own(start, size)  # nothing was ever written there

    def _runs(self, first: int, end: int) -> Iterator[tuple[int, int]]:
        """Neighbours that have not moved: the first one, and how many."""
        still = np.zeros(max(0, end - first) + 2, np.int8)
        still[1:-1] = ~self._moved[first:end]
        edges = np.flatnonzero(np.diff(still)).reshape(-1, 2)
        for begin, behind in edges.tolist():
            yield first + begin, behind - begin

    def _copy(self, first: int, count: int) -> None:
        """To the memfd; pages of zeros stay holes there."""
        size = count * PAGE_SIZE
        source = self._memory.array[first * 512 : (first + count) * 512].reshape(count, 512)
        filled = source.any(axis=1)
        if not filled.any():
            return
        # Not by pwrite: the limit to files (RLIMIT_FSIZE) is one to memfds, too.
        at = map_memory(size, _READ_WRITE, mmap.MAP_SHARED, self._own, first * PAGE_SIZE)
        try:
            target = np.frombuffer(view_of(at, size), dtype=np.uint64).reshape(count, 512)
            target[filled] = source[filled]
        finally:
            unmap_memory(at, size)

    def _map_own(self, first: int, count: int) -> None:
        at = self._memory.address + first * PAGE_SIZE
        map_memory(count * PAGE_SIZE, _READ_WRITE, mmap.MAP_SHARED | _MAP_FIXED, self._own, first * PAGE_SIZE, at)
        self._moved[first : first + count] = True
