"""What a nic sends on its way to the switch: kept back while the guest has a standby, until that knows its cause.

The output commit of Remus (Cully et al., NSDI 2008): a frame goes out when the second host holds an epoch that was
taken after it was sent. It is kept in this process's memory; who kills the process loses it, as a network may.
"""

from __future__ import annotations

import os
import socket
from collections import deque
from collections.abc import Callable

from hypervisor.devices.driver import Loop

RETRY_SECONDS = 0.001
MAX_BYTES, MAX_FRAMES = 4 << 20, 4096
"""Kept back at most; then the guest's requests stay in its ring."""


class Outbox:
    """:param sock: to the switch, not blocking; owned from here on.

    :ivar on_room: called when something more can be put, after `put` said no while `holding`.
    :ivar closed: nothing is there any more, and nothing comes.
    """

    def __init__(self, sock: socket.socket, loop: Loop, *, holding: bool = False) -> None:
        self.holding = holding
        self.closed = False
        self.on_room: Callable[[], None] = lambda: None
        self._sock = sock
        self._loop = loop
        self._kept: deque[tuple[bytes, bytes]] = deque()
        self._bytes = 0
        self._free = 0  # so many of the oldest may go
        self._marks: deque[tuple[int, int]] = deque()  # epoch, how many of the oldest belong to it or to one before
        self._full = False
        self._parted = False
        self._cancel: Callable[[], None] | None = None

    def put(self, header: bytes, data: memoryview | bytes) -> bool:
        """Send a message, or keep a copy. False: there is no room now."""
        if not self.holding:
            return not self._kept and self._write(header, data)
        if self._bytes + len(header) + len(data) > MAX_BYTES or len(self._kept) >= MAX_FRAMES:
            self._full = True
            return False
        self._kept.append((header, bytes(data)))
        self._bytes += len(header) + len(data)
        return True

    def part(self) -> None:
        """Nothing is put any more; what is kept back can still be released. Harmless when repeated."""
        self._parted = True
        self.on_room = lambda: None
        self._close_if_empty()

    def close(self) -> None:
        """Give it up with what is in it."""
        self._free = 0
        self.part()
        self.discard()

    # -- epochs ---------------------------------------------------------------------------------------------------

    def hold(self) -> None:
        self.holding = True

    def boundary(self, number: int) -> None:
        self._marks.append((number, len(self._kept)))

    def release(self, number: int) -> None:
        """No effect for an epoch whose boundary was not seen here."""
        while self._marks and self._marks[0][0] <= number:
            self._free = max(self._free, self._marks.popleft()[1])
        self._send()

    def let_out(self) -> None:
        self.holding = False
        self._marks.clear()
        self._free = len(self._kept)
        self._send()

    def discard(self) -> None:
        """What may go already, goes."""
        self._marks.clear()
        while len(self._kept) > self._free:
            header, data = self._kept.pop()
            self._bytes -= len(header) + len(data)
        self._send()

    # -- inside ---------------------------------------------------------------------------------------------------

    def _send(self) -> None:
        if self._cancel is not None:
            self._cancel()
            self._cancel = None
        gone = 0
        while gone < self._free and self._write(*self._kept[0]):
            header, data = self._kept.popleft()
            self._bytes -= len(header) + len(data)
            gone += 1
        self._free -= gone
        self._marks = deque((number, count - gone) for number, count in self._marks)
        if self._free:
            self._cancel = self._loop.call_later(RETRY_SECONDS, self._send)
        if self._full and self._has_room():
            self._full = False
            self._loop.call_soon(lambda: self.on_room())
        self._close_if_empty()

    def _has_room(self) -> bool:
        """For a good deal more, so that the guest is not called for each frame."""
        return not self.holding or (self._bytes <= MAX_BYTES // 2 and len(self._kept) <= MAX_FRAMES // 2)

    def _write(self, header: bytes, data: memoryview | bytes) -> bool:
        """False: the switch has no room now."""
        try:
            # writev() and not sendmsg(), which is refused to a driver process.
            os.writev(self._sock.fileno(), (header, data))
        except (BlockingIOError, ConnectionError, BrokenPipeError):
            return False  # of a switch that is gone: it comes back, or this device is closed
        return True

    def _close_if_empty(self) -> None:
        if self._parted and not self._kept and not self.closed:
            self.closed = True
            self._sock.close()
