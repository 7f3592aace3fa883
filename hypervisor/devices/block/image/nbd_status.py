"""Which parts of an image behind an NBD server hold what: NBD_CMD_BLOCK_STATUS, over a connection of its own.

Protocol: https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md, structured replies.
"""

from __future__ import annotations

import contextlib
import os
import struct
from collections.abc import Iterator

from hypervisor.devices.block.image.base import ImageGone

_REQUEST = struct.Struct(">IHHQQI")
_CHUNK = struct.Struct(">IHHQI")
_REQUEST_MAGIC, _CHUNK_MAGIC = 0x25609513, 0x668E33EF
_BLOCK_STATUS, _DISCONNECT = 7, 2
_DONE = 1
_STATUS, _ERROR = 5, 1 << 15
_EXTENT = struct.Struct(">II")
_MAX_CHUNK = (1 << 20) + 4
"""QEMU tells of at most a MiB of extents at once."""

STEP = 1 << 31
"""Bytes of one question."""

HOLE, ZERO = 1, 2
"""Flags of ``base:allocation``."""


class NbdStatus:
    """:param fd: of the socket, past its handshake with one metadata context; owned from here on.

    :param context: the context's number.
    """

    def __init__(self, fd: int, context: int) -> None:
        self._fd = fd
        self._context = context
        self._cookie = 0
        os.set_blocking(fd, True)

    def extents(self, offset: int, length: int) -> Iterator[tuple[int, int, int]]:
        """Offset, length and what the context says, in order. :raises ImageGone: the server has ended, or refuses."""
        end = offset + length
        while offset < end:
            for count, value in self._ask(offset, min(STEP, end - offset)):
                count = min(count, end - offset)
                yield offset, count, value
                offset += count
                if offset >= end:
                    break

    def close(self) -> None:
        if self._fd >= 0:
            with contextlib.suppress(OSError):
                os.write(self._fd, _REQUEST.pack(_REQUEST_MAGIC, 0, _DISCONNECT, 0, 0, 0))
            os.close(self._fd)
            self._fd = -1

    def _ask(self, offset: int, length: int) -> list[tuple[int, int]]:
        self._cookie += 1
        found: list[tuple[int, int]] = []
        try:
            os.write(self._fd, _REQUEST.pack(_REQUEST_MAGIC, 0, _BLOCK_STATUS, self._cookie, offset, length))
            done = False
            while not done:
                magic, flags, kind, cookie, size = _CHUNK.unpack(self._exactly(_CHUNK.size))
                if magic != _CHUNK_MAGIC or cookie != self._cookie or size > _MAX_CHUNK:
                    raise ImageGone("the image's daemon does not speak NBD")
                body = self._exactly(size)
                if kind & _ERROR:
                    raise ImageGone(f"the image's daemon does not tell what is where: error {body[:4].hex()}")
                ours = kind == _STATUS and int.from_bytes(body[:4], "big") == self._context
                if ours and (size - 4) % _EXTENT.size == 0:
                    found += _EXTENT.iter_unpack(body[4:])
                done = bool(flags & _DONE)
        except OSError as exc:
            raise ImageGone(str(exc)) from exc
        if not found or not all(count for count, _ in found):
            raise ImageGone("the image's daemon does not tell what is where")
        return found

    def _exactly(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            part = os.read(self._fd, count - len(data))
            if not part:
                raise ImageGone("the image's daemon has closed the connection")
            data += part
        return data
