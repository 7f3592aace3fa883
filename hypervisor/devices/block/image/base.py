"""What a driver asks of an image."""

from __future__ import annotations

import dataclasses
import enum
import errno
from collections.abc import Sequence
from typing import Protocol


class Action(enum.IntEnum):
    READ = 0
    WRITE = 1
    FLUSH = 2
    DISCARD = 3
    ZERO = 4  # reads as zeroes afterwards, and takes no room if that is possible; a mirror asks for it


CHANGES = (Action.WRITE, Action.DISCARD, Action.ZERO)
"""After these the image holds something else."""


@dataclasses.dataclass(slots=True)
class Operation:
    """One piece of work.

    :ivar offset: bytes; `length` bytes, the sum of `pieces` for READ and WRITE.
    :ivar pieces: memory that is read into or written from; the guest may change it at any time.
    :ivar error: errno, 0 when it was done.
    """

    action: Action
    offset: int = 0
    length: int = 0
    pieces: Sequence[memoryview] = ()
    error: int = 0


class ImageGone(Exception):
    """What stands behind the image has ended: the operations may or may not have been done, and must be again."""


class Image(Protocol):
    def run(self, operations: Sequence[Operation]) -> None:
        """Do all of them and set `Operation.error` of each.

        A FLUSH covers all that was done before this call and all before it in `operations`: what it covers is on
        stable storage when this returns. Otherwise the order is open. :raises ImageGone.
        """

    def close(self) -> None: ...


def rest_of(pieces: Sequence[memoryview], done: int) -> list[memoryview]:
    """What is left of `pieces` behind the first `done` bytes."""
    left: list[memoryview] = []
    for piece in pieces:
        if done >= len(piece):
            done -= len(piece)
        else:
            left.append(piece[done:] if done else piece)
            done = 0
    return left


UNSUPPORTED = frozenset({errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOTTY})
