"""The control socket with a made-up service behind it."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from hypervisor.errors import DomainNotFound
from hypervisor.host import channel as channels
from hypervisor.host import protocol
from hypervisor.host.control import ControlServer
from hypervisor.toolstack.api import DomainEvent

HELLO = {"id": 0, "verb": "hello", "args": {"protocol": [1, 0]}}


class Console:
    def __init__(self) -> None:
        self.shows: list[Callable[[bytes], None]] = []
        self.gone: Callable[[], None] = lambda: None
        self.heard = b""

    def attach(self, show: Callable[[bytes], None], gone: Callable[[], None]) -> Callable[[], None]:
        self.shows.append(show)
        self.gone = gone
        return lambda: self.shows.remove(show)

    async def typed(self, data: bytes) -> None:
        self.heard += data
        for show in self.shows:
            show(data.upper())


class Service:
    def __init__(self) -> None:
        self.listeners: list[Callable[[DomainEvent], None]] = []
        self.release = asyncio.Event()
        self.port = Console()

    async def call(self, verb: str, args: dict[str, Any]) -> Any:
        if verb == "slow":
            await self.release.wait()
            return "slow"
        if verb == "bug":
            raise ZeroDivisionError("by nothing")
        if verb == "echo":
            return args
        raise DomainNotFound("no such domain")

    def subscribe(self, listener: Callable[[DomainEvent], None]) -> Callable[[], None]:
        self.listeners.append(listener)
        return lambda: self.listeners.remove(listener)

    def console(self, uuid: str) -> Console:
        if uuid != "u":
            raise DomainNotFound(f"no domain {uuid}")
        return self.port


class Client:
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    async def send(self, message: object) -> None:
        data = message if isinstance(message, bytes) else json.dumps(message).encode() + b"\n"
        self.writer.write(data)
        await self.writer.drain()

    async def receive(self) -> dict[str, Any]:
        line = await asyncio.wait_for(self.reader.readline(), 10)
        answer: dict[str, Any] = json.loads(line) if line else {}
        return answer

    async def ask(self, number: int, verb: str, **args: Any) -> dict[str, Any]:
        await self.send({"id": number, "verb": verb, "args": args})
        return await self.receive()


Body = Callable[[Service, Callable[[], Awaitable[Client]]], Awaitable[None]]


def serve(folder: Path, body: Body, *, greet: bool = True, max_clients: int = 4) -> None:
    path = folder / ("a-long-folder-name-" * 8) / "control.sock"  # longer than sun_path

    async def main() -> None:
        service = Service()
        server = ControlServer(service, max_clients=max_clients)
        await server.start(path)

        async def connect() -> Client:
            sock = channels.connect(path, socket.SOCK_STREAM)
            client = Client(*await asyncio.open_connection(sock=sock))
            if greet:
                assert (await client.receive())["hello"]["protocol"] == list(protocol.VERSION)
                await client.send(HELLO)
                assert (await client.receive())["result"] == {"protocol": list(protocol.VERSION)}
            return client

        try:
            await asyncio.wait_for(body(service, connect), 20)
        finally:
            await server.stop()
        assert not path.exists()

    asyncio.run(main())


def test_socket_mode_and_answers(tmp_path: Path) -> None:
    async def body(service: Service, connect: Callable[[], Awaitable[Client]]) -> None:
        client = await connect()
        path = next(tmp_path.rglob("control.sock"))
        assert path.stat().st_mode & 0o777 == 0o600
        assert await client.ask(1, "echo", a=1) == {"id": 1, "result": {"a": 1}}
        assert (await client.ask(2, "other"))["error"]["code"] == "domain.not_found"
        error = (await client.ask(3, "bug"))["error"]
        assert error["code"] == "host.failure" and "ZeroDivisionError" in error["message"]

    serve(tmp_path, body)


def test_answers_come_as_work_ends(tmp_path: Path) -> None:
    async def body(service: Service, connect: Callable[[], Awaitable[Client]]) -> None:
        client = await connect()
        await client.send({"id": 1, "verb": "slow"})
        assert (await client.ask(2, "echo"))["id"] == 2
        service.release.set()
        assert await client.receive() == {"id": 1, "result": "slow"}

    serve(tmp_path, body)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b'{"id":5,"verb":"echo"}\n', "first verb is hello"),
        (b'{"id":5,"verb":"hello","args":{"protocol":[9,0]}}\n', "upgrade the older one"),
        (b"GET / HTTP/1.0\n", "not JSON"),
        (b"[" * 10_000 + b"\n", "not JSON"),
        (b"x" * (protocol.REQUEST_MAX + 2), "longer than"),
    ],
)
def test_a_stranger_is_told_and_closed(tmp_path: Path, line: bytes, words: str) -> None:
    async def body(service: Service, connect: Callable[[], Awaitable[Client]]) -> None:
        client = await connect()
        await client.receive()
        await client.send(line)
        assert words in (await client.receive())["error"]["message"]
        assert await client.receive() == {}

    serve(tmp_path, body, greet=False)


def test_one_client_too_many_is_told(tmp_path: Path) -> None:
    async def body(service: Service, connect: Callable[[], Awaitable[Client]]) -> None:
        first = await connect()
        await first.receive()
        second = await connect()
        assert "close one or raise max_clients" in (await second.receive())["error"]["message"]
        assert await second.receive() == {}

    serve(tmp_path, body, greet=False, max_clients=1)


def test_another_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channels, "allowed", lambda uid: False)

    async def body(service: Service, connect: Callable[[], Awaitable[Client]]) -> None:
        client = await connect()
        assert await client.receive() == {}

    serve(tmp_path, body, greet=False)


def test_events_reach_whoever_asked_until_he_leaves(tmp_path: Path) -> None:
    async def body(service: Service, connect: Callable[[], Awaitable[Client]]) -> None:
        client = await connect()
        await client.ask(1, "events.subscribe")
        await client.ask(2, "events.subscribe")  # twice is once
        (listener,) = service.listeners
        listener(DomainEvent("created", "u", 1.0, "d"))
        assert await client.receive() == {"event": {"kind": "created", "uuid": "u", "time": 1.0, "detail": "d"}}
        client.writer.close()
        while service.listeners:
            await asyncio.sleep(0)

    serve(tmp_path, body)


def test_a_console_is_bytes_both_ways(tmp_path: Path) -> None:
    async def body(service: Service, connect: Callable[[], Awaitable[Client]]) -> None:
        client = await connect()
        assert (await client.ask(1, "console.attach", uuid="x"))["error"]["code"] == "domain.not_found"
        client = await connect()
        assert await client.ask(1, "console.attach", uuid="u") == {"id": 1, "result": None}
        await client.send(b"hi\xff\n")
        assert await client.reader.readexactly(4) == b"HI\xff\n"
        assert service.port.heard == b"hi\xff\n"
        service.port.gone()
        assert await client.reader.read() == b""
        while service.port.shows:
            await asyncio.sleep(0)

    serve(tmp_path, body)


def test_a_console_client_that_does_not_read_is_told_what_it_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hypervisor.host.control.MAX_BACKLOG", 1000)

    async def body(service: Service, connect: Callable[[], Awaitable[Client]]) -> None:
        client = await connect()
        await client.ask(1, "console.attach", uuid="u")
        (show,) = service.port.shows
        for _ in range(200):
            show(b"x" * 10_000)
        seen = 0
        while b"only in the log" not in (data := await client.reader.read(1 << 16)):
            seen += data.count(b"x")
            if not seen % 7:
                await asyncio.sleep(0)
            show(b"y")
        assert 0 < seen < 2_000_000

    serve(tmp_path, body)
