"""A domain's machine memory as the hypervisor sees it: views over one mapping of its memfd.

Frames are addressed by *index*: 0 .. frames-1 inside the domain's own extent
(`hypervisor.memory.layout`). Nothing here can name a frame of another domain.
"""

from __future__ import annotations

import collections
import ctypes
import mmap
from typing import Any, Protocol

import numpy as np

from hypervisor.memory import layout
from hypervisor.types import PAGE_SHIFT, PAGE_SIZE


class PrivatePages(Protocol):
    """Pages that are not in the domain's memfd: a template's, or private copies of them (`hypervisor.host.cow`)."""

    def share(self, index: int) -> None:
        """Bring one into the memfd. :raises OSError."""

    def punch(self, first: int, count: int) -> None:
        """The same, as zeros. :raises OSError."""

    def settle(self) -> None:
        """Bring all of them there. :raises OSError."""

    def among(self, indexes: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Which of them are private, a bool for each."""


class DomainMemory:
    """Views over the mapping.

    :ivar bytes: unsigned bytes by offset; ``words`` 64-bit and ``dwords`` 32-bit by offset / size.
    :ivar array: the same as numpy uint64.
    :ivar frames: number of frames, RAM and Xen's together.
    :ivar punched: collects what was given back to the host (first index, count), which no log of writes tells; None:
        nobody wants to know.
    :ivar private: what is not in the memfd yet, and so can be seen by nobody else; None: all of it is there.
    """

    __slots__ = (
        "_anchor",
        "_mapping",
        "array",
        "base_mfn",
        "bytes",
        "dwords",
        "frames",
        "max_pages",
        "private",
        "punched",
        "words",
    )

    def __init__(self, mapping: mmap.mmap, base_mfn: int, max_pages: int) -> None:
        self.frames = layout.total_frames(max_pages)
        if len(mapping) < self.frames * PAGE_SIZE:
            raise ValueError(f"mapping has {len(mapping)} bytes, {self.frames * PAGE_SIZE} are needed")
        if not 0 < base_mfn <= layout.MAX_MFN - self.frames:
            raise ValueError(f"base_mfn {base_mfn:#x} is outside the host's frames")
        self.punched: collections.deque[tuple[int, int]] | None = None
        self.private: PrivatePages | None = None
        self._mapping = mapping
        self._anchor: Any = ctypes.c_char.from_buffer(mapping)
        self.base_mfn = base_mfn
        self.max_pages = max_pages
        self.bytes = memoryview(mapping)[: self.frames * PAGE_SIZE]
        self.words = self.bytes.cast("Q")
        self.dwords = self.bytes.cast("I")
        self.array = np.frombuffer(mapping, dtype=np.uint64, count=self.frames * 512)

    @property
    def address(self) -> int:
        """Host address of the mapping, for the engine."""
        return ctypes.addressof(self._anchor)

    @property
    def base_mpa(self) -> int:
        return self.base_mfn << PAGE_SHIFT

    def index(self, mfn: int) -> int:
        """Index of a machine frame, or -1 when it is not in this domain's extent."""
        index = mfn - self.base_mfn
        return index if 0 <= index < self.frames else -1

    def offset(self, mpa: int) -> int:
        """Offset of a machine address, or -1 when it is not in this domain's extent."""
        offset = mpa - (self.base_mfn << PAGE_SHIFT)
        return offset if 0 <= offset < self.frames << PAGE_SHIFT else -1

    def mfn(self, index: int) -> int:
        return self.base_mfn + index

    def mpa(self, index: int) -> int:
        return (self.base_mfn + index) << PAGE_SHIFT

    def page(self, index: int) -> memoryview:
        return self.bytes[index << PAGE_SHIFT : (index + 1) << PAGE_SHIFT]

    def clear_page(self, index: int) -> None:
        self.array[index * 512 : (index + 1) * 512] = 0

    def punch(self, first: int, count: int) -> None:
        """Give frames back to the host: they read as zeros, and cost nothing until they are written again."""
        if self.private is not None:
            self.private.punch(first, count)
        try:
            self._mapping.madvise(mmap.MADV_REMOVE, first << PAGE_SHIFT, count << PAGE_SHIFT)
        except OSError:  # memory of a kind that cannot be punched (private, hugetlbfs)
            self.array[first * 512 : (first + count) * 512] = 0
        punched = self.punched
        if punched is not None:  # afterwards: whoever reads the page because of this sees zeros
            punched.append((first, count))

    def share(self, index: int) -> None:
        """From now on a frame is where other processes can see it. The guest must not run. :raises OSError."""
        if self.private is not None:
            self.private.share(index)

    def settle(self) -> None:
        """The same for all frames, for whoever reads the memfd as a whole. :raises OSError."""
        if self.private is not None:
            self.private.settle()
            self.private = None

    def copy_page(self, to: int, source: int) -> None:
        self.array[to * 512 : (to + 1) * 512] = self.array[source * 512 : (source + 1) * 512]
