"""Guest pages become records: what of them has to be sent, and in which form. No socket.

Pages are read through the memory's descriptor (holes cost nothing, and stay holes). Of each batch are told apart

* pages that are one word over and over, zeros above all: the word is sent;
* pages that hold what another page held when it was sent: the pair is sent;
* pages that may be written by other processes at any time, and are what was sent last: nothing is sent;
* the rest: sent as they are, or as one zstd frame if that is shorter.

The target may write a pair only if its copy of the other page still holds what was compared here. Since that page was
sent it may have been written; then the next round's bitmap says so, and the page that was sent by naming it is sent
again with it. In the last round nothing is written any more. No hash decides what a guest's memory holds: a
fingerprint of some words proposes a page, and all words are compared.
"""

from __future__ import annotations

import dataclasses
import mmap
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import zstandard

from hypervisor.host.mover import wire
from hypervisor.host.mover.wire import Kind
from hypervisor.types import PAGE_SIZE

_WORDS = PAGE_SIZE // 8
_SAMPLE = np.array([0, 7, 64, 129, 200, 255, 333, 511])
"""Words of a page that its fingerprint is made of."""
_FILLS = 4096
"""Pages of one FILL record."""
_ZSTD_LEVEL = 1
_MAP_NORESERVE = 0x4000

Array = Any
"""A numpy array."""


@dataclasses.dataclass(slots=True)
class Counts:
    """Of a round. :ivar pages: whose bits were set; `zero`, `duplicate`, `unchanged` those of them sent as less."""

    pages: int = 0
    zero: int = 0
    duplicate: int = 0
    unchanged: int = 0

    def to_json(self) -> dict[str, int]:
        return dataclasses.asdict(self)


class PageSource:
    """:param memory: descriptor of the guest's memory, `pages` pages.

    :param compress: try zstd.
    """

    def __init__(self, memory: int, pages: int, *, compress: bool = False) -> None:
        self._memory = memory
        self._pages = pages
        self._compressor = zstandard.ZstdCompressor(level=_ZSTD_LEVEL) if compress else None
        self._sent = np.zeros(pages, dtype=bool)
        slots = 1 << max(10, min(22, pages.bit_length()))
        self._slot_mask = np.uint64(slots - 1)
        self._slots = np.full(slots, -1, dtype=np.int64)
        self._weights = np.frombuffer(os.urandom(8 * len(_SAMPLE)), dtype=np.uint64) | np.uint64(1)
        self._named: list[tuple[Array, Array]] = []
        size = max(1, pages) * PAGE_SIZE
        self._anonymous = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE)
        self._kept = np.frombuffer(self._anonymous, dtype=np.uint64).reshape(-1, _WORDS)
        self._known = np.zeros(pages, dtype=bool)
        self._written = np.zeros(pages, dtype=bool)
        self._buffer = np.zeros((wire.MAX_BATCH, _WORDS), dtype=np.uint64)
        self._scratch = np.zeros((wire.MAX_BATCH, _WORDS), dtype=np.uint64)
        self._copy = self._buffer[:0]
        self._of_copy = np.zeros(0, dtype=np.int64), self._known
        self.counts = Counts()

    def round(self, dirty: bytes, shared: bytes = b"") -> Iterator[list[bytes | memoryview]]:
        """The records of one round, each as the pieces that make it; a piece is good until the next is asked for.

        :param dirty: a bit for each page, the lowest of byte 0 first. :param shared: those of them that may have been
            written unseen.
        """
        yield from self._records(*self._begin(dirty, shared))

    def copy(self, dirty: bytes, shared: bytes = b"") -> None:
        """Take what `round` would send as it is now, for `copied`; the guest stands still meanwhile."""
        indexes, watched = self._begin(dirty, shared)
        if len(self._copy) < len(indexes):
            self._copy = np.empty((len(indexes), _WORDS), dtype=np.uint64)
        self._read(indexes, self._copy)
        self._of_copy = indexes, watched

    def copied(self) -> Iterator[list[bytes | memoryview]]:
        """The records of what `copy` took, as `round`'s, while the guest runs on.

        No page is sent by naming another one: what that one held when the copy was made is not known any more.
        """
        yield from self._records(*self._of_copy, copy=self._copy)

    def _begin(self, dirty: bytes, shared: bytes) -> tuple[Array, Array]:
        """Which pages have to be sent, and which may be written unseen."""
        self.counts = Counts()
        wanted = self._bits(dirty)
        for copied, other in self._named:
            wanted[copied[wanted[other]]] = True
        self._named.clear()
        self._sent &= ~wanted
        return np.flatnonzero(wanted), self._bits(shared)

    def _records(self, indexes: Array, watched: Array, copy: Array = None) -> Iterator[list[bytes | memoryview]]:
        fills: list[tuple[Array, Array]] = []
        for start in range(0, len(indexes), wire.MAX_BATCH):
            batch = indexes[start : start + wire.MAX_BATCH]
            self.counts.pages += len(batch)
            if copy is None:
                yield from self._batch(batch, self._read(batch, self._buffer), watched, fills)
            else:
                yield from self._batch(batch, copy[start : start + len(batch)], watched, fills, twins=False)
            if sum(len(i) for i, _ in fills) >= _FILLS:
                yield from self._flush_fills(fills)
        yield from self._flush_fills(fills)

    def _bits(self, bitmap: bytes) -> Array:
        bits = np.unpackbits(np.frombuffer(bitmap, dtype=np.uint8), bitorder="little", count=self._pages)
        return bits.astype(bool)

    def _batch(
        self, batch: Array, content: Array, watched: Array, fills: list[tuple[Array, Array]], *, twins: bool = True
    ) -> Iterator[list[Any]]:
        old = self._unchanged(batch, content, watched)
        uniform = (content == content[:, :1]).all(axis=1) & ~old
        if uniform.any():
            fills.append((batch[uniform], content[uniform, 0].copy()))
            zero = int(np.count_nonzero(content[uniform, 0] == 0))
            self.counts.zero += zero
            self.counts.duplicate += int(np.count_nonzero(uniform)) - zero
        rest = np.flatnonzero(~uniform & ~old)
        if not len(rest):
            return
        if not twins:
            yield self._raw(batch[rest], content[rest])
            return
        others = self._look_up(batch[rest], content[rest], watched)
        raw, same = rest[others < 0], rest[others >= 0]
        if len(raw):
            yield self._raw(batch[raw], content[raw])
            self._sent[batch[raw]] = True
        if len(same):
            pairs = np.stack((batch[same], others[others >= 0]), axis=1).astype("<u4")
            self._named.append((batch[same], others[others >= 0]))
            self.counts.duplicate += len(same)
            yield [wire.header(Kind.COPY, count=len(pairs), length=pairs.nbytes), pairs.tobytes()]

    def _read(self, indexes: Array, into: Array) -> Array:
        """The pages, run by run."""
        content = into[: len(indexes)]
        view = memoryview(content).cast("B")
        for first, end in runs(indexes):
            wanted = memoryview(view)[first * PAGE_SIZE : end * PAGE_SIZE]
            if os.preadv(self._memory, [wanted], int(indexes[first]) * PAGE_SIZE) != len(wanted):
                raise OSError("the guest's memory is shorter than it should be")
        return content

    # -- what is known of pages that were sent

    def _unchanged(self, batch: Array, content: Array, watched: Array) -> Array:
        """Which pages of a batch are kept and have not changed; what is watched is kept from now on."""
        kept, known = self._kept, self._known
        seen = watched[batch]
        old = seen & known[batch]
        if old.any():
            old[old] = (kept[batch[old]] == content[old]).all(axis=1)
        changed = seen & ~old
        # Where nothing was written yet there are zeros, and take no memory.
        new = changed & (self._written[batch] | content.any(axis=1)) if changed.any() else changed
        kept[batch[new]] = content[new]
        self._written[batch[new]] = True
        # A page that is watched no more may be sent, and changed, without a look at what is kept of it.
        known[batch] = seen
        self.counts.unchanged += int(np.count_nonzero(old))
        return old

    def _look_up(self, batch: Array, content: Array, watched: Array) -> Array:
        """For each page the index of one that was sent and holds the same now; -1: there is none."""
        mixed = (content[:, _SAMPLE] * self._weights).sum(axis=1, dtype=np.uint64)
        slots = ((mixed ^ (mixed >> np.uint64(32))) & self._slot_mask).astype(np.int64)
        found = self._slots[slots]
        others = np.full(len(batch), -1, dtype=np.int64)
        likely = np.flatnonzero(found >= 0)
        likely = likely[self._sent[found[likely]] & ~watched[found[likely]]]
        if len(likely):
            same = (self._read(found[likely], self._scratch) == content[likely]).all(axis=1)
            others[likely[same]] = found[likely[same]]
        fresh = others < 0
        self._slots[slots[fresh]] = batch[fresh]
        return others

    # -- records

    def _raw(self, indexes: Array, content: Array) -> list[bytes | memoryview]:
        numbers = indexes.astype("<u4").tobytes()
        count = len(indexes)
        if self._compressor is not None:
            packed = self._compressor.compress(content)
            if len(packed) < content.nbytes - content.nbytes // 8:
                length = len(numbers) + len(packed)
                return [wire.header(Kind.PAGES, flags=wire.ZSTD, count=count, length=length), numbers, packed]
        body = np.ascontiguousarray(content).data.cast("B")
        return [wire.header(Kind.PAGES, count=count, length=len(numbers) + len(body)), numbers, body]

    def _flush_fills(self, fills: list[tuple[Array, Array]]) -> Iterator[list[bytes | memoryview]]:
        if not fills:
            return
        indexes = np.concatenate([i for i, _ in fills]).astype("<u4")
        words = np.concatenate([w for _, w in fills]).astype("<u8")
        fills.clear()
        length = indexes.nbytes + words.nbytes
        yield [wire.header(Kind.FILL, count=len(indexes), length=length), indexes.tobytes(), words.tobytes()]


def runs(indexes: Array) -> Iterator[tuple[int, int]]:
    """Stretches of consecutive numbers in an array: first position and the one after the last."""
    if not len(indexes):
        return
    breaks = (np.flatnonzero(np.diff(indexes) != 1) + 1).tolist()
    yield from zip([0, *breaks], [*breaks, len(indexes)], strict=True)
