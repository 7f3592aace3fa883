"""The client's half of NBD's handshake ("fixed newstyle"), in the host process.

Protocol: https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md
"""

from __future__ import annotations

import asyncio
import dataclasses
import socket
import struct
from pathlib import Path

from hypervisor.socket_path import short_path

_MAGIC = b"NBDMAGIC"
_OPTION = b"IHAVEOPT"
_REPLY_MAGIC = 0x3E889045565A9
_FIXED_NEWSTYLE, _NO_ZEROES = 1, 2
_OPT_GO, _OPT_STRUCTURED_REPLY, _OPT_SET_META_CONTEXT = 7, 8, 10
_REP_ACK, _REP_INFO, _REP_META_CONTEXT, _REP_ERROR = 1, 3, 4, 1 << 31
_INFO_EXPORT = 0
_MAX_REPLY, _MAX_REPLIES = 65536, 64

ALLOCATION, ALLOCATION_DEPTH = "base:allocation", "qemu:allocation-depth"
"""Metadata contexts: what reads as zeroes; in which file of a chain a range lies (QEMU's docs/interop/nbd.txt)."""


class HandshakeFailed(Exception):
    """The server does not give this export; the text says what it answered."""


@dataclasses.dataclass(frozen=True, slots=True)
class Export:
    """:ivar sock: past the handshake. :ivar size: bytes. :ivar flags: transmission flags.

    :ivar context: the number of the metadata context that was asked for; replies are structured then.
    """

    sock: socket.socket
    size: int
    flags: int
    context: int = 0


async def connect(directory: str, name: str, export: str, context: str = "") -> Export:
    """Connect to the UNIX socket `name` in `directory`, and to an export.

    :param context: a metadata context to be asked for. :raises HandshakeFailed. :raises OSError: nobody listens.
    """
    loop = asyncio.get_running_loop()
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        with short_path(Path(directory, name)) as address:
            await loop.sock_connect(sock, address)
        await _greet(loop, sock)
        number = await _meta_context(loop, sock, export.encode(), context) if context else 0
        size, flags = await _go(loop, sock, export.encode())
    except BaseException:
        sock.close()
        raise
    return Export(sock, size, flags, number)


async def _greet(loop: asyncio.AbstractEventLoop, sock: socket.socket) -> None:
    greeting = await _exactly(loop, sock, 18)
    if greeting[:8] != _MAGIC or greeting[8:16] != _OPTION:
        raise HandshakeFailed("it does not greet as an NBD server of the fixed newstyle")
    await loop.sock_sendall(sock, struct.pack(">I", _FIXED_NEWSTYLE | _NO_ZEROES))


async def _go(loop: asyncio.AbstractEventLoop, sock: socket.socket, name: bytes) -> tuple[int, int]:
    """Size and flags."""
    found: tuple[int, int] | None = None
    data = struct.pack(">I", len(name)) + name + struct.pack(">H", 0)
    for kind, body in await _ask(loop, sock, _OPT_GO, data):
        if kind == _REP_INFO and len(body) >= 12 and struct.unpack_from(">H", body)[0] == _INFO_EXPORT:
            found = struct.unpack_from(">QH", body, 2)
    if found is None:
        raise HandshakeFailed("the server did not tell the size")
    return found


async def _meta_context(loop: asyncio.AbstractEventLoop, sock: socket.socket, name: bytes, context: str) -> int:
    """Its number."""
    await _ask(loop, sock, _OPT_STRUCTURED_REPLY, b"")
    query = context.encode()
    data = struct.pack(">I", len(name)) + name + struct.pack(">II", 1, len(query)) + query
    for kind, body in await _ask(loop, sock, _OPT_SET_META_CONTEXT, data):
        if kind == _REP_META_CONTEXT and body[4:] == query:
            return int.from_bytes(body[:4], "big")
    raise HandshakeFailed(f"the server does not know {context}")


async def _ask(
    loop: asyncio.AbstractEventLoop, sock: socket.socket, option: int, data: bytes
) -> list[tuple[int, bytes]]:
    """The replies to an option, up to its acknowledgement."""
    await loop.sock_sendall(sock, _OPTION + struct.pack(">II", option, len(data)) + data)
    replies: list[tuple[int, bytes]] = []
    while len(replies) < _MAX_REPLIES:
        magic, answered, kind, length = struct.unpack(">QIII", await _exactly(loop, sock, 20))
        if magic != _REPLY_MAGIC or answered != option or length > _MAX_REPLY:
            raise HandshakeFailed("an answer that is none of NBD's")
        body = await _exactly(loop, sock, length)
        if kind & _REP_ERROR:
            raise HandshakeFailed(f"error {kind & 0xFF}: {body[:200].decode(errors='replace')}")
        if kind == _REP_ACK:
            return replies
        replies.append((kind, body))
    raise HandshakeFailed("more answers than can be meant")


async def _exactly(loop: asyncio.AbstractEventLoop, sock: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        part = await loop.sock_recv(sock, count - len(data))
        if not part:
            raise HandshakeFailed("the server has closed the connection")
        data += part
    return data
