"""A raw image: a file or a block device, by the driver's own descriptor."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import logging
import os
from collections.abc import Sequence

from hypervisor.devices.block.image.base import UNSUPPORTED, Action, Operation, rest_of

LOG = logging.getLogger(__name__)

_KEEP_SIZE_PUNCH_HOLE = 0x1 | 0x2  # linux/falloc.h
_NOTHING = bytes(1 << 16)

# Found at import, before the process gives up its files.
_libc = ctypes.CDLL(None, use_errno=True)
_fallocate = _libc.fallocate
_fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


class RawImage:
    """:param fd: opened for reading, and for writing unless the disk is read-only; owned from here on.

    :param direct: it was opened with O_DIRECT.
    """

    def __init__(self, fd: int, *, direct: bool = False) -> None:
        self._fd = fd
        self._direct = direct

    def run(self, operations: Sequence[Operation]) -> None:
        for operation in operations:
            try:
                self._one(operation)
            except OSError as exc:
                operation.error = exc.errno or errno.EIO

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _one(self, operation: Operation) -> None:
        action = operation.action
        if action == Action.FLUSH:
            os.fdatasync(self._fd)
        elif action == Action.DISCARD:
            self._punch(operation)
        elif action == Action.ZERO:
            self._zero(operation)
        else:
            self._move(operation)

    def _punch(self, operation: Operation) -> None:
        if _fallocate(self._fd, _KEEP_SIZE_PUNCH_HOLE, operation.offset, operation.length):
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))

    def _zero(self, operation: Operation) -> None:
        try:
            self._punch(operation)
            return
        except OSError as exc:
            if exc.errno not in UNSUPPORTED:
                raise
        end = operation.offset + operation.length
        for offset in range(operation.offset, end, len(_NOTHING)):
            piece = memoryview(_NOTHING)[: end - offset]
            self._move(Operation(Action.WRITE, offset, len(piece), [piece]))

    def _move(self, operation: Operation) -> None:
        call = os.preadv if operation.action == Action.READ else os.pwritev
        pieces, offset, left = operation.pieces, operation.offset, operation.length
        while True:
            try:
                moved = call(self._fd, pieces, offset)
            except OSError as exc:
                if exc.errno != errno.EINVAL or not self._direct:
                    raise
                moved = self._through_cache(operation.action, pieces, offset)
            if moved == left:
                return
            if moved <= 0:
                raise OSError(errno.EIO, f"the image ends at {offset}: it was cut off")
            offset += moved
            left -= moved
            pieces = rest_of(pieces, moved)

    def _through_cache(self, action: Action, pieces: Sequence[memoryview], offset: int) -> int:
        """O_DIRECT refuses what is not aligned as its disk wants: such a request goes by the page cache.

        The kernel keeps both views the same: it writes back before a direct read, and drops pages at a direct write.
        """
        flags = fcntl.fcntl(self._fd, fcntl.F_GETFL)
        fcntl.fcntl(self._fd, fcntl.F_SETFL, flags & ~os.O_DIRECT)
        try:
            if action == Action.READ:
                return os.preadv(self._fd, pieces, offset)
            return os.pwritev(self._fd, pieces, offset)
        finally:
            fcntl.fcntl(self._fd, fcntl.F_SETFL, flags)
