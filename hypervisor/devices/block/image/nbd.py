"""An image behind an NBD server, over a connected UNIX socket that is past its handshake.

Protocol: https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md, "Transmission phase", simple replies.
The handshake is done by the host process (`hypervisor.devices.block.image.handshake`).
"""

from __future__ import annotations

import collections
import errno
import os
import select
import struct
from collections.abc import Sequence

from hypervisor.devices.block.image.base import Action, ImageGone, Operation, rest_of

_REQUEST = struct.Struct(">IHHQQI")
_REPLY = struct.Struct(">IIQ")
_REQUEST_MAGIC = 0x25609513
_REPLY_MAGIC = 0x67446698
_COMMANDS = {Action.READ: 0, Action.WRITE: 1, Action.FLUSH: 3, Action.DISCARD: 4, Action.ZERO: 6}
_DISCONNECT = 2
_SHUTDOWN = 108

FLAG_SEND_FLUSH = 1 << 2
FLAG_SEND_TRIM = 1 << 5
FLAG_SEND_ZEROES = 1 << 6

MAX_IN_FLIGHT = 16
"""What QEMU's server works on at once (MAX_NBD_REQUESTS)."""
MAX_LENGTH = 1 << 30
"""Of one trim or range of zeroes; data is far below the 32 MiB that servers take."""


class NbdImage:
    """:param fd: of the socket; owned from here on.

    :param flags: transmission flags that the server told.
    """

    def __init__(self, fd: int, *, flags: int) -> None:
        self._fd = fd
        self._flags = flags
        self._cookie = 0
        self._poll = select.poll()
        self._gone = ""
        os.set_blocking(fd, False)

    def run(self, operations: Sequence[Operation]) -> None:
        try:
            batch: list[Operation] = []
            for operation in operations:
                if operation.action != Action.FLUSH:
                    batch.append(operation)
                    continue
                # The server's flush covers writes that it has answered.
                self._run(batch)
                batch = []
                if self._flags & FLAG_SEND_FLUSH:
                    self._run([operation])
                else:
                    operation.error = errno.EOPNOTSUPP
            self._run(batch)
        except OSError as exc:
            self._gone = str(exc)
        if self._gone:
            raise ImageGone(self._gone)

    def close(self) -> None:
        if self._fd >= 0:
            if not self._gone:
                try:
                    os.write(self._fd, _REQUEST.pack(_REQUEST_MAGIC, 0, _DISCONNECT, 0, 0, 0))
                except OSError:
                    self._gone = "closed"
            os.close(self._fd)
            self._fd = -1

    def _run(self, operations: Sequence[Operation]) -> None:
        """Several in flight; sends and receives as the socket lets it. :raises OSError: the connection is of no use."""
        todo = collections.deque(self._parts(operations))
        flying: dict[int, Operation] = {}
        out: list[memoryview] = []
        inbox = _Inbox(self._fd, flying)
        while todo or flying or out:
            while not out and todo and len(flying) < MAX_IN_FLIGHT:
                operation = todo.popleft()
                self._cookie = (self._cookie + 1) & 0xFFFF_FFFF_FFFF_FFFF
                flying[self._cookie] = operation
                out = [memoryview(self._header(operation))]
                if operation.action == Action.WRITE:
                    out += operation.pieces
                out = self._send(out)
            progress = inbox.read()
            if out:
                before = sum(map(len, out))
                out = self._send(out)
                progress = progress or sum(map(len, out)) < before
            if not progress and (flying or out):
                self._wait(writing=bool(out))

    def _parts(self, operations: Sequence[Operation]) -> Sequence[Operation]:
        parts: list[Operation] = []
        for operation in operations:
            if operation.action == Action.DISCARD:
                parts += self._trims(operation)
            elif operation.action == Action.ZERO and not self._flags & FLAG_SEND_ZEROES:
                operation.error = errno.EOPNOTSUPP
            else:
                parts.append(operation)
        return parts

    def _trims(self, operation: Operation) -> list[Operation]:
        """A trim is advice: if a part of a long one is refused, the rest may be done all the same."""
        if not self._flags & FLAG_SEND_TRIM:
            operation.error = errno.EOPNOTSUPP
            return []
        ranges = range(operation.offset, operation.offset + operation.length, MAX_LENGTH)
        end = operation.offset + operation.length
        return [Operation(Action.DISCARD, start, min(MAX_LENGTH, end - start)) for start in ranges]

    def _header(self, operation: Operation) -> bytes:
        command = _COMMANDS[operation.action]
        return _REQUEST.pack(_REQUEST_MAGIC, 0, command, self._cookie, operation.offset, operation.length)

    def _send(self, out: list[memoryview]) -> list[memoryview]:
        """What could not be sent yet."""
        try:
            sent = os.writev(self._fd, out)
        except BlockingIOError:
            return out
        return rest_of(out, sent)

    def _wait(self, *, writing: bool) -> None:
        self._poll.register(self._fd, select.POLLIN | (select.POLLOUT if writing else 0))
        self._poll.poll()


class _Inbox:
    """Replies, as they come in pieces."""

    def __init__(self, fd: int, flying: dict[int, Operation]) -> None:
        self._fd = fd
        self._flying = flying
        self._head = bytearray(_REPLY.size)
        self._want: list[memoryview] = [memoryview(self._head)]
        self._data_of: int | None = None

    def read(self) -> bool:
        """Take what is there; False if nothing was."""
        progress = False
        while self._flying:
            try:
                count = os.readv(self._fd, self._want)
            except BlockingIOError:
                return progress
            if not count:
                raise ConnectionError("the image's daemon has closed the connection")
            progress = True
            self._want = rest_of(self._want, count)
            if not self._want:
                self._complete()
        return progress

    def _complete(self) -> None:
        """The header, or the data that belongs to it, is there."""
        self._want = [memoryview(self._head)]
        if self._data_of is not None:
            del self._flying[self._data_of]
            self._data_of = None
            return
        magic, error, cookie = _REPLY.unpack(self._head)
        operation = self._flying.get(cookie)
        if magic != _REPLY_MAGIC or operation is None:
            raise ConnectionError("the image's daemon does not speak NBD")
        if error == _SHUTDOWN:
            raise ConnectionError("the image's daemon is ending")
        if error:
            operation.error = error if error in errno.errorcode else errno.EIO
        elif operation.action == Action.READ:
            self._data_of = cookie
            self._want = list(operation.pieces)
            return
        del self._flying[cookie]
