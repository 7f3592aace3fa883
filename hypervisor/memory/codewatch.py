"""Keeps translated code true to memory, by frame.

The engine notices a guest's write to code only through the mapping it knows
of; a write through a second (NX) mapping, or by the host, can leave stale
translations. Three rules close the gaps that PV guests meet:

* a mapping without NX is made for a frame whose contents changed since the
  last such mapping: its translations go (a module is loaded where one was);
* a writable mapping of such a frame is removed: they go (the kernel patches
  itself through a temporary alias);
* the host writes to such a frame: they go.
"""

from __future__ import annotations

import zlib
from typing import Any, Protocol

import numpy as np

from hypervisor.memory.frames import FrameTable
from hypervisor.memory.physical import DomainMemory
from hypervisor.types import PAGE_SIZE


class Translations(Protocol):
    def memory_written(self, mpa: int, size: int) -> None: ...


class CodeWatch:
    """One domain's executable frames. Rebuilt empty after a restore: the engine then has no translations."""

    __slots__ = ("_digest", "_engine", "_frames", "_memory")

    def __init__(self, memory: DomainMemory, frames: FrameTable, engine: Translations) -> None:
        self._memory = memory
        self._frames = frames
        self._engine = engine
        self._digest: dict[int, int] = {}

    def _sum(self, index: int) -> int:
        return zlib.crc32(self._memory.page(index))

    def mapped_executable(self, index: int) -> None:
        """A mapping without NX of the frame was made."""
        if not 0 <= index < self._frames.size:
            return  # granted by another domain, whose frames are not watched
        executed = self._frames.executed
        digest = self._sum(index)
        if executed[index] and self._digest.get(index) != digest:
            self._engine.memory_written(self._memory.mpa(index), PAGE_SIZE)
        executed[index] = 1
        self._digest[index] = digest

    def mapped_executable_many(self, indexes: np.ndarray[Any, Any]) -> None:
        if not indexes.size:
            return
        known = indexes[self._frames.executed_np[indexes] != 0]
        for index in known.tolist():
            self.mapped_executable(index)
        # Digests of first mappings are taken when they are mapped again: unknown counts as changed.
        self._frames.executed_np[indexes] = 1

    def changed(self, index: int) -> None:
        """The frame may have been written through another mapping, or was written by the host."""
        self._engine.memory_written(self._memory.mpa(index), PAGE_SIZE)
        self._digest.pop(index, None)

    def changed_many(self, indexes: np.ndarray[Any, Any]) -> None:
        if indexes.size:
            for index in indexes[self._frames.executed_np[indexes] != 0].tolist():
                self.changed(index)

    def host_wrote(self, index: int) -> None:
        if self._frames.executed[index]:
            self.changed(index)
