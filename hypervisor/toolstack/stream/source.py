"""Reading a stream from its beginning to its end, exactly as many bytes as it promises."""

from __future__ import annotations

from collections.abc import Callable
from typing import BinaryIO, NoReturn

from hypervisor.errors import StreamInvalid

_STEP = 1 << 20


class Source:
    """:param read: gives at most so many bytes, and none at the end (a file's or socket's `read`).

    :ivar position: bytes taken so far.
    """

    def __init__(self, read: Callable[[int], bytes]) -> None:
        self._read = read
        self.position = 0

    @classmethod
    def of_file(cls, file: BinaryIO) -> Source:
        return cls(file.read)

    def take(self, size: int, what: str) -> bytes:
        """Exactly `size` bytes; memory grows only with what is really there.

        :param what: is being read, for the error. :raises StreamInvalid: the stream ends before.
        """
        parts, left = [], size
        while left:
            part = self._read(min(left, _STEP))
            if not part:
                raise StreamInvalid(
                    f"the image ends within its {what}, at byte {self.position}: it was cut short; save it again"
                )
            parts.append(part)
            left -= len(part)
            self.position += len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def bad(self, why: str) -> NoReturn:
        """:raises StreamInvalid: with the place."""
        raise StreamInvalid(f"the image is damaged near byte {self.position}: {why}; give another")
