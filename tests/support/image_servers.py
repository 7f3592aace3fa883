"""HTTP servers for tests of fetched images: one that serves files and misbehaves as it is told, and the least of
Keystone and Glance.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import hashlib
import json
import socket
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclasses.dataclass
class File:
    """:ivar misdeed: called instead of the usual answer: what a server of bad will does."""

    data: bytes
    etag: str = '"one"'
    misdeed: Callable[[Handler, File], None] | None = None


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, *args: Any) -> None: ...

    def do_POST(self) -> None:
        length = int(self.headers.get("Content-Length", 0))
        self.server.posts.append(json.loads(self.rfile.read(length)))
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = self.path.partition("?")[0]
        self.server.requests.append((self.path, dict(self.headers)))
        route = self.server.routes.get(path)
        if route is not None:
            route(self)
            return
        file = self.server.files.get(path)
        if file is None:
            self.reply(404, b"")
        elif file.misdeed is not None:
            with contextlib.suppress(OSError):
                file.misdeed(self, file)
        else:
            self.serve(file)

    def serve(self, file: File) -> None:
        """As a good server does, with ranges."""
        if self.headers.get("If-None-Match") == file.etag:
            self.reply(304, b"")
            return
        begin = 0
        asked = self.headers.get("Range", "")
        if asked and self.headers.get("If-Range", file.etag) == file.etag:
            begin = int(asked.removeprefix("bytes=").partition("-")[0])
        headers = {"ETag": file.etag} if file.etag else {}
        if not begin:
            self.reply(200, file.data, headers)
        elif begin >= len(file.data):
            self.reply(416, b"", headers)
        else:
            headers["Content-Range"] = f"bytes {begin}-{len(file.data) - 1}/{len(file.data)}"
            self.reply(206, file.data[begin:], headers)

    def reply(self, status: int, body: bytes, headers: dict[str, str] | None = None, length: int | None = None) -> None:
        self.begin(status, {"Content-Length": str(len(body) if length is None else length), **(headers or {})})
        with contextlib.suppress(OSError):
            self.wfile.write(body)

    def begin(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def hang_up(self) -> None:
        """Cut the connection."""
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    def trickle(self, data: bytes) -> None:
        """A byte now and then, until the other side has had enough or the test is over."""
        for byte in data:
            if self.server.over.wait(0.02):
                break
            self.wfile.write(bytes([byte]))
            self.wfile.flush()


class Server(ThreadingHTTPServer):
    """:ivar requests: path and headers of each. :ivar over: set when the test is over."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, File] = {}
        self.routes: dict[str, Callable[[Handler], None]] = {}
        self.requests: list[tuple[str, dict[str, str]]] = []
        self.posts: list[Any] = []
        self.over = threading.Event()

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}{path}"

    def asked(self, path: str) -> list[dict[str, str]]:
        """The headers of each request for a path."""
        return [headers for asked, headers in self.requests if asked.partition("?")[0] == path]

    def handle_error(self, request: Any, client_address: Any) -> None: ...


@contextlib.contextmanager
def serving() -> Iterator[Server]:
    server = Server()
    thread = threading.Thread(target=lambda: server.serve_forever(poll_interval=0.01), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.over.set()
        server.shutdown()
        server.server_close()
        thread.join(10)


def cut_at(count: int, times: int = 1) -> Callable[[Handler, File], None]:
    """Send so many bytes of what is asked for, then cut; `times` times, then behave."""
    left = [times]

    def misdeed(handler: Handler, file: File) -> None:
        if not left[0]:
            handler.serve(file)
            return
        left[0] -= 1
        begin = int(handler.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")[0])
        rest = file.data[begin:]
        headers = {"ETag": file.etag} if file.etag else {}
        if begin:
            headers["Content-Range"] = f"bytes {begin}-{len(file.data) - 1}/{len(file.data)}"
        handler.reply(206 if begin else 200, rest[:count], headers, len(rest))
        handler.hang_up()

    return misdeed


def endless(handler: Handler, file: File) -> None:
    handler.begin(200, {"Transfer-Encoding": "chunked"})
    block = b"10000\r\n" + bytes(0x10000) + b"\r\n"
    while not handler.server.over.is_set():
        handler.wfile.write(block)


def slow_body(handler: Handler, file: File) -> None:
    handler.begin(200, {"Content-Length": str(len(file.data))})
    handler.trickle(file.data)


def slow_headers(handler: Handler, file: File) -> None:
    handler.wfile.write(b"HTTP/1.1 200 OK\r\n")
    handler.trickle(b"X-Slow: yes\r\n" * 100)


def bomb(handler: Handler, file: File) -> None:
    body = gzip.compress(file.data)
    handler.reply(200, body, {"Content-Encoding": "gzip"})


def redirect(target: str, status: int = 302) -> Callable[[Handler, File], None]:
    return lambda handler, file: handler.reply(status, b"", {"Location": target})


class Cloud:
    """Keystone and Glance in one server: one user, tokens that may be revoked, images by id."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.images: dict[str, dict[str, Any]] = {}
        self.tokens: list[str] = []
        self.password = "s3cret"
        self.services = {"image": server.url("/image")}
        server.routes["/identity/v3/auth/tokens"] = self._token

    @property
    def auth_url(self) -> str:
        return self.server.url("/identity")

    def add(self, ident: str, data: bytes, **changes: Any) -> None:
        self.images[ident] = {
            "id": ident,
            "status": "active",
            "disk_format": "raw",
            "container_format": "bare",
            "size": len(data),
            "checksum": hashlib.md5(data, usedforsecurity=False).hexdigest(),
            "os_hash_algo": "sha512",
            "os_hash_value": hashlib.sha512(data).hexdigest(),
        } | changes
        base = f"/image/v2/images/{ident}"
        self.server.routes[base] = lambda handler: self._guard(
            handler, lambda: handler.reply(200, json.dumps(self.images[ident]).encode())
        )
        file = File(data, etag="")
        self.server.files[f"{base}/file"] = file
        file.misdeed = lambda handler, found: self._guard(handler, lambda: handler.serve(found))

    def _guard(self, handler: Handler, serve: Callable[[], None]) -> None:
        if handler.headers.get("X-Auth-Token") in self.tokens:
            serve()
        else:
            handler.reply(401, b"")

    def _token(self, handler: Handler) -> None:
        identity = self.server.posts[-1]["auth"]["identity"]
        method = identity["methods"][0]
        given = identity["password"]["user"]["password"] if method == "password" else identity[method]["secret"]
        if given != self.password:
            handler.reply(401, b"{}")
            return
        self.tokens.append(f"token-{len(self.tokens)}")
        services = [
            {"type": kind, "endpoints": [{"interface": "internal", "region_id": "one", "url": url}]}
            for kind, url in self.services.items()
        ]
        body = {
            "token": {
                "expires_at": "2099-01-01T00:00:00.000000Z",
                "catalog": [{"type": "compute", "endpoints": []}, *services],
            }
        }
        handler.reply(201, json.dumps(body).encode(), {"X-Subject-Token": self.tokens[-1]})
