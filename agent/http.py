"""A small HTTP server for monitoring: a table of paths, GET and HEAD, one answer a connection.

Whoever connects is hostile until proven otherwise: so many connections at once, so many bytes of request, so many
seconds from accept to close, nothing of the request kept or echoed. Beyond the number of connections the caller gets
503 at once.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

LOG = logging.getLogger(__name__)

MAX_CONNECTIONS = 8
MAX_REQUEST_BYTES = 8192
REQUEST_SECONDS = 5.0
"""From accept to the end of the request's head; the answer may take as long again to be read."""
BACKLOG = 32
ACCEPT_PAUSE = 0.2

_REASONS = {
    200: "OK",
    400: "Bad Request",
    404: "Not Found",
    405: "Method Not Allowed",
    408: "Request Timeout",
    431: "Request Header Fields Too Large",
    500: "Internal Server Error",
    503: "Service Unavailable",
}


class Answer(NamedTuple):
    status: int
    body: bytes
    content_type: str = "text/plain; charset=utf-8"


class Refused(Exception):
    """The request is not answered from the table: with this status instead."""

    def __init__(self, status: int) -> None:
        super().__init__(_REASONS[status])
        self.answer = Answer(status, f"{_REASONS[status]}\n".encode())


class HttpServer:
    """:param pages: path to what makes the answer; called in a thread of its own for each request.

    :param port: 0 for any free one.
    :raises OSError: `start` cannot listen there.
    """

    def __init__(self, address: str, port: int, pages: Mapping[str, Callable[[], Answer]]) -> None:
        self._address = address
        self._port = port
        self._pages = dict(pages)
        self._slots = threading.BoundedSemaphore(MAX_CONNECTIONS)
        self._listener: socket.socket | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._main, name="http", daemon=True)

    @property
    def port(self) -> int:
        """The port it listens on; 0 before `start`."""
        return 0 if self._listener is None else int(self._listener.getsockname()[1])

    def start(self) -> None:
        family = socket.AF_INET6 if ":" in self._address else socket.AF_INET
        listener = socket.create_server((self._address, self._port), family=family, backlog=BACKLOG)
        listener.settimeout(ACCEPT_PAUSE)
        self._listener = listener
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(5)
        if self._listener is not None:
            self._listener.close()

    def _main(self) -> None:
        assert self._listener is not None
        while not self._stop.is_set():
            try:
                connection, _peer = self._listener.accept()
            except TimeoutError:
                continue
            except OSError as exc:  # no descriptors left, or a connection that ended at once
                LOG.debug("http: %s", exc)
                self._stop.wait(ACCEPT_PAUSE)
                continue
            if not self._slots.acquire(blocking=False):
                with connection, contextlib.suppress(OSError):
                    connection.settimeout(0)
                    connection.send(_encoded(Refused(503).answer, head=False))
                continue
            try:
                threading.Thread(target=self._serve, args=(connection,), name="http-request", daemon=True).start()
            except RuntimeError as exc:  # no thread can be made
                LOG.warning("http: %s", exc)
                connection.close()
                self._slots.release()

    def _serve(self, connection: socket.socket) -> None:
        try:
            with connection, contextlib.suppress(OSError):
                method = ""
                try:
                    method, path = _request(connection, time.monotonic() + REQUEST_SECONDS)
                    answer = self._answer(method, path)
                except Refused as exc:
                    answer = exc.answer
                connection.settimeout(REQUEST_SECONDS)  # of sendall as a whole
                connection.sendall(_encoded(answer, head=method == "HEAD"))
                connection.shutdown(socket.SHUT_WR)
        finally:
            self._slots.release()

    def _answer(self, method: str, path: str) -> Answer:
        page = self._pages.get(path.partition("?")[0])
        if page is None:
            raise Refused(404)
        if method not in ("GET", "HEAD"):
            raise Refused(405)
        try:
            return page()
        except Exception:
            LOG.exception("a mistake in the page %s", path.partition("?")[0])
            raise Refused(500) from None


def _request(connection: socket.socket, end: float) -> tuple[str, str]:
    """Method and path. :raises Refused: not a request, too large or too slow. :raises OSError: the peer is gone."""
    head = b""
    while b"\r\n\r\n" not in head and b"\n\n" not in head:
        left = end - time.monotonic()
        if left <= 0:
            raise Refused(408)
        connection.settimeout(left)
        try:
            more = connection.recv(MAX_REQUEST_BYTES + 1 - len(head))
        except TimeoutError:
            raise Refused(408) from None
        if not more:
            raise Refused(400)
        head += more
        if len(head) > MAX_REQUEST_BYTES:
            raise Refused(431)
    words = head.split(b"\n", 1)[0].rstrip(b"\r").split(b" ")
    if len(words) != 3 or not words[2].startswith(b"HTTP/1.") or not words[1].startswith(b"/"):
        raise Refused(400)
    try:
        return words[0].decode("ascii"), words[1].decode("ascii")
    except UnicodeDecodeError:
        raise Refused(400) from None


def _encoded(answer: Answer, *, head: bool) -> bytes:
    lines = (
        f"HTTP/1.1 {answer.status} {_REASONS[answer.status]}",
        f"Content-Type: {answer.content_type}",
        f"Content-Length: {len(answer.body)}",
        "Cache-Control: no-store",
        "X-Content-Type-Options: nosniff",
        "Connection: close",
        *(("Allow: GET, HEAD",) if answer.status == 405 else ()),
    )
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + (b"" if head else answer.body)
