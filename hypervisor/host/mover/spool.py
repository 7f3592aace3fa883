"""Blobs that arrive wait in a file of memory for the host process, one after the other."""

from __future__ import annotations

import os

from hypervisor.host.channel import Message
from hypervisor.host.mover import wire
from hypervisor.host.mover.wire import BadRecord

SPOOL_BYTES = 2 * wire.MAX_BLOB


class Spool:
    """:param fd: of the file, which host and mover process share."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._end = 0
        self._waiting = 0
        self._kind = ""
        self._start = 0
        self._left = 0

    def begin(self, name: bytes, size: int) -> bool:
        """Whether that is all of it. :raises BadRecord."""
        if self._left:
            raise BadRecord("a blob inside of another one")
        if not (name.isascii() and name.decode("ascii", "replace").isidentifier()):
            raise BadRecord("a blob with a name of no use")
        if self._end + size > SPOOL_BYTES:
            raise BadRecord("more blobs than this host takes")
        self._kind, self._start, self._left = name.decode("ascii"), self._end, size
        return not size

    def more(self, data: memoryview) -> bool:
        """Whether that is all of it. :raises BadRecord."""
        if len(data) > self._left:
            raise BadRecord("more of a blob than was announced")
        if os.pwritev(self._fd, [data], self._end) != len(data):
            raise OSError("the spool cannot be written")
        self._end += len(data)
        self._left -= len(data)
        return not self._left

    def event(self) -> Message:
        self._waiting += 1
        return {"event": "blob", "kind": self._kind, "offset": self._start, "size": self._end - self._start}

    def taken(self) -> None:
        self._waiting -= 1
        if not self._waiting and not self._left:
            self._end = 0
