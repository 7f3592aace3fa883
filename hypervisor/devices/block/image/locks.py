"""Who uses an image: locks that every process on the host sees, held by an open file description.

The scheme and the bytes are those of QEMU (block/file-posix.c): whoever uses an image read-locks a byte for
each thing it does, and another for each thing that it does not bear from others; then it looks whether anybody
has locked the opposite. So QEMU's tools respect our locks, and we theirs. The lock lives as long as any descriptor
of the description: the host process gives such to the driver or the daemon, which outlive it.
"""

from __future__ import annotations

import enum
import errno
import fcntl
import os
import struct

_USES, _WRITES = 100, 101
_BEARS_NO_USE, _BEARS_NO_WRITE = 200, 201
_F_OFD_GETLK, _F_OFD_SETLK = 36, 37
_FLOCK = struct.Struct("hhqqi4x")


class Use(enum.Enum):
    """What is locked, and what nobody else may have locked."""

    WRITER = ((_USES, _WRITES, _BEARS_NO_USE, _BEARS_NO_WRITE), (_BEARS_NO_USE, _BEARS_NO_WRITE, _USES, _WRITES))
    READER = ((_USES, _BEARS_NO_WRITE), (_BEARS_NO_USE, _WRITES))
    SHARED_WRITER = ((_USES, _WRITES), (_BEARS_NO_USE, _BEARS_NO_WRITE))
    SHARED_READER = ((_USES,), (_BEARS_NO_USE,))

    @classmethod
    def of(cls, *, readonly: bool, shared: bool) -> Use:
        if shared:
            return cls.SHARED_READER if readonly else cls.SHARED_WRITER
        return cls.READER if readonly else cls.WRITER


def acquire(fd: int, use: Use) -> bool:
    """Lock; False: somebody else uses it in a way that does not go together. Locks may be left then: close `fd`.

    :raises OSError: the file system has no locks.
    """
    mine, foreign = use.value
    for byte in mine:
        if not _lock(fd, byte):
            return False
    return not any(_is_locked(fd, byte) for byte in foreign)


def _lock(fd: int, byte: int) -> bool:
    try:
        fcntl.fcntl(fd, _F_OFD_SETLK, _FLOCK.pack(fcntl.F_RDLCK, os.SEEK_SET, byte, 1, 0))
    except OSError as exc:
        if exc.errno in (errno.EAGAIN, errno.EACCES):
            return False
        raise
    return True


def _is_locked(fd: int, byte: int) -> bool:
    answer = fcntl.fcntl(fd, _F_OFD_GETLK, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0))
    kind: int = _FLOCK.unpack(answer)[0]
    return kind != fcntl.F_UNLCK
