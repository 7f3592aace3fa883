"""A tool's connection to a host's xenstored: for tests that play a front end, or look at nodes."""

from __future__ import annotations

import contextlib
import socket
from pathlib import Path

from hypervisor.xenstore.wire import Op, Packet, Parser


class XsClient:
    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(20)
        self._socket.connect(str(path))
        self._parser = Parser()

    def read(self, path: str) -> str | None:
        reply = self._call(Op.READ, path.encode() + b"\0")
        return None if reply.type == Op.ERROR else reply.payload.decode()

    def write(self, path: str, value: str) -> None:
        reply = self._call(Op.WRITE, path.encode() + b"\0" + value.encode())
        assert reply.type == Op.WRITE, reply.payload

    def remove(self, path: str) -> None:
        self._call(Op.RM, path.encode() + b"\0")

    def perms(self, path: str) -> str:
        return self._call(Op.GET_PERMS, path.encode() + b"\0").payload.rstrip(b"\0").replace(b"\0", b",").decode()

    def names(self, path: str) -> list[str]:
        reply = self._call(Op.DIRECTORY, path.encode() + b"\0")
        return [] if reply.type == Op.ERROR else [name.decode() for name in reply.payload.split(b"\0") if name]

    def next_event(self) -> bool:
        """Wait until a watch fires, however long that is; False: the connection was shut."""
        self._socket.settimeout(None)
        while self._parser.next() is None:
            try:
                data = self._socket.recv(65536)
            except OSError:
                return False
            if not data:
                return False
            self._parser.feed(data)
        return True

    def shutdown(self) -> None:
        """End what waits for it."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._socket.close()

    def _call(self, op: Op, payload: bytes) -> Packet:
        self._socket.sendall(Packet(op, 1, 0, payload).encode())
        while True:
            packet = self._parser.next()
            if packet is not None:
                return packet
            data = self._socket.recv(65536)
            assert data, "xenstored closed the connection"
            self._parser.feed(data)
