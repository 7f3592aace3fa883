"""RAM of a domain that stands still for a reader while its guest runs on: the kernel copies each page that is written.

The domain's own memfd is mapped privately over the RAM, so that what the guest writes from then on are private copies,
and the memfd stays what it was. Frames that other processes map (rings, granted frames) stay shared; what they held is
kept aside for the reader, at once or before they are shared. When the reader is done, `thaw` brings the private copies
into the memfd, a few at a time, between two instructions of the guest.

Which pages are private copies ``/proc/self/pagemap`` tells: anonymous ones (Documentation/admin-guide/mm/pagemap.rst).
"""

from __future__ import annotations

import errno
import logging
import mmap
import os
import threading
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from hypervisor.devices.link_window import map_memory, unmap_memory, view_of
from hypervisor.errors import HypervisorBug
from hypervisor.host.cow import CowMemory
from hypervisor.host.guest_link_state import LinkTarget
from hypervisor.memory.physical import DomainMemory
from hypervisor.suspended.capture import read_pages
from hypervisor.types import PAGE_SHIFT, PAGE_SIZE

LOG = logging.getLogger(__name__)

STEP = 1024
"""Frames that `thaw` looks at in one go: at most 4 MiB to copy."""
_PRESENT, _SWAPPED, _OF_FILE = (np.uint64(1 << bit) for bit in (63, 62, 61))
_READ_WRITE = mmap.PROT_READ | mmap.PROT_WRITE

Array = np.ndarray[Any, Any]


def open_pagemap() -> int:
    """Before the sandbox closes; -1 if there is none: then nothing can be frozen."""
    try:
        return os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return -1


def freezer(target: LinkTarget, boot: Mapping[str, Any], own: int, pagemap: int) -> Callable[[], FrozenMemory | None]:
    """What freezes the guest's memory, in the run loop's thread; None: it cannot be, and the guest has to wait.

    :param boot: of the guest, with its rings. :param own: the domain's memfd.
    """

    def freeze() -> FrozenMemory | None:
        assert target.machine is not None
        memory = target.machine.memory
        try:
            if isinstance(memory.private, FrozenMemory):  # of which a part could not be thawed
                memory.settle()
            # Pages of a template lie in no memfd of its own, nor do those that a neighbour uses.
            if pagemap < 0 or memory.private is not None or target.shared:
                return None
            rings = {memory.index(boot[name]) for name in ("store_mfn", "console_mfn")}
            return FrozenMemory(memory, own, {*target.mapped, *rings}, pagemap)
        except OSError as exc:
            LOG.warning("the guest's memory cannot be frozen, it waits while it is written: %s", exc)
            return None

    return freeze


class FrozenMemory(CowMemory):
    """For the run loop's thread, but for `read`, `stop`. The guest must not run meanwhile.

    :param memory: all of its RAM is in `own`, the domain's memfd. :param pagemap: see `open_pagemap`.
    :param kept: frames that others map now.
    :raises OSError: it cannot be frozen; then all is as it was.
    """

    def __init__(self, memory: DomainMemory, own: int, kept: Iterable[int], pagemap: int) -> None:
        if memory.private is not None:
            raise HypervisorBug("memory of which a part is private cannot be frozen")
        self._lock = threading.RLock()
        self._pagemap = pagemap
        self._kept: dict[int, Array] = {}
        self._reading = True
        self._at = 0
        pages = memory.max_pages
        for index in sorted({index for index in kept if 0 <= index < pages}):
            self._kept[index] = memory.array[index * 512 : (index + 1) * 512].copy()
        super().__init__(memory, own, own, pages)
        try:
            for index in self._kept:
                self._map_own(index, 1)
        except OSError:  # nothing was written yet
            self._map_own(0, pages)
            raise
        memory.private = self

    # -- for the reader

    def read(self, indexes: Array) -> Array:
        """Pages as they were, by the indexes of their frames. :raises OSError: ECANCELED, they are not any more."""
        with self._lock:
            if not self._reading:
                raise OSError(errno.ECANCELED, "the guest's memory was needed as a whole")
            pages = read_pages(self._own, indexes)
            for row in np.flatnonzero(self._moved[indexes]).tolist():
                pages[row] = self._kept[int(indexes[row])]
            return pages

    def stop(self) -> None:
        """Nothing more will be read."""
        with self._lock:
            self._reading = False
            self._kept.clear()

    # -- for the run loop

    def thaw(self) -> bool:
        """Bring some frames to the memfd, after `stop`; whether some are left. :raises OSError: try again."""
        with self._lock:
            if self._reading:
                raise HypervisorBug("frozen memory is thawed while it is read")
            if self._memory.private is not self:
                return False
            end = min(self._at + STEP, self._pages)
            self._bring(self._at, end)
            self._at = end
            if end == self._pages:
                self._memory.private = None
            return end < self._pages

    def settle(self) -> None:
        with self._lock:
            self.stop()
            self._bring(0, self._pages)

    def share(self, index: int) -> None:
        with self._lock:
            if index >= self._pages or self._moved[index]:
                return
            if self._reading:
                self._kept[index] = read_pages(self._own, np.array([index]))[0]
            super().share(index)

    def punch(self, first: int, count: int) -> None:
        """The reader wants them still: they are made zeros, and given back in `thaw`."""

    def _bring(self, first: int, end: int) -> None:
        for begin, count in list(self._runs(first, end)):
            for start in range(begin, begin + count, STEP):
                size = min(STEP, begin + count - start)
                empty = self._write_back(start, size)
                self._map_own(start, size)
                for index in empty:
                    self._memory.punch(index, 1)

    def _copy(self, first: int, count: int) -> None:
        self._write_back(first, count)

    def _write_back(self, first: int, count: int) -> list[int]:
        """Private copies into the memfd. :returns: those of them that are all zeros."""
        written = self._written(first, count)
        if not written.any():
            return []
        size = count * PAGE_SIZE
        source = self._memory.array[first * 512 : (first + count) * 512].reshape(count, 512)
        at = map_memory(size, _READ_WRITE, mmap.MAP_SHARED, self._own, first * PAGE_SIZE)
        try:
            target = np.frombuffer(view_of(at, size), dtype=np.uint64).reshape(count, 512)
            rows = np.flatnonzero(written)
            target[rows] = source[rows]
            return [first + row for row in rows.tolist() if not target[row].any()]
        finally:
            unmap_memory(at, size)

    def _written(self, first: int, count: int) -> Array:
        data = os.pread(self._pagemap, 8 * count, 8 * ((self._memory.address >> PAGE_SHIFT) + first))
        if len(data) != 8 * count:
            raise OSError(errno.EIO, "pagemap ends early")
        entries = np.frombuffer(data, np.uint64)
        written: Array = ((entries & (_PRESENT | _SWAPPED)) != 0) & ((entries & _OF_FILE) == 0)
        return written
