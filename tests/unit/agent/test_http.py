"""The small server of /metrics and the health pages, and those who mean no good by it."""

from __future__ import annotations

import http.client
import socket
import time
from collections.abc import Iterator

import pytest

from agent import http as agent_http
from agent.http import MAX_CONNECTIONS, Answer, HttpServer


def broken() -> Answer:
    raise ValueError("a mistake")


@pytest.fixture
def server() -> Iterator[HttpServer]:
    made = HttpServer("127.0.0.1", 0, {"/page": lambda: Answer(200, b"hello\n"), "/broken": broken})
    made.start()
    yield made
    made.stop()


def ask(server: HttpServer, method: str, path: str) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
    connection.request(method, path)
    response = connection.getresponse()
    body = response.read()
    connection.close()
    assert response.headers["Connection"] == "close"
    return response.status, body


def raw(server: HttpServer, data: bytes, *, end: bool = False) -> bytes:
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as sock:
        sock.sendall(data)
        if end:
            sock.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: received(sock), b""))


def received(sock: socket.socket) -> bytes:
    try:
        return sock.recv(65536)
    except ConnectionResetError:  # it did not read all that it was sent
        return b""


def test_pages(server: HttpServer) -> None:
    assert ask(server, "GET", "/page") == (200, b"hello\n")
    assert ask(server, "GET", "/page?x=1") == (200, b"hello\n")
    assert ask(server, "HEAD", "/page") == (200, b"")
    assert ask(server, "GET", "/other")[0] == 404
    assert ask(server, "POST", "/page")[0] == 405
    status, body = ask(server, "GET", "/broken")
    assert status == 500 and b"mistake" not in body


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"GET /page\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\r\n\r\n", 400),
        (b"GET http://x/page HTTP/1.1\r\n\r\n", 400),
        (b"GET /p\xff HTTP/1.1\r\n\r\n", 400),
        (b"GET /page HTTP/2\r\n\r\n", 400),
        (b"GET /../../etc/passwd HTTP/1.1\r\n\r\n", 404),
        (b"GET /page HTTP/1.1\r\n" + b"X: y\r\n" * 3000, 431),
        (b"GET /" + b"a" * 9000, 431),
    ],
)
def test_bad_requests(server: HttpServer, data: bytes, status: int) -> None:
    answer = raw(server, data)
    assert answer == b"" or answer.startswith(f"HTTP/1.1 {status} ".encode()), answer[:100]
    assert ask(server, "GET", "/page")[0] == 200


def test_one_that_ends_early_and_one_that_is_slow(server: HttpServer, monkeypatch: pytest.MonkeyPatch) -> None:
    assert raw(server, b"GET /page", end=True).startswith(b"HTTP/1.1 400 ")
    monkeypatch.setattr(agent_http, "REQUEST_SECONDS", 0.05)
    assert raw(server, b"GET /page HTTP/1.1\r\n").startswith(b"HTTP/1.1 408 ")


def test_a_flood_is_turned_away_and_ends(server: HttpServer, monkeypatch: pytest.MonkeyPatch) -> None:
    idle = [socket.create_connection(("127.0.0.1", server.port), timeout=10) for _ in range(MAX_CONNECTIONS)]
    extra = socket.create_connection(("127.0.0.1", server.port), timeout=10)
    assert extra.recv(100).startswith(b"HTTP/1.1 503 ")
    for sock in (*idle, extra):
        sock.close()
    end = time.monotonic() + 10
    while ask(server, "GET", "/page")[0] == 503:
        assert time.monotonic() < end


def test_a_taken_port_is_an_error(server: HttpServer) -> None:
    with pytest.raises(OSError):
        HttpServer("127.0.0.1", server.port, {}).start()
