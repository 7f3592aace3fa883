"""Which parts of a disk were written: a record that a mirror of the disk asks for.

It lies in a file of memory that the host process makes and hands to the driver, so it outlives a driver's SIGKILL and
the next driver goes on with it::

    one page    magic, identity, bytes of a cluster, how many clusters
    `live`      a bit for each cluster, the lowest of byte 0 first: set by the driver *before* it writes
    `taken`     likewise: what the driver has moved out of `live` at the host's request (`Written.move`)

Only the driver changes `live`, and it moves bits when it has nothing under way: so a cluster whose bit was moved holds
what was written up to then, and what is written later sets the bit again. Only the host clears `taken`, after the
driver's answer and before it asks again. A driver that is killed in `move` leaves a bit in both: it counts twice, and
never not at all.
"""

from __future__ import annotations

import mmap
import os
import re
import secrets
import struct
from collections.abc import Iterable, Iterator, Sequence

from hypervisor.devices.block.image.base import CHANGES, Image, Operation
from hypervisor.sealed_memory import sealed_memory

SMALLEST, LARGEST = 1 << 12, 1 << 16
"""Bytes of a cluster: small ones make the last round of a mirror short, large ones the record of a large disk small."""
MAX_CLUSTERS = 1 << 28

_MAGIC = b"reevewrt"
_HEAD = struct.Struct("<8s16sIQ")
_PAGE = mmap.PAGESIZE
_MANY = 1 << 25
_BLOCK = 1 << 16
_NO_BITS = bytes(_BLOCK)
_SOME = re.compile(rb"[^\0]{1,512}")


def cluster_of(size: int) -> int:
    """Bytes of a cluster of a disk of so many bytes."""
    cluster = SMALLEST
    while cluster < LARGEST and size > cluster * _MANY:
        cluster *= 2
    return cluster


class Written:
    """One disk's record, mapped; see `create` and `attach`.

    :ivar fd: of the file, owned. :ivar ident: tells it from others. :ivar cluster: bytes. :ivar count: of clusters.
    """

    def __init__(self, fd: int, ident: bytes, cluster: int, count: int) -> None:
        self.fd = fd
        self.ident = ident
        self.cluster = cluster
        self.count = count
        self._bytes = (count + 7) // 8
        room = _room(self._bytes)
        self._map = mmap.mmap(fd, _PAGE + 2 * room)
        view = memoryview(self._map)
        self._live = view[_PAGE : _PAGE + self._bytes]
        self._taken = view[_PAGE + room : _PAGE + room + self._bytes]

    @classmethod
    def create(cls, size: int) -> Written:
        """For a disk of `size` bytes; nothing is written yet."""
        cluster = cluster_of(size)
        count = -(-size // cluster)
        fd = sealed_memory("reeve-written", _PAGE + 2 * _room((count + 7) // 8))
        try:
            ident = secrets.token_bytes(16)
            os.pwrite(fd, _HEAD.pack(_MAGIC, ident, cluster, count), 0)
            return cls(fd, ident, cluster, count)
        except BaseException:
            os.close(fd)
            raise

    @classmethod
    def attach(cls, fd: int) -> Written:
        """One that somebody else has made; `fd` is owned from here on. :raises ValueError: it is none."""
        try:
            data = os.pread(fd, _HEAD.size, 0)
            magic, ident, cluster, count = _HEAD.unpack(data) if len(data) == _HEAD.size else (b"", b"", 0, 0)
            if magic != _MAGIC or not SMALLEST <= cluster <= LARGEST or not 0 < count <= MAX_CLUSTERS:
                raise ValueError("this is no record of what was written")
            if os.fstat(fd).st_size != _PAGE + 2 * _room((count + 7) // 8):
                raise ValueError("a record of what was written that is cut off")
            return cls(fd, ident, cluster, count)
        except BaseException:
            os.close(fd)
            raise

    def close(self) -> None:
        """Let go of it; it lives as long as somebody holds it."""
        if self.fd >= 0:
            self._live.release()
            self._taken.release()
            self._map.close()
            os.close(self.fd)
            self.fd = -1

    # -- the driver's

    def mark(self, offset: int, length: int) -> None:
        """These bytes are about to be written; what lies behind the disk's end is left out."""
        if length <= 0:
            return
        first, last = offset // self.cluster, min((offset + length - 1) // self.cluster, self.count - 1)
        set_bits(self._live, first, last + 1)

    def move(self) -> None:
        """From `live` to `taken`."""
        for start, block in _blocks(self._live):
            end = start + len(block)
            self._taken[start:end] = _either(block, self._taken[start:end])
            self._live[start:end] = _NO_BITS[: len(block)]

    # -- the host process's

    def collect(self) -> bytes:
        """What was taken, and clear it; only while no driver can be in `move`."""
        found = bytes(self._taken)
        for start, block in _blocks(self._taken):
            self._taken[start : start + len(block)] = _NO_BITS[: len(block)]
        return found

    def peek(self) -> bytes:
        """All that is recorded; nothing is cleared."""
        return _either(self._live, self._taken)

    def recorded(self) -> int:
        """How many clusters are recorded now."""
        return int.from_bytes(self.peek(), "little").bit_count()


class Recorded:
    """An `Image` whose changes are recorded, each before it is begun. It owns neither image nor record."""

    def __init__(self, image: Image, written: Written) -> None:
        self.image = image
        self._written = written

    def run(self, operations: Sequence[Operation]) -> None:
        for operation in operations:
            if operation.action in CHANGES:
                self._written.mark(operation.offset, operation.length)
        self.image.run(operations)

    def close(self) -> None:
        self.image.close()


# -- bitmaps


def set_bits(bits: bytearray | memoryview, first: int, end: int) -> None:
    """Set those from `first` up to, and not, `end`."""
    if first >= end:
        return
    low, high = first >> 3, (end - 1) >> 3
    head, tail = 0xFF << (first & 7) & 0xFF, 0xFF >> (7 - ((end - 1) & 7))
    if low == high:
        bits[low] |= head & tail
        return
    bits[low] |= head
    bits[high] |= tail
    for start in range(low + 1, high, _BLOCK):
        stop = min(start + _BLOCK, high)
        bits[start:stop] = b"\xff" * (stop - start)


def clear_bits(bits: bytearray, first: int, end: int) -> None:
    """Clear those from `first` up to, and not, `end`."""
    if first >= end:
        return
    low, high = first >> 3, (end - 1) >> 3
    head, tail = 0xFF << (first & 7) & 0xFF, 0xFF >> (7 - ((end - 1) & 7))
    if low == high:
        bits[low] &= ~(head & tail) & 0xFF
        return
    bits[low] &= ~head & 0xFF
    bits[high] &= ~tail & 0xFF
    bits[low + 1 : high] = bytes(max(0, high - low - 1))


def runs(bits: bytes | bytearray | memoryview, at: int = 0) -> Iterator[tuple[int, int]]:
    """First and end of each run of set bits, from bit `at` on, in order; long ones come in parts."""
    for found in _SOME.finditer(bits, at >> 3):
        number = int.from_bytes(found.group(), "little")
        base = found.start() * 8
        while number:
            skip = (number & -number).bit_length() - 1
            number >>= skip
            base += skip
            length = (number + 1 & ~number).bit_length() - 1
            if base + length > at:
                yield max(base, at), base + length
            number >>= length
            base += length


def _room(count: int) -> int:
    return -(-count // _PAGE) * _PAGE


def _blocks(bits: memoryview) -> Iterable[tuple[int, bytes]]:
    """Copies of those blocks in which a bit is set, and where they begin."""
    for start in range(0, len(bits), _BLOCK):
        block = bytes(bits[start : start + _BLOCK])
        if block != _NO_BITS[: len(block)]:
            yield start, block


def _either(one: bytes | memoryview, other: bytes | memoryview) -> bytes:
    both = int.from_bytes(one, "little") | int.from_bytes(other, "little")
    return both.to_bytes(len(one), "little")
