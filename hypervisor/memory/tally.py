"""Are a frame table and the page tables of one mind? As `hypervisor.memory.recount`, but fast, and in two goes.

A first look counts what every table uses, while there is time; a later one counts anew only those that changed since,
or became tables, or ceased to be. It gives no reasons: who needs them recounts.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from hypervisor.engines.x86 import PTE_ADDR, PTE_P, PTE_RW
from hypervisor.memory.frames import HELD, L1, NONE, WRITABLE
from hypervisor.memory.pagetables import PageTables

_KINDS = 8
_MANY = 8192
_P, _RW, _ADDR, _12 = np.uint64(PTE_P), np.uint64(PTE_RW), np.uint64(PTE_ADDR), np.uint64(12)

Array = Any
"""A numpy array."""


class Tally:
    """What the tables of one domain use. Good for domains without linear entries and without frames of others."""

    def __init__(self, tables: PageTables) -> None:
        self._tables = tables
        self._frames = frames = tables.frames
        self._indexes = np.zeros(0, dtype=np.int64)
        self._kinds = np.zeros(0, dtype=np.uint8)
        self._rows = np.zeros((0, 512), dtype=np.uint64)
        self._size = frames.size
        # How often a frame is used as each kind (NONE: as any), one kind after the other.
        self._uses = np.zeros(_KINDS * frames.size, dtype=np.int32)
        self._is_table = np.zeros(_KINDS, dtype=bool)
        self._is_table[list(tables.TABLES)] = True
        self._outside = 0
        self._own = {kind: tables.own_slots(kind) for kind in tables.TABLES}
        self._wanted = {
            kind: np.array([tables.wanted(kind, slot, 0) for slot in range(512)], dtype=np.uint8)
            for kind in tables.TABLES
            if kind != L1
        }

    def look(self) -> None:
        """Count the tables as they are now, by the frame table as it is now."""
        frames = self._frames
        indexes = np.flatnonzero(self._is_table[frames.kind_np] & (frames.count_np != 0))
        kinds = frames.kind_np[indexes]
        rows = self._tables.memory.array.reshape(-1, 512)[indexes]
        position = np.full(self._size, -1, dtype=np.int64)
        position[self._indexes] = np.arange(len(self._indexes))
        new = np.flatnonzero(position[indexes] >= 0)
        old = position[indexes[new]]
        same = (self._kinds[old] == kinds[new]) & (self._rows[old] == rows[new]).all(axis=1)
        gone = np.ones(len(self._indexes), dtype=bool)
        gone[old[same]] = False
        come = np.ones(len(indexes), dtype=bool)
        come[new[same]] = False
        self._count(self._indexes[gone], self._kinds[gone], self._rows[gone], -1)
        self._count(indexes[come], kinds[come], rows[come], 1)
        self._indexes, self._kinds, self._rows = indexes, kinds, rows

    def _count(self, indexes: Array, kinds: Array, rows: Array, sign: int) -> None:
        for kind, own in self._own.items():
            chosen = kinds == kind
            if not chosen.any():
                continue
            table = rows[chosen]
            which, slots = np.nonzero(((table & _P) != 0) & own)
            entries = table[which, slots]
            targets = ((entries & _ADDR) >> _12).astype(np.int64) - self._tables.base
            if kind == L1:
                wanted = np.where((entries & _RW) != 0, np.uint8(WRITABLE), np.uint8(NONE))
            else:
                wanted = self._wanted[kind][slots]
            inside = (targets >= 0) & (targets < self._size)
            self._outside += sign * int(np.count_nonzero(~inside))
            if kind != L1:
                inside &= targets != indexes[chosen][which]  # an entry to the table itself takes no reference
            at = wanted[inside].astype(np.int64) * self._size + targets[inside]
            if len(at) > _MANY:
                self._uses += sign * np.bincount(at, minlength=len(self._uses)).astype(np.int32)
            else:
                np.add.at(self._uses, at, sign)

    def agrees(self, holds: Iterable[tuple[int, int]]) -> bool:
        """Whether the frame table counts just that. :param holds: as of `hypervisor.memory.recount.recount`."""
        self.look()
        frames = self._frames
        if self._outside or self._tables.linear.save():
            return False
        uses = self._uses.reshape(_KINDS, -1)
        used = uses[1:] != 0
        kinds_fit = bool((frames.kind_np == np.arange(1, _KINDS, dtype=np.uint8)[:, None])[used].all())
        typed = uses[1:].sum(axis=0, dtype=np.int32)
        count = typed + np.frombuffer(bytes(frames.pinned), dtype=np.uint8)
        refs = typed + uses[0] + (frames.refs_np != 0)
        count[frames.ram :] += frames.refs_np[frames.ram :] != 0
        pinned = np.frombuffer(bytes(frames.pinned[: frames.ram]), dtype=np.uint8)
        refs[: frames.ram] = (typed + uses[0])[: frames.ram] + (frames.holding_np == HELD) + pinned
        for index, kind in holds:
            refs[index] += 1
            if kind != NONE:
                count[index] += 1
                kinds_fit = kinds_fit and frames.kind[index] == kind
        return kinds_fit and bool((frames.count_np == count).all() and (frames.refs_np == refs).all())
