"""The client's half of NBD's handshake ("fixed newstyle"), in the host process.

Protocol: https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
import socket
import struct

_MAGIC = b"NBDMAGIC"
_OPTION = b"IHAVEOPT"
_REPLY_MAGIC = 0x3E889045565A9
_FIXED_NEWSTYLE, _NO_ZEROES = 1, 2
_OPT_GO = 7
_REP_ACK, _REP_INFO, _REP_ERROR = 1, 3, 1 << 31
_INFO_EXPORT = 0
_MAX_REPLY = 65536


class HandshakeFailed(Exception):
    """The server does not give this export; the text says what it answered."""


@dataclasses.dataclass(frozen=True, slots=True)
class Export:
    """:ivar sock: past the handshake. :ivar size: bytes. :ivar flags: transmission flags."""

    sock: socket.socket
    size: int
    flags: int


async def connect(directory: str, name: str, export: str) -> Export:
    """Connect to the UNIX socket `name` in `directory`, and to an export.

    :raises HandshakeFailed. :raises OSError: nobody listens.
    """
    loop = asyncio.get_running_loop()
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        # A socket's path has 107 bytes at most; the folder's may be longer.
        folder = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            await loop.sock_connect(sock, f"/proc/self/fd/{folder}/{name}")
        finally:
            os.close(folder)
        size, flags = await _negotiate(loop, sock, export.encode())
    except BaseException:
        sock.close()
        raise
    return Export(sock, size, flags)


async def _negotiate(loop: asyncio.AbstractEventLoop, sock: socket.socket, name: bytes) -> tuple[int, int]:
    greeting = await _exactly(loop, sock, 18)
    if greeting[:8] != _MAGIC or greeting[8:16] != _OPTION:
        raise HandshakeFailed("it does not greet as an NBD server of the fixed newstyle")
    data = struct.pack(">I", len(name)) + name + struct.pack(">H", 0)
    hello = struct.pack(">I", _FIXED_NEWSTYLE | _NO_ZEROES)
    await loop.sock_sendall(sock, hello + _OPTION + struct.pack(">II", _OPT_GO, len(data)) + data)
    found: tuple[int, int] | None = None
    while True:
        magic, option, kind, length = struct.unpack(">QIII", await _exactly(loop, sock, 20))
        if magic != _REPLY_MAGIC or option != _OPT_GO or length > _MAX_REPLY:
            raise HandshakeFailed("an answer that is none of NBD's")
        body = await _exactly(loop, sock, length)
        if kind & _REP_ERROR:
            raise HandshakeFailed(f"error {kind & 0xFF}: {body[:200].decode(errors='replace')}")
        if kind == _REP_INFO and length >= 12 and struct.unpack_from(">H", body)[0] == _INFO_EXPORT:
            found = struct.unpack_from(">QH", body, 2)
        if kind == _REP_ACK:
            if found is None:
                raise HandshakeFailed("the server did not tell the size")
            return found


async def _exactly(loop: asyncio.AbstractEventLoop, sock: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        part = await loop.sock_recv(sock, count - len(data))
        if not part:
            raise HandshakeFailed("the server has closed the connection")
        data += part
    return data
