"""Where the library keeps translated code, so that an idle domain can give that memory back.

The library maps one large readable, writable and executable area per engine
and never shrinks what it touched of it. It is found by comparing this
process's mappings before and after the engine is made; if that does not show
exactly one, nothing is ever given back.
"""

from __future__ import annotations

import ctypes
import logging
from typing import Any

LOG = logging.getLogger(__name__)

_MADV_DONTNEED = 4
_SMALLEST = 16 << 20
_KEPT = 64 << 10
"""The start holds code that entering and leaving translated code needs, a page or two of it; it stays."""


def executable_areas() -> set[tuple[int, int]]:
    """(start, end) of the process's large areas that are writable and executable at once."""
    try:
        with open("/proc/self/maps", encoding="ascii", errors="replace") as maps:
            lines = maps.readlines()
    except OSError as exc:
        LOG.warning("translated code will not be given back: no memory map to look at (%s)", exc)
        return set()
    found = set()
    for line in lines:
        span, rights = line.split(" ", 2)[:2]
        if rights.startswith("rwx"):
            start, end = (int(part, 16) for part in span.split("-"))
            if end - start >= _SMALLEST:
                found.add((start, end))
    return found


class CodeBuffer:
    """:param before: `executable_areas` before the engine was made; it is made now."""

    __slots__ = ("_area", "_madvise", "_trim")

    def __init__(self, before: set[tuple[int, int]]) -> None:
        # Areas that touch are shown as one: only what is new counts, and only if it is one piece.
        new = executable_areas() - before
        self._area = new.pop() if len(new) == 1 else None
        libc: Any = ctypes.PyDLL(None, use_errno=True)
        self._madvise = libc.madvise
        self._madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        self._trim = libc.malloc_trim
        self._trim.argtypes = [ctypes.c_size_t]

    @property
    def known(self) -> bool:
        return self._area is not None

    @property
    def area(self) -> tuple[int, int] | None:
        """Its start and end."""
        return self._area

    def release(self) -> None:
        """Give the memory back. All translations must have been dropped, and none may be running."""
        if self._area:
            start, end = self._area
            self._madvise(start + _KEPT, end - start - _KEPT, _MADV_DONTNEED)
            self._trim(0)  # the library's tables of what was there, and what building left
