"""The sockets of movers, made by the host process: a mover process may make none."""

from __future__ import annotations

import asyncio
import socket

from hypervisor.errors import HostFailure, HostUnavailable

CONNECT_TIMEOUT = 10.0
DEAD_AFTER_MS = 20_000
"""TCP gives up on bytes that nobody acknowledges."""


async def connect(address: str, port: int) -> socket.socket:
    """:raises HostUnavailable: nobody answers there."""
    loop = asyncio.get_running_loop()
    why = "it has no address"
    try:
        async with asyncio.timeout(CONNECT_TIMEOUT):
            for family, kind, number, _, where in await loop.getaddrinfo(address, port, type=socket.SOCK_STREAM):
                sock = socket.socket(family, kind | socket.SOCK_NONBLOCK, number)
                try:
                    await loop.sock_connect(sock, where)
                    _tune(sock)
                except OSError as exc:
                    sock.close()
                    why = exc.strerror or str(exc)
                    continue
                except BaseException:
                    sock.close()
                    raise
                return sock
    except TimeoutError:
        why = f"no answer within {CONNECT_TIMEOUT:g} s"
    except OSError as exc:
        why = exc.strerror or str(exc)
    raise HostUnavailable(f"the target {address} port {port} cannot be reached ({why}): try again")


def listener(address: str, port: int) -> socket.socket:
    """:raises HostFailure: nothing can listen there."""
    try:
        info = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
        family, kind, number, _, where = info[0]
        sock = socket.socket(family, kind, number)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            _tune(sock)  # connections that are accepted inherit it
            sock.bind(where)
            sock.listen(16)
        except BaseException:
            sock.close()
            raise
    except OSError as exc:
        raise HostFailure(
            f"no migration can be received at {address!r} port {port} ({exc.strerror or exc}): "
            "correct migration_address"
        ) from exc
    return sock


def _tune(sock: socket.socket) -> None:
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, DEAD_AFTER_MS)
