"""What a disk's storage daemon may still hold back, kept where its death does not reach.

A daemon writes the tables of a qcow2 image when it is told to flush, or as it likes. One that is killed takes them
along, and with them what the guest was told to be written. A guest cannot be told either: Linux's blkfront takes a
flush without data that failed for one that is not supported, and reports success (drivers/block/xen-blkfront.c,
``blkif_interrupt``). So whatever changes the image is written down here first, and given to the next daemon
again (`hypervisor.devices.block.kept`). A flush that was done empties it.

It lies in a file of memory that the host process makes and hands to the driver, so it outlives a driver's SIGKILL::

    one page    magic, then words of 64 bits: first, end, known, daemon, served
    the rest    records from `first` to `end`, in the order in which they were begun; see `_RECORD`

A word is one store, so a driver that is killed leaves the word of before or the one of after it. A record counts once
`end` lies behind it.
"""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Iterator

from hypervisor.devices.block.image.base import Action, Operation
from hypervisor.sealed_memory import sealed_memory

ROOM = 1 << 25
"""Bytes; a full one costs a flush. Above what one request can carry by far (`ring.MAX_INDIRECT` pages)."""
KEPT = 1 << 21
"""Bytes of memory that stay with a disk whose guest writes little."""

_MAGIC = b"reeveunf"
_PAGE = mmap.PAGESIZE
_RECORD = struct.Struct("<Q4xIQ")  # offset, action, length; a write's bytes follow, up to a multiple of 8
_FIRST, _END, _KNOWN, _DAEMON, _SERVED = range(1, 6)


class Unflushed:
    """One disk's, mapped; see `create` and `attach`.

    :ivar fd: of the file, owned.
    """

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._map = mmap.mmap(fd, _PAGE + ROOM)
        self._words = memoryview(self._map)[:_PAGE].cast("Q")
        self._data = memoryview(self._map)[_PAGE:]
        self._touched = ROOM

    @classmethod
    def create(cls, *, known: bool) -> Unflushed:
        """:param known: nothing that is not in it can be unflushed."""
        fd = sealed_memory("reeve-unflushed", _PAGE + ROOM)
        try:
            os.pwrite(fd, _MAGIC, 0)
            made = cls(fd)
        except BaseException:
            os.close(fd)
            raise
        made._words[_KNOWN] = known
        return made

    @classmethod
    def attach(cls, fd: int) -> Unflushed:
        """One that the host process has made; `fd` is owned from here on. :raises ValueError: it is none."""
        try:
            if os.fstat(fd).st_size != _PAGE + ROOM or os.pread(fd, len(_MAGIC), 0) != _MAGIC:
                raise ValueError("this is no record of what is unflushed")
            found = cls(fd)
        except BaseException:
            os.close(fd)
            raise
        if found.empty:
            # A driver may have been killed in `drop`.
            found._words[_FIRST] = found._words[_END] = 0
        return found

    def close(self) -> None:
        """Let go of it; it lives as long as somebody holds it."""
        if self.fd >= 0:
            self._words.release()
            self._data.release()
            self._map.close()
            os.close(self.fd)
            self.fd = -1

    # -- the host process's

    def daemon_ended(self) -> None:
        """What is here is to be written again, to the next daemon."""
        self._words[_DAEMON] += 1

    @property
    def stale(self) -> bool:
        """A daemon has ended, and what it may have taken along was not written again yet."""
        return self._words[_SERVED] != self._words[_DAEMON]

    @property
    def known(self) -> bool:
        """All that a daemon may hold back is here. No: it was begun while a daemon was in use already."""
        return bool(self._words[_KNOWN])

    @property
    def empty(self) -> bool:
        return self._words[_FIRST] >= self._words[_END]

    # -- the driver's

    @property
    def end(self) -> int:
        """Behind the last record; for `drop`."""
        return self._words[_END]

    @property
    def daemon(self) -> int:
        """Grows with each that ended."""
        return self._words[_DAEMON]

    def append(self, operation: Operation) -> bool:
        """Keep a change that is about to be made. False: there is no room, and nothing was kept.

        The guest may change the bytes meanwhile: then either are what it wrote.
        """
        size = operation.length if operation.action == Action.WRITE else 0
        at = self._words[_END]
        end = at + _RECORD.size + (size + 7 & ~7)
        if end > ROOM:
            return False
        data = self._data
        _RECORD.pack_into(data, at, operation.offset, operation.action, operation.length)
        at += _RECORD.size
        for piece in operation.pieces if size else ():
            data[at : at + len(piece)] = piece
            at += len(piece)
        self._words[_END] = end
        return True

    def records(self) -> Iterator[Operation]:
        """In order. Their memory is good until the next change here."""
        at, end = self._words[_FIRST], self._words[_END]
        while at < end:
            offset, action, length = _RECORD.unpack_from(self._data, at)
            at += _RECORD.size
            pieces = [self._data[at : at + length]] if action == Action.WRITE else []
            yield Operation(Action(action), offset, length, pieces)
            if pieces:
                at += length + 7 & ~7

    def drop(self, end: int) -> None:
        """What lies before `end` is on stable storage."""
        words = self._words
        words[_FIRST] = end
        if end >= words[_END]:
            # In this order: between the two it is empty as well.
            words[_END] = 0
            words[_FIRST] = 0
            self._trim(end)

    def settle(self, daemon: int) -> None:
        """Nothing is unflushed at the daemon that `daemon` told of."""
        self.drop(self.end)
        self._words[_SERVED] = daemon
        self._words[_KNOWN] = 1

    def _trim(self, used: int) -> None:
        """Give back memory, but not while the guest is busy writing: it would be asked for again at once."""
        if used > KEPT:
            self._touched = max(self._touched, used)
        elif self._touched > KEPT:
            self._map.madvise(mmap.MADV_REMOVE, _PAGE + KEPT, ROOM - KEPT)
            self._touched = 0
