"""The source's disk as a mirror reads it: what is still to be sent, and the next message of it.

All of it is done by one thread of the mirror's own, since it waits for disks. What is to be sent is a bitmap, so a
round can end at any message and the next one goes on where it was. A bit is cleared before its cluster is read.
"""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Iterator

from hypervisor.devices.block.disk import View
from hypervisor.devices.block.image.base import Action, Operation
from hypervisor.devices.block.image.nbd_status import ZERO
from hypervisor.devices.block.mirror import wire
from hypervisor.devices.block.mirror.wire import MAX_DATA, MAX_EXTENTS, Extent
from hypervisor.devices.block.written import clear_bits, runs, set_bits
from hypervisor.errors import MigrationFailed

STEP = 1 << 16
"""Zeroes are looked for in pieces of so many bytes."""
_NOTHING = bytes(STEP)
_GLANCE = 32
_MAX_RUNS = MAX_EXTENTS - MAX_DATA // STEP
"""Of one message: looking for zeroes may cut them."""
TOP = 1
"""Allocation depth of what lies in the image itself and not in a backing file."""


class DiskReader:
    """:param name: of the disk, for people. :param size: bytes. :param cluster: bytes of a bit.

    :param top: only what lies in the image itself is copied: the target has its backing files.
    """

    def __init__(self, name: str, index: int, size: int, cluster: int, *, top: bool) -> None:
        self.name = name
        self.pending = bytearray((-(-size // cluster) + 7) // 8)
        self._index = index
        self._size = size
        self._cluster = cluster
        self._top = top
        # What the target may have that is not zero there: only the rest need not be told of zeroes.
        self._sent = bytearray(len(self.pending))
        self._at = 0
        self._buffer = memoryview(mmap.mmap(-1, MAX_DATA))

    def left(self) -> int:
        """Bytes that are to be sent, as far as is known here."""
        return int.from_bytes(self.pending, "little").bit_count() * self._cluster

    def add(self, bits: bytes) -> None:
        """These clusters were written."""
        both = int.from_bytes(self.pending, "little") | int.from_bytes(bits[: len(self.pending)], "little")
        self.pending[:] = both.to_bytes(len(self.pending), "little")

    def everything(self, view: View) -> None:
        """All that is there, and what was there when it was sent. :raises ImageGone. :raises MigrationFailed."""
        found = bytearray(self._sent)
        try:
            for offset, length in self._allocated(view):
                set_bits(found, offset // self._cluster, -(-(offset + length) // self._cluster))
        except OSError as exc:
            raise MigrationFailed(f"disk {self.name} cannot be read: {exc.strerror}: look at the image") from exc
        self.pending[:] = found
        self._at = 0

    def message(self, view: View, number: int) -> tuple[int, int] | None:
        """The next message as a file of memory, and its bytes of data; None when nothing is left.

        :raises ImageGone: the daemon behind the image has ended; what it was about is pending again.
        :raises MigrationFailed: the image cannot be read.
        """
        while found := self._take():
            try:
                extents, pieces = self._read(view, found)
            except BaseException:
                for first, end in found:
                    set_bits(self.pending, first, end)
                raise
            if extents:
                return _file(wire.extents(self._index, number, extents, pieces)), sum(map(len, pieces))
        return None

    # -- inside

    def _allocated(self, view: View) -> Iterator[tuple[int, int]]:
        if view.status is not None:
            for offset, length, value in view.status.extents(0, self._size):
                if value == TOP if self._top else not value & ZERO:
                    yield offset, length
            return
        at = 0
        while at < self._size:
            try:
                start = os.lseek(view.fd, at, os.SEEK_DATA)
                at = min(os.lseek(view.fd, start, os.SEEK_HOLE), self._size)
            except OSError as exc:
                if exc.errno == errno.ENXIO:
                    return
                if exc.errno != errno.EINVAL:
                    raise
                start, at = at, self._size  # a block device, which does not tell
            if start < at:
                yield start, at - start

    def _take(self) -> list[tuple[int, int]]:
        """Runs of clusters for one message, and clear their bits; those behind the last ones first, then from 0."""
        found: list[tuple[int, int]] = []
        room = MAX_DATA // self._cluster
        for begin in (self._at, 0):
            for first, end in runs(self.pending, begin):
                end = min(end, first + room)
                if found and found[-1][1] == first:
                    found[-1] = (found[-1][0], end)
                else:
                    found.append((first, end))
                room -= end - first
                if not room or len(found) == _MAX_RUNS:
                    break
            if found:
                break
        for first, end in found:
            clear_bits(self.pending, first, end)
            self._at = end
        return found

    def _read(self, view: View, found: list[tuple[int, int]]) -> tuple[list[Extent], list[memoryview]]:
        operations: list[Operation] = []
        at = 0
        for first, end in found:
            offset = first * self._cluster
            length = min(end * self._cluster, self._size) - offset
            operations.append(Operation(Action.READ, offset, length, [self._buffer[at : at + length]]))
            at += length
        view.image.run(operations)
        extents: list[Extent] = []
        pieces: list[memoryview] = []
        for operation in operations:
            if operation.error:
                why = os.strerror(operation.error)
                raise MigrationFailed(
                    f"disk {self.name} cannot be read at {operation.offset} ({why}): repair the image or its disk"
                )
            self._sort(operation.offset, operation.pieces[0], extents, pieces)
        return extents, pieces

    def _sort(self, offset: int, data: memoryview, extents: list[Extent], pieces: list[memoryview]) -> None:
        """Append what is to be said of a run that was read."""
        for at in range(0, len(data), STEP):
            piece = data[at : at + STEP]
            where = offset + at
            first, end = where // self._cluster, -(-(where + len(piece)) // self._cluster)
            zero = not any(piece[:_GLANCE]) and bytes(piece) == _NOTHING[: len(piece)]
            if zero and not self._top and not self._is_sent(first, end):
                continue
            set_bits(self._sent, first, end)
            last = extents[-1] if extents else None
            if last is not None and last.offset + last.length == where and last.zero == zero:
                extents[-1] = Extent(last.offset, last.length + len(piece), zero)
            else:
                extents.append(Extent(where, len(piece), zero))
            if not zero:
                pieces.append(piece)

    def _is_sent(self, first: int, end: int) -> bool:
        return next(runs(self._sent[first >> 3 : (end + 7) >> 3], first & 7), (end,))[0] + (first & ~7) < end


def _file(parts: list[bytes | memoryview]) -> int:
    fd = os.memfd_create("reeve-mirror", os.MFD_CLOEXEC)
    try:
        os.writev(fd, parts)
        if os.lseek(fd, 0, os.SEEK_CUR) != sum(map(len, parts)):
            raise MigrationFailed("no memory for a message of a mirror: try again")
    except BaseException:
        os.close(fd)
        raise
    return fd
