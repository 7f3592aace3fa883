"""xenstored's UNIX socket: for tools on this host, with dom0's rights.

libxenstore, and with it Debian's xenstore-utils, finds it by the environment
variable ``XENSTORED_PATH``. The socket is 0600, and the peer's user must be
this process's own or root.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import stat
import struct
from pathlib import Path

from hypervisor.xenstore.connection import Connection
from hypervisor.xenstore.errors import ProtocolViolation
from hypervisor.xenstore.server import Server

LOG = logging.getLogger(__name__)

REQUESTS_PER_TURN = 16
STUCK_AFTER = 30.0
"""Seconds after which a tool that reads nothing of what waits for it is cut off."""
MAX_CLIENTS = 256
_CHUNK = 65536
_MAX_INPUT = 2 * _CHUNK
_LISTEN_BACKLOG = 32
_UCRED = struct.Struct("3i")


class _Client(asyncio.Protocol):
    """One tool's connection: the `Endpoint` of a `Connection`."""

    def __init__(self, owner: UnixServer) -> None:
        self._owner = owner
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._conn: Connection | None = None
        self._input = bytearray()
        self._writable = True
        self._turn_pending = False
        self._reading = True
        self._watchdog: asyncio.TimerHandle | None = None

    # -- asyncio.Protocol -------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        refusal = self._owner.refusal(transport.get_extra_info("socket"))
        if refusal:
            LOG.warning("xenstore socket: client refused: %s", refusal)
            transport.abort()
            return
        transport.set_write_buffer_limits(high=_CHUNK)
        self._conn = self._owner.server.connect(self, "socket client")
        self._owner.clients.add(self)

    def data_received(self, data: bytes) -> None:
        self._input += data
        if len(self._input) >= _MAX_INPUT and self._reading:
            self._pause(True)
        self.resume()

    def pause_writing(self) -> None:
        self._writable = False
        self._watchdog = self._loop.call_later(STUCK_AFTER, self._cut_off)

    def resume_writing(self) -> None:
        self._writable = True
        if self._watchdog is not None:
            self._watchdog.cancel()
            self._watchdog = None
        self.output_ready()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._watchdog is not None:
            self._watchdog.cancel()
        self._owner.clients.discard(self)
        if self._conn is not None:
            conn, self._conn = self._conn, None
            self._owner.server.disconnect(conn)

    # -- Endpoint ---------------------------------------------------------------------------------------------

    def output_ready(self) -> None:
        while self._conn is not None and self._transport is not None and self._writable and self._conn.pending:
            data = self._conn.peek_output(_CHUNK)
            self._conn.consume_output(len(data))
            self._transport.write(data)
        if self._conn is not None and self._conn.stuck:
            self._cut_off()

    def resume(self) -> None:
        if not self._turn_pending:
            self._turn_pending = True
            self._loop.call_soon(self._turn)

    def positions(self) -> tuple[int, int]:
        return 0, 0

    # -- inside -------------------------------------------------------------------------------------------------

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def _turn(self) -> None:
        """Handle a few requests, then let the others have their turn."""
        self._turn_pending = False
        try:
            for _ in range(REQUESTS_PER_TURN):
                if self._conn is None or not self._conn.accepts or not self._one(self._conn):
                    break
            else:
                self.resume()
        except ProtocolViolation as exc:
            LOG.warning("xenstore socket: client cut off: %s", exc)
            self.close()
        if not self._reading and len(self._input) < _CHUNK:
            self._pause(False)

    def _one(self, conn: Connection) -> bool:
        while (wanted := conn.parser.wanted) and self._input:
            conn.parser.feed(bytes(self._input[:wanted]))
            del self._input[:wanted]
        packet = conn.parser.next()
        if packet is not None:
            self._owner.server.process(conn, packet)
        return packet is not None

    def _pause(self, pause: bool) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._reading = not pause
            if pause:
                self._transport.pause_reading()
            else:
                self._transport.resume_reading()

    def _cut_off(self) -> None:
        LOG.warning("xenstore socket: a client that does not read its answers is cut off")
        self.close()


class UnixServer:
    """Listens on a UNIX socket for `server`. All methods run in the event loop's thread."""

    def __init__(self, server: Server, path: Path) -> None:
        self.server = server
        self.path = path
        self.clients: set[_Client] = set()
        self._listener: asyncio.Server | None = None

    async def start(self) -> None:
        """Listen. A socket left behind by a process that is gone is replaced.

        :raises FileExistsError: the path is something else than a socket, or another process listens there.
        :raises OSError: the socket cannot be made there.
        """
        _remove_stale(self.path)
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            # The mode of the socket before bind is what the file gets: there is no moment when others may connect.
            os.fchmod(sock.fileno(), 0o600)
            sock.bind(str(self.path))
            os.chmod(self.path, 0o600)
        except OSError:
            sock.close()
            raise
        loop = asyncio.get_running_loop()
        self._listener = await loop.create_unix_server(lambda: _Client(self), sock=sock, backlog=_LISTEN_BACKLOG)

    async def stop(self) -> None:
        """Close the socket and every client, and remove the path."""
        if self._listener is not None:
            self._listener.close()
            for client in list(self.clients):
                client.close()
            await self._listener.wait_closed()
            self._listener = None
            self.path.unlink(missing_ok=True)

    def refusal(self, sock: socket.socket) -> str:
        """Why a new client is not served; empty when it is."""
        if len(self.clients) >= MAX_CLIENTS:
            return f"{MAX_CLIENTS} clients are connected already"
        pid, uid, _gid = _UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
        return "" if uid in (0, os.geteuid()) else f"process {pid} belongs to user {uid}"


def _remove_stale(path: Path) -> None:
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise FileExistsError(f"{path} exists and is no socket: give another path, or remove it")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
            return
    raise FileExistsError(f"another xenstored listens on {path}: stop it, or give another path")
