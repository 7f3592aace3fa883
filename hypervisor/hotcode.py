"""Code of a guest that is on its way here, translated before it arrives.

The source tells which blocks its engine has translated, as addresses; they are hints. What an address means is looked
up in the page tables that have come so far: each level present, for users, accessed, executable, and the page within
the domain. So nothing is translated that the guest itself could not run, and the engine's own walk meets no fault: as
long as nobody writes the memory meanwhile, for then this process may die, and the guest runs on where it is.

Memory still changes until the switch. Frames that were written since, and frames that are not executable any more,
lose their translations again (`HotCode.settle`).
"""

from __future__ import annotations

import array
import time
from collections.abc import Iterable
from typing import Any

import numpy as np

from hypervisor.domain import Domain
from hypervisor.engines.x86 import PTE_A, PTE_ADDR, PTE_NX, PTE_P, PTE_PSE, PTE_US, is_canonical
from hypervisor.memory.frames import L4

_NEED, _CARE = PTE_P | PTE_US | PTE_A, PTE_P | PTE_US | PTE_A | PTE_NX
_MANY_ROOTS = 64
_LOOK_EVERY = 64


class HotCode:
    """:param domain: a 64-bit one, whose engine was reset and runs nothing yet."""

    def __init__(self, domain: Domain) -> None:
        self._domain = domain
        self._frames: set[int] = set()

    def translate(self, addresses: array.array[int], mode: int, seconds: float) -> int:
        """The latest first, for at most so long; how many blocks were translated. The frame table is in place."""
        engine, ahead = self._domain.engine, self._domain.engine.ahead
        if ahead is None or self._domain.config.bits != 64:
            return 0
        until, done, left = time.monotonic() + seconds, 0, list(reversed(addresses))
        ahead.begin(mode)
        for root in self._roots():
            pages: dict[int, bool] = {}
            engine.load_cr3(root)
            later: list[int] = []
            for number, address in enumerate(left):
                if not number % _LOOK_EVERY and time.monotonic() > until:
                    return done
                page = address >> 12
                if page not in pages:
                    pages[page] = self._executable(root, page << 12) and self._executable(root, (page + 1) << 12)
                if not pages[page]:
                    later.append(address)
                elif ahead.translate(address):
                    done += 1
            left = later
        return done

    def _roots(self) -> Iterable[int]:
        """Page-table roots that came with the guest: what one does not map another may."""
        frames, memory = self._domain.frames, self._domain.memory
        found = np.flatnonzero((frames.kind_np == L4) & (frames.count_np != 0))
        return [memory.mpa(int(index)) for index in found[:_MANY_ROOTS]]

    def _executable(self, root: int, va: int) -> bool:
        """Whether the guest can run what is at `va`; its frame is remembered then."""
        memory = self._domain.memory
        if not is_canonical(va):
            return False
        at = root
        for shift in (39, 30, 21, 12):
            table = memory.index(at >> 12)
            if table < 0:
                return False
            entry = memory.words[table * 512 + (va >> shift & 511)]
            if entry & _CARE != _NEED or (entry & PTE_PSE and shift != 12):
                return False
            at = entry & PTE_ADDR
        frame = memory.index(at >> 12)
        if frame >= 0:
            self._frames.add(frame)
        return frame >= 0

    def settle(self, written: np.ndarray[Any, Any]) -> None:
        """The rest of memory and the last frame table are here: drop what is not true any more.

        :param written: which pages were written since before `translate` began, a number other than 0 for each.
        """
        memory, frames = self._domain.memory, self._domain.frames
        used = np.fromiter(self._frames, dtype=np.int64, count=len(self._frames))
        stale = used[(written[used] != 0) | (frames.executed_np[used] == 0)]
        for index in stale.tolist():
            self._domain.engine.memory_written(memory.mpa(index), 4096)
        self._frames.clear()
