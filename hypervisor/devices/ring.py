"""Byte rings in a page shared with a guest: the backend's half of one direction.

The layout is that of ``xenstore_domain_interface`` and ``xencons_interface``
(Xen's ``public/io/xs_wire.h`` and ``console.h``): a data area whose size is a
power of two, and two free-running 32-bit indices.

The guest is hostile. Each call reads the guest's index once and checks it;
our own index is kept here and only ever written to the page, so a guest that
scribbles on it changes nothing for us. No barriers are needed: x86 keeps
stores in order, and each index is one 4-byte store after the data.
"""

from __future__ import annotations

_MASK32 = 0xFFFF_FFFF

PAGE_SIZE = 4096


class RingBroken(Exception):
    """The guest's index makes no sense; the ring cannot be followed any longer."""


class _Half:
    __slots__ = ("_data", "_indices", "_own", "_own_at", "_peer_at", "_size")

    def __init__(self, page: memoryview, data_at: int, size: int, own_at: int, peer_at: int) -> None:
        if len(page) != PAGE_SIZE or page.format != "B" or page.readonly:
            raise ValueError(f"a ring page is {PAGE_SIZE} writable bytes")
        if size & (size - 1) or not 0 < size <= PAGE_SIZE:
            raise ValueError(f"ring size {size} is not a power of two within a page")
        self._data = page[data_at : data_at + size]
        self._indices = page.cast("I")
        self._size = size
        self._own_at = own_at // 4
        self._peer_at = peer_at // 4
        self._own = self._indices[self._own_at]

    @property
    def position(self) -> int:
        """Our index, 0 .. 2**32-1."""
        return self._own

    def _move_to(self, position: int) -> None:
        self._own = position & _MASK32
        self._indices[self._own_at] = self._own

    def _peer(self) -> int:
        return self._indices[self._peer_at]

    def close(self) -> None:
        """Let go of the page; no other call is allowed afterwards."""
        self._data.release()
        self._indices.release()


class Consumer(_Half):
    """Reads what the guest produces.

    :param page: the whole shared page, 4096 bytes.
    :param data_at: offset of the data area, bytes; `size` its length, a power of two.
    :param cons_at: offset of our index, `prod_at` of the guest's, bytes.
    :param position: where to go on after a restart; None for what the page says.
    """

    __slots__ = ()

    def __init__(
        self, page: memoryview, data_at: int, size: int, cons_at: int, prod_at: int, position: int | None = None
    ) -> None:
        super().__init__(page, data_at, size, cons_at, prod_at)
        if position is not None:
            self._move_to(position)

    def available(self) -> int:
        """Bytes to be read. :raises RingBroken: more than the ring holds."""
        count = (self._peer() - self._own) & _MASK32
        if count > self._size:
            raise RingBroken(f"the guest claims {count} bytes in a ring of {self._size}")
        return count

    def peek(self, most: int) -> bytes:
        """A copy of up to `most` of the bytes to be read. :raises RingBroken: see `available`."""
        count = min(most, self.available())
        start = self._own & (self._size - 1)
        first = min(count, self._size - start)
        return bytes(self._data[start : start + first]) + bytes(self._data[: count - first])

    def advance(self, count: int) -> None:
        """Tell the guest that `count` bytes have been read."""
        self._move_to(self._own + count)

    def read(self, most: int) -> bytes:
        """`peek` and `advance`. :raises RingBroken: see `available`."""
        data = self.peek(most)
        if data:
            self.advance(len(data))
        return data

    def restart(self, position: int = 0) -> None:
        """Make the ring empty: both indices at `position`, as ring reconnection wants it."""
        self._move_to(position)
        self._indices[self._peer_at] = position


class Producer(_Half):
    """Writes what the guest consumes. Parameters as for `Consumer`, our index being the producer's."""

    __slots__ = ()

    def __init__(self, page: memoryview, data_at: int, size: int, cons_at: int, prod_at: int) -> None:
        super().__init__(page, data_at, size, prod_at, cons_at)

    def space(self) -> int:
        """Bytes that may be written. :raises RingBroken: the guest claims to have read what was never written."""
        used = (self._own - self._peer()) & _MASK32
        if used > self._size:
            raise RingBroken(f"the guest leaves {used} bytes unread in a ring of {self._size}")
        return self._size - used

    def write(self, data: bytes) -> int:
        """Write as much of `data` as fits. :returns: how much that was. :raises RingBroken: see `space`."""
        count = min(len(data), self.space())
        if count:
            start = self._own & (self._size - 1)
            first = min(count, self._size - start)
            self._data[start : start + first] = data[:first]
            self._data[: count - first] = data[first:count]
            self._move_to(self._own + count)
        return count

    def restart(self, position: int = 0) -> None:
        """Make the ring empty: both indices at `position`."""
        self._move_to(position)
        self._indices[self._peer_at] = position
