"""The UNIX socket, with clients of the test's own."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from hypervisor.xenstore import transport_unix
from hypervisor.xenstore.quota import Limits
from hypervisor.xenstore.server import Server
from hypervisor.xenstore.transport_unix import UnixServer
from hypervisor.xenstore.wire import HEADER, Op, Packet, Parser

DEADLINE = 10.0


def run(path: Path, body: Callable[[UnixServer], Awaitable[None]], server: Server | None = None) -> None:
    async def main() -> None:
        unix = UnixServer(server or Server(), path)
        await unix.start()
        try:
            await asyncio.wait_for(body(unix), DEADLINE)
        finally:
            await unix.stop()

    asyncio.run(main())


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0)


async def receive(reader: asyncio.StreamReader) -> Packet:
    head = await reader.readexactly(16)
    body = await reader.readexactly(HEADER.unpack(head)[3])
    parser = Parser(head + body)
    packet = parser.next()
    assert packet is not None
    return packet


def test_many_requests_in_one_write_are_all_answered_in_order(tmp_path: Path) -> None:
    async def body(unix: UnixServer) -> None:
        reader, writer = await asyncio.open_unix_connection(unix.path)
        for number in range(500):
            writer.write(Packet(Op.WRITE, number, 0, b"/a\0" + b"x" * 500).encode())
        assert [(await receive(reader)).req_id for _ in range(500)] == list(range(500))
        writer.close()
        await until(lambda: not unix.clients)

    run(tmp_path / "s", body)


def test_a_watch_reaches_another_client_and_ends_with_it(tmp_path: Path) -> None:
    async def body(unix: UnixServer) -> None:
        reader, watcher = await asyncio.open_unix_connection(unix.path)
        other_reader, writer = await asyncio.open_unix_connection(unix.path)
        watcher.write(Packet(Op.WATCH, 1, 0, b"/a\0t\0").encode())
        assert [(await receive(reader)).type for _ in range(2)] == [Op.WATCH, Op.WATCH_EVENT]
        writer.write(Packet(Op.WRITE, 1, 0, b"/a/b\0v").encode())
        assert (await receive(reader)).payload == b"/a/b\0t\0"
        await receive(other_reader)
        watcher.close()
        await until(lambda: len(unix.clients) == 1)
        writer.close()

    run(tmp_path / "s", body)


def test_a_broken_frame_ends_that_client_only(tmp_path: Path) -> None:
    async def body(unix: UnixServer) -> None:
        reader, writer = await asyncio.open_unix_connection(unix.path)
        other_reader, other = await asyncio.open_unix_connection(unix.path)
        writer.write(HEADER.pack(Op.READ, 1, 0, 5000))
        assert await reader.read() == b""
        other.write(Packet(Op.READ, 1, 0, b"/\0").encode())
        assert (await receive(other_reader)).type == Op.READ
        writer.close()
        other.close()

    run(tmp_path / "s", body)


def test_a_client_that_reads_nothing_is_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport_unix, "STUCK_AFTER", 0.05)
    server = Server(Limits(tool_output_bytes=1 << 16))

    async def body(unix: UnixServer) -> None:
        sock = socket.socket(socket.AF_UNIX)
        sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(sock, str(unix.path))
        loop = asyncio.get_running_loop()
        _reader, writer = await asyncio.open_unix_connection(unix.path)
        writer.write(Packet(Op.WRITE, 1, 0, b"/a\0" + b"x" * 4000).encode())
        await loop.sock_sendall(sock, Packet(Op.WATCH, 1, 0, b"/\0t\0").encode())
        await until(lambda: len(unix.clients) == 2)
        request = Packet(Op.READ, 1, 0, b"/a\0").encode() * 100
        try:
            while len(unix.clients) == 2:
                await asyncio.wait_for(loop.sock_sendall(sock, request), 1.0)
        except (ConnectionError, TimeoutError):
            pass
        await until(lambda: len(unix.clients) == 1)
        sock.close()
        writer.close()

    run(tmp_path / "s", body, server)


def test_too_many_clients_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport_unix, "MAX_CLIENTS", 1)

    async def body(unix: UnixServer) -> None:
        _reader, first = await asyncio.open_unix_connection(unix.path)
        await until(lambda: len(unix.clients) == 1)
        reader, second = await asyncio.open_unix_connection(unix.path)
        assert await reader.read() == b""
        first.close()
        second.close()

    run(tmp_path / "s", body)


def test_another_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def body(unix: UnixServer) -> None:
        monkeypatch.setattr(transport_unix.os, "geteuid", lambda: 4242)
        packed = transport_unix._UCRED.pack(1, 4243, 0)

        class Peer:
            def getsockopt(self, *_args: int) -> bytes:
                return packed

        assert "belongs to user 4243" in unix.refusal(Peer())  # type: ignore[arg-type]

    run(tmp_path / "s", body)


def test_the_socket_is_ours_alone_and_goes_with_us(tmp_path: Path) -> None:
    path = tmp_path / "s"

    async def body(unix: UnixServer) -> None:
        assert path.stat().st_mode & 0o777 == 0o600
        with pytest.raises(FileExistsError, match="another xenstored listens"):
            await UnixServer(Server(), path).start()

    run(path, body)
    assert not path.exists()


def test_a_socket_left_behind_is_replaced_and_a_file_is_not(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(path))

    async def body(unix: UnixServer) -> None:
        _reader, writer = await asyncio.open_unix_connection(unix.path)
        writer.close()

    run(path, body)
    path.write_text("precious")
    with pytest.raises(FileExistsError, match="no socket"):
        run(path, body)
    assert path.read_text() == "precious"
