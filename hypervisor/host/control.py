"""The control socket's server: connections, framing, limits. What verbs do is in `verbs`."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from hypervisor.errors import HostFailure, ProtocolError, ToolstackError
from hypervisor.host import channel as channels
from hypervisor.host import protocol
from hypervisor.host.protocol import Request
from hypervisor.toolstack.api import DomainEvent
from hypervisor.waiting import within

LOG = logging.getLogger(__name__)

MAX_REQUESTS = 32
"""Requests of one connection at work at once; more are not read until one is done."""

MAX_BACKLOG = 1 << 20
"""Bytes that a client may leave unread: then it gets no events (it is cut off), and a console loses output."""

HELLO_TIMEOUT = 10.0


class ConsolePort(Protocol):
    """What an attached client gets. `attach` returns the way out."""

    def attach(self, show: Callable[[bytes], None], gone: Callable[[], None]) -> Callable[[], None]: ...

    async def typed(self, data: bytes) -> None: ...


class Service(Protocol):
    """What the server serves."""

    async def call(self, verb: str, args: dict[str, Any]) -> Any:
        """:raises ToolstackError: the answer is an error."""

    def subscribe(self, listener: Callable[[DomainEvent], None]) -> Callable[[], None]: ...

    def console(self, uuid: str) -> ConsolePort: ...


class ControlServer:
    """:param max_clients: connections at once; one more is told so and closed."""

    def __init__(self, service: Service, *, max_clients: int = 64) -> None:
        self._service = service
        self._max_clients = max_clients
        self._clients: set[_Client] = set()
        self._server: asyncio.Server | None = None
        self._path: Path | None = None

    async def start(self, path: Path) -> None:
        """:raises HostFailure: the socket cannot be made."""
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            sock = channels.listen(path, socket.SOCK_STREAM, backlog=64)
        except OSError as exc:
            raise HostFailure(f"control socket {path} cannot be made: {exc.strerror}; give another --socket") from exc
        self._path = path
        self._server = await asyncio.start_unix_server(self._connected, sock=sock, limit=protocol.REQUEST_MAX)

    async def stop(self) -> None:
        if self._server is not None:
            self._server.close()
            for client in list(self._clients):
                client.close()
            if self._path is not None:
                self._path.unlink(missing_ok=True)
            self._server = None

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        uid = channels.peer(writer.get_extra_info("socket"))[1]
        client = _Client(self._service, reader, writer)
        try:
            if not channels.allowed(uid):
                LOG.warning("user %d refused at the control socket", uid)
                return
            if len(self._clients) >= self._max_clients:
                error = HostFailure(f"{self._max_clients} clients are connected: close one or raise max_clients")
                client.write({"id": 0, "error": error.to_json()})
                return
            self._clients.add(client)
            await client.serve()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            self._clients.discard(client)
            client.close()


class _Client:
    def __init__(self, service: Service, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._service = service
        self._reader = reader
        self._writer = writer
        self._slots = asyncio.Semaphore(MAX_REQUESTS)
        self._tasks: set[asyncio.Task[None]] = set()
        self._unsubscribe: Callable[[], None] | None = None

    async def serve(self) -> None:
        self.write({"hello": {"protocol": list(protocol.VERSION), "version": protocol.version()}})
        try:
            request = await within(self._next(), HELLO_TIMEOUT)
        except TimeoutError:
            return
        if request is None or not self._hello(request):
            return
        while True:
            request = await self._next()
            if request is None:
                return
            if request.verb == "console.attach":
                await self._console(request)
                return
            await self._slots.acquire()
            task = asyncio.get_running_loop().create_task(self._answer(request))
            self._tasks.add(task)
            task.add_done_callback(self._done)

    def write(self, message: dict[str, Any]) -> None:
        if not self._writer.is_closing():
            self._writer.write(protocol.encode(message))

    def close(self) -> None:
        """Work that was begun is finished, only its answer is lost."""
        if self._unsubscribe is not None:
            self._unsubscribe()
            self._unsubscribe = None
        with contextlib.suppress(Exception):
            self._writer.close()

    async def _next(self) -> Request | None:
        """The next request; None at the end or after a line that cannot be one."""
        try:
            line = await self._reader.readuntil(b"\n")
        except asyncio.IncompleteReadError:
            return None
        except asyncio.LimitOverrunError:
            self._fail(0, ProtocolError(f"a line is longer than {protocol.REQUEST_MAX} bytes: send less"))
            return None
        try:
            return protocol.decode_request(line)
        except ProtocolError as exc:
            self._fail(0, exc)
            return None

    def _hello(self, request: Request) -> bool:
        try:
            if request.verb != "hello":
                raise ProtocolError("the first verb is hello: say which protocol you speak")
            protocol.check_version(request.args.get("protocol"))
        except ProtocolError as exc:
            self._fail(request.id, exc)
            return False
        self.write({"id": request.id, "result": {"protocol": list(protocol.VERSION)}})
        return True

    async def _answer(self, request: Request) -> None:
        try:
            if request.verb == "events.subscribe":
                if self._unsubscribe is None:
                    self._unsubscribe = self._service.subscribe(self._event)
                result = None
            else:
                result = await self._service.call(request.verb, request.args)
        except ToolstackError as exc:
            self._fail(request.id, exc)
        except Exception as exc:
            LOG.exception("verb %s failed", request.verb)
            error = HostFailure(f"{request.verb} failed: {type(exc).__name__}: {exc}; see the host's log")
            self._fail(request.id, error)
        else:
            self.write({"id": request.id, "result": result})
        with contextlib.suppress(ConnectionError):
            await self._writer.drain()

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._slots.release()

    def _event(self, event: DomainEvent) -> None:
        if self._writer.transport.get_write_buffer_size() > MAX_BACKLOG:
            LOG.warning("a client does not read its events: closing its connection")
            self.close()
            return
        self.write({"event": {"kind": event.kind, "uuid": event.uuid, "time": event.time, "detail": event.detail}})

    def _fail(self, number: int, error: ToolstackError) -> None:
        self.write({"id": number, "error": error.to_json()})

    # -- console --------------------------------------------------------------------------------------------------

    async def _console(self, request: Request) -> None:
        try:
            console = self._service.console(str(request.args.get("uuid")))
        except ToolstackError as exc:
            self._fail(request.id, exc)
            return
        viewer = _Viewer(self._writer)
        detach = console.attach(viewer.show, viewer.gone)
        try:
            self.write({"id": request.id, "result": None})
            viewer.opened = True
            while data := await self._reader.read(4096):
                await console.typed(data)
        finally:
            detach()


class _Viewer:
    """Shows output to one client; one that does not read loses some, and is told how much."""

    def __init__(self, writer: asyncio.StreamWriter) -> None:
        self._writer = writer
        self._lost = 0
        self.opened = False

    def show(self, data: bytes) -> None:
        if self._writer.is_closing():
            return
        if self._writer.transport.get_write_buffer_size() > MAX_BACKLOG:
            self._lost += len(data)
            return
        if self._lost:
            data = b"\r\n[%d bytes of output are only in the log]\r\n" % self._lost + data
            self._lost = 0
        self._writer.write(data)

    def gone(self) -> None:
        self._writer.close()
