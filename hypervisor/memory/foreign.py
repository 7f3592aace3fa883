"""Leaf entries of a domain that map frames of other domains: only a grant makes them.

The owner counts the uses of its frames; here is remembered whom to tell when
such an entry goes, in whatever way it goes.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

from hypervisor.engines.x86 import PTE_ADDR, PTE_RW


class FrameOwner(Protocol):
    """The domain that a mapped frame belongs to."""

    def drop(self, mfn: int, *, writable: bool) -> None:
        """A mapping of the frame is gone; a writable one may have written."""
        ...


class ForeignFrames:
    """The foreign mappings of one domain; false when it has none. Not saved: a domain that is saved has none."""

    __slots__ = ("_uses",)

    def __init__(self) -> None:
        self._uses: dict[tuple[int, bool], tuple[FrameOwner, int]] = {}

    def __len__(self) -> int:
        return len(self._uses)

    def __contains__(self, entry: int) -> bool:
        """Whether a page-table entry maps a frame that it may."""
        return ((entry & PTE_ADDR) >> 12, bool(entry & PTE_RW)) in self._uses

    def add(self, owner: FrameOwner, mfn: int, *, writable: bool) -> None:
        """An entry was made that `owner` has counted already."""
        _, count = self._uses.get((mfn, writable), (owner, 0))
        self._uses[mfn, writable] = (owner, count + 1)

    def left(self, entry: int) -> None:
        """A page-table entry is gone."""
        key = ((entry & PTE_ADDR) >> 12, bool(entry & PTE_RW))
        owner, count = self._uses.pop(key)
        if count > 1:
            self._uses[key] = (owner, count - 1)
        owner.drop(key[0], writable=key[1])

    def left_table(self, entries: np.ndarray[Any, Any], base: int, size: int) -> np.ndarray[Any, Any]:
        """A table with these present entries is gone; those of them that map frames `base` .. `base` + `size` - 1."""
        mfns = (entries & np.uint64(PTE_ADDR)) >> np.uint64(12)
        own = (mfns >= base) & (mfns < base + size)
        for entry in entries[~own].tolist():
            self.left(entry)
        return entries[own]

    def release(self) -> None:
        """All entries are gone: the domain runs no more."""
        uses, self._uses = self._uses, {}
        for (mfn, writable), (owner, count) in uses.items():
            for _ in range(count):
                owner.drop(mfn, writable=writable)
