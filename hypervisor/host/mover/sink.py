"""Records become guest pages. What they say is hostile: every index is checked, and the kernel holds the limit too.

The memory's size is sealed and the process may write no file beyond it (RLIMIT_FSIZE); its descriptors are that memory,
its blobs' spool, the connection and the channel. So whatever arrives can change pages of this one extent, which is
nobody's until the domain runs, and nothing else.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from typing import Any

import numpy as np
import zstandard

from hypervisor.host.mover import wire
from hypervisor.host.mover.pages import runs
from hypervisor.host.mover.wire import BadRecord, Header, Kind
from hypervisor.types import PAGE_SIZE

_KEEP_SIZE_PUNCH_HOLE = 3  # FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE (linux/falloc.h)

_PAGE_EXTRA = 64
"""Bytes of a record besides the page, at most."""

Array = Any


class PageSink:
    """:param memory: descriptor of the domain's memory, `pages` pages; its size is sealed.

    :param marks: a byte for each page, set when it was written; None: nobody wants to know.
    :ivar pages: how many were written, each time counted.

    From `stage` on what is taken is kept aside until `commit`: the memory holds one whole epoch, then the next.
    """

    def __init__(self, memory: int, pages: int, marks: mmap.mmap | None = None) -> None:
        self._marks = np.frombuffer(marks, dtype=np.uint8) if marks is not None else np.zeros(pages, dtype=np.uint8)
        self._memory = memory
        self._limit = pages
        self._decompressor = zstandard.ZstdDecompressor()
        self._page = bytearray(PAGE_SIZE)
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
        self.pages = 0
        self._staged: list[tuple[Header, bytes]] | None = None
        self._staged_bytes = 0

    def stage(self) -> None:
        if self._staged is None:
            self._staged = []

    def commit(self) -> None:
        """Write what was kept aside. :raises BadRecord: nothing was to be, or it is nonsense, written in part."""
        if self._staged is None:
            raise BadRecord("the end of an epoch that was not begun")
        staged, self._staged, self._staged_bytes = self._staged, [], 0
        for head, body in staged:
            self._write_record(head, memoryview(body))

    def take(self, head: Header, body: memoryview) -> None:
        """A record of kind PAGES, FILL or COPY. :raises BadRecord: nothing of it was written, or a whole part."""
        if self._staged is None:
            self._write_record(head, body)
            return
        self._staged_bytes += len(body)
        if self._staged_bytes > self._limit * (PAGE_SIZE + _PAGE_EXTRA) + wire.MAX_DATA:
            raise BadRecord(f"an epoch of more than {self._limit} pages")
        self._staged.append((head, bytes(body)))

    def _write_record(self, head: Header, body: memoryview) -> None:
        if head.kind is Kind.PAGES:
            indexes = self._take_pages(head, body)
        elif head.kind is Kind.FILL:
            indexes = self._take_fill(head.count, body)
        else:
            pairs = np.frombuffer(body, dtype="<u4").reshape(-1, 2)
            self._check(pairs)
            indexes = pairs[:, 0]
            for to, source in pairs.tolist():
                if os.preadv(self._memory, [self._page], source * PAGE_SIZE) != PAGE_SIZE:
                    raise BadRecord(f"page {source} cannot be copied")
                self._write(to, memoryview(self._page))
        # Afterwards: whoever cleared the marks before a page was whole sees this one.
        self._marks[indexes] = 1
        self.pages += head.count

    def _check(self, indexes: Array) -> None:
        if int(indexes.max()) >= self._limit:
            raise BadRecord(f"page {int(indexes.max())} of a memory of {self._limit}")

    def _write(self, index: int, content: memoryview) -> None:
        if os.pwritev(self._memory, [content], index * PAGE_SIZE) != len(content):
            raise OSError("the domain's memory cannot be written")

    def _take_pages(self, head: Header, body: memoryview) -> Array:
        split = head.count * wire.INDEX_BYTES
        indexes = np.frombuffer(body[:split], dtype="<u4")
        self._check(indexes)
        content = body[split:]
        if head.flags & wire.ZSTD:
            content = memoryview(self._unpacked(content, head.count * PAGE_SIZE))
        for first, end in runs(indexes.astype(np.int64)):
            self._write(int(indexes[first]), content[first * PAGE_SIZE : end * PAGE_SIZE])
        return indexes

    def _unpacked(self, frame: memoryview, size: int) -> bytes:
        try:
            # A frame says how long its content is: what says anything else is not unpacked at all.
            if zstandard.frame_content_size(frame) != size:
                raise BadRecord(f"a zstd frame that is not of {size} bytes")
            content = self._decompressor.decompress(frame)
        except zstandard.ZstdError as exc:
            raise BadRecord(f"zstd: {exc}") from exc
        if len(content) != size:
            raise BadRecord(f"a zstd frame that is not of {size} bytes")
        return bytes(content)

    def _take_fill(self, count: int, body: memoryview) -> Array:
        split = count * wire.INDEX_BYTES
        indexes = np.frombuffer(body[:split], dtype="<u4").astype(np.int64)
        words = np.frombuffer(body[split:], dtype="<u8")
        self._check(indexes)
        zero = indexes[words == 0]
        for first, end in runs(zero):
            self._clear(int(zero[first]), end - first)
        for index, word in zip(indexes[words != 0].tolist(), words[words != 0].tolist(), strict=True):
            self._write(index, memoryview(word.to_bytes(8, "little") * (PAGE_SIZE // 8)))
        return indexes

    def _clear(self, first: int, count: int) -> None:
        """Zeros that take no memory."""
        where = (first * PAGE_SIZE, count * PAGE_SIZE)
        if self._libc.fallocate(self._memory, _KEEP_SIZE_PUNCH_HOLE, *where) == 0:
            return
        for index in range(first, first + count):
            self._write(index, memoryview(bytes(PAGE_SIZE)))
