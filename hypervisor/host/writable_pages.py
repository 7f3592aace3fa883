"""Pages of a guest that driver processes can write to through mappings of their own, which no log of writes sees."""

from __future__ import annotations

import collections


class WritablePages:
    """`mapped` and `unmapped` belong to one thread, the rest to any one other."""

    def __init__(self) -> None:
        self._now: collections.Counter[int] = collections.Counter()
        self._gone: collections.deque[int] | None = None

    def mapped(self, page: int) -> None:
        self._now[page] += 1

    def unmapped(self, page: int) -> None:
        gone = self._gone
        if gone is not None:  # first: at no moment is it neither mapped nor gone
            gone.append(page)
        self._now[page] -= 1
        if not self._now[page]:
            del self._now[page]

    def watch(self, on: bool) -> None:
        """Whether `take` is to tell of pages that are not mapped any more."""
        self._gone = collections.deque() if on else None

    def take(self) -> set[int]:
        """Pages that can be written to now, and those that could at some time since the last call."""
        gone = self._gone
        pages = set(self._now.copy())
        while gone:
            pages.add(gone.popleft())
        return pages
