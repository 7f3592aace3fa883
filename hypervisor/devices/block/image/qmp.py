"""QEMU's control protocol, as far as a storage daemon needs it (QEMU's docs/interop/qmp-spec.txt)."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import socket
from pathlib import Path
from typing import Any

from hypervisor.socket_path import short_path

_MAX_LINE = 1 << 20
TIMEOUT = 30.0
"""Seconds for one answer: a daemon waits for its disk here and there."""
HELLO_TIMEOUT, CONNECTIONS = 2.0, 15
"""One in some thousands of QEMU 7.2's daemons greets and never answers on that connection, on a later one it does."""


class QmpError(Exception):
    """The daemon refuses, or does not answer; the text is its own."""


class Qmp:
    """One connection, one command at a time; events are not looked at. Made by `connect`."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._data = b""
        self._numbers = itertools.count(1)
        self._lock = asyncio.Lock()

    @classmethod
    async def connect(cls, directory: str, name: str) -> Qmp:
        """:raises OSError: nobody listens. :raises QmpError: it is no storage daemon."""
        for _ in range(CONNECTIONS - 1):
            with contextlib.suppress(QmpError, ConnectionError):
                return await cls._connect(directory, name)
        return await cls._connect(directory, name)

    @classmethod
    async def _connect(cls, directory: str, name: str) -> Qmp:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        qmp = cls(sock)
        try:
            with short_path(Path(directory, name)) as address:
                await asyncio.get_running_loop().sock_connect(sock, address)
            async with asyncio.timeout(HELLO_TIMEOUT):
                if "QMP" not in await qmp._line():
                    raise QmpError("it does not greet as QMP does")
            await qmp.command("qmp_capabilities", seconds=HELLO_TIMEOUT)
        except TimeoutError:
            sock.close()
            raise QmpError(f"no greeting within {HELLO_TIMEOUT:g} s") from None
        except BaseException:
            sock.close()
            raise
        return qmp

    async def command(self, name: str, arguments: dict[str, Any] | None = None, *, seconds: float = TIMEOUT) -> Any:
        """:raises QmpError: refused, too late, or the daemon has gone."""
        async with self._lock:
            number = next(self._numbers)
            message = {"execute": name, "id": number, **({"arguments": arguments} if arguments else {})}
            data = json.dumps(message).encode() + b"\n"
            try:
                async with asyncio.timeout(seconds):
                    await asyncio.get_running_loop().sock_sendall(self._sock, data)
                    while True:
                        answer = await self._line()
                        if answer.get("id") == number:
                            break
            except TimeoutError:
                raise QmpError(f"{name}: no answer within {seconds:g} s") from None
            except OSError as exc:
                raise QmpError(f"{name}: {exc}") from exc
        if "error" in answer:
            raise QmpError(f"{name}: {answer['error'].get('desc')}")
        return answer.get("return")

    async def _line(self) -> dict[str, Any]:
        while b"\n" not in self._data:
            part = await asyncio.get_running_loop().sock_recv(self._sock, 65536)
            if not part or len(self._data) > _MAX_LINE:
                raise ConnectionError("the daemon has closed its control socket")
            self._data += part
        line, _, self._data = self._data.partition(b"\n")
        found = json.loads(line)
        return found if isinstance(found, dict) else {}

    def close(self) -> None:
        self._sock.close()
