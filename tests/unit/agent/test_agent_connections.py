"""The connection that is open, and its end from another thread."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator

import pytest
import requests
from urllib3.connection import HTTPConnection

from agent import connections


@pytest.fixture
def server() -> Iterator[str]:
    """It takes connections, and never answers."""
    taken: list[socket.socket] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def accept() -> None:
            with contextlib.suppress(OSError):
                while True:
                    taken.append(listener.accept()[0])

        thread = threading.Thread(target=accept)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/"
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(30)
        for sock in taken:
            sock.close()


def test_a_connection_is_cut_while_its_answer_is_waited_for(server: str) -> None:
    brake, kept = connections.Brake(), threading.Event()

    def connect(connection: HTTPConnection, usual: Callable[[], socket.socket]) -> socket.socket:
        sock = usual()
        brake.keep(sock)
        kept.set()
        return sock

    def cut() -> None:
        kept.wait(60)
        brake.cut()

    thread = threading.Thread(target=cut)
    thread.start()
    with connections.session(connect) as made, pytest.raises(requests.ConnectionError):
        made.get(server, timeout=100)
    thread.join(30)
    brake.cut()  # of one that is dead
    brake.close()
    brake.cut()
    brake.close()


def test_what_a_session_takes_from_nowhere_else(monkeypatch: pytest.MonkeyPatch, server: str) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    asked: list[tuple[str, int | None]] = []

    def connect(connection: HTTPConnection, usual: Callable[[], socket.socket]) -> socket.socket:
        asked.append((connection.host, connection.port))
        raise OSError("seen")

    with connections.session(connect) as made, pytest.raises(OSError, match="seen"):
        made.get(server)
    port = int(server.rstrip("/").rpartition(":")[2])
    assert asked == [("127.0.0.1", port)]
    with connections.session(connect, proxy="http://127.0.0.1:2") as made, pytest.raises(OSError, match="seen"):
        made.get(server)
    assert asked[1:] == [("127.0.0.1", 2)]
