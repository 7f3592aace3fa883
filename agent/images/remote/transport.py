"""HTTP with requests: every address is looked at before it is connected to, every redirect before it is followed.

A name is resolved here, once, and the connection goes to the addresses that were looked at, so that a name server
which answers differently the second time changes nothing. A connection can be cut from another thread.
"""

from __future__ import annotations

import http.client
import json
import socket
import time
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import urljoin

import requests
import urllib3
from urllib3.connection import HTTPConnection

from agent import connections
from agent.conf_images import ImageSettings
from agent.errors import InstructionError
from agent.images.remote.policy import Policy, origin, refused
from agent.images.remote.source import public_url

MAX_REDIRECTS = 5
MAX_ADDRESSES = 4
MAX_ANSWER = 4 << 20
"""Of an answer that is read as JSON, bytes."""
_REDIRECTS = (301, 302, 303, 307, 308)
_PRIVATE = ("x-auth-token", "authorization", "cookie")
FAILURES = (requests.RequestException, urllib3.exceptions.HTTPError, http.client.HTTPException, OSError, UnicodeError)
"""What may come out of requests while an answer is read."""


class Transport:
    """One user's connections. Not for several threads at once, but for `cut`."""

    def __init__(self, settings: ImageSettings, policy: Policy) -> None:
        self._settings = settings
        self._policy = policy
        self._brake = connections.Brake()
        self._cut = False
        self.broken = False  # the last connection was cut
        self._headers_until = 0.0
        self._proxy = origin_of_proxy(settings.proxy)
        self._session = connections.session(self._connected, ca_file=settings.ca_file, proxy=settings.proxy)

    def open(self, url: str, headers: Mapping[str, str] | None = None) -> requests.Response:
        """GET, with redirects followed; the body is still to be read. The caller closes it.

        :raises InstructionError: ``image.source_refused``; ``image.fetch_failed`` (retryable) when it does not answer.
        """
        sent = {"Accept-Encoding": "identity", **(headers or {})}
        for _ in range(MAX_REDIRECTS + 1):
            self._policy.check(url)
            answer = self._send("GET", url, sent, None)
            if answer.status_code not in _REDIRECTS:
                return answer
            target = urljoin(url, answer.headers.get("Location", ""))
            answer.close()
            if origin(target)[0] != "https" and origin(url)[0] == "https":
                raise refused(f"{public_url(url)} leads to {public_url(target)}, without TLS: not followed")
            if origin(target) != origin(url):
                sent = {name: value for name, value in sent.items() if name.lower() not in _PRIVATE}
            url = target
        raise refused(f"{public_url(url)} leads on more than {MAX_REDIRECTS} times: give the last URL")

    def ask(
        self, method: str, url: str, headers: Mapping[str, str] | None = None, body: object = None
    ) -> tuple[int, Mapping[str, str], Any]:
        """Status, headers and the JSON of an answer (None if it is none); nothing is followed.

        :raises InstructionError: as for `open`.
        """
        self._policy.check(url)
        sent = {"Accept-Encoding": "identity", "Accept": "application/json", **(headers or {})}
        data = None if body is None else json.dumps(body).encode()
        if data is not None:
            sent["Content-Type"] = "application/json"
        with self._send(method, url, sent, data) as answer:
            try:
                self._headers_until = time.monotonic() + self._settings.answer_seconds
                text = answer.raw.read(MAX_ANSWER + 1, decode_content=False)
            except FAILURES as exc:
                raise failed(url, exc) from exc
            finally:
                self._headers_until = 0.0
        if len(text) > MAX_ANSWER:
            raise InstructionError("image.fetch_failed", f"{public_url(url)}: the answer is too long")
        try:
            found = json.loads(text)
        except (ValueError, RecursionError):
            found = None
        return answer.status_code, answer.headers, found

    def late(self) -> bool:
        """Whether an answer's headers have been waited for too long: call `cut` then."""
        return 0.0 < self._headers_until < time.monotonic()

    def cut(self, *, forever: bool = False) -> None:
        """End the connection that is open; from any thread. :param forever: let none come about any more."""
        self._cut = self._cut or forever  # before the brake: a connection that comes about now sees it
        self.broken = True
        self._brake.cut()

    def close(self) -> None:
        self._session.close()
        self._brake.close()

    def _send(self, method: str, url: str, headers: Mapping[str, str], body: bytes | None) -> requests.Response:
        limits = (self._settings.connect_seconds, min(self._settings.answer_seconds, self._settings.stall_seconds))
        self._headers_until = time.monotonic() + self._settings.connect_seconds + self._settings.answer_seconds
        try:
            return self._session.request(
                method, url, headers=dict(headers), data=body, stream=True, allow_redirects=False, timeout=limits
            )
        except FAILURES as exc:
            raise failed(url, exc) from exc
        finally:
            self._headers_until = 0.0

    def connect(self, host: str, port: int, seconds: float | None) -> socket.socket:
        """A connection to one of the addresses that a name has, if all of them may be connected to."""
        host = host.strip("[]")
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        if (host.lower(), port) != self._proxy and not self._policy.trusts(host, port):
            for *_, address in found:
                self._policy.check_address(host, str(address[0]))
        error = OSError(f"{host} has no address")
        for family, kind, proto, _, address in found[:MAX_ADDRESSES]:
            sock = socket.socket(family, kind, proto)
            try:
                sock.settimeout(seconds)
                sock.connect(address)
                self._keep(sock)
                return sock
            except OSError as exc:
                sock.close()
                error = exc
        raise error

    def _keep(self, sock: socket.socket) -> None:
        self.broken = False  # before it can be cut
        self._brake.keep(sock)
        if self._headers_until:
            self._headers_until = time.monotonic() + self._settings.answer_seconds
        if self._cut:
            raise ConnectionAbortedError("given up")

    def _connected(self, connection: HTTPConnection, usual: Callable[[], socket.socket]) -> socket.socket:
        """Not the usual way: to the addresses that were looked at."""
        timeout = connection.timeout
        try:
            return self.connect(connection.host, connection.port, timeout if isinstance(timeout, float | int) else None)
        except TimeoutError as exc:
            raise urllib3.exceptions.ConnectTimeoutError(connection, "no connection in time") from exc
        except OSError as exc:
            raise urllib3.exceptions.NewConnectionError(connection, exc.strerror or f"{exc}") from exc


def failed(url: str, exc: BaseException) -> InstructionError:
    """Of one of `FAILURES`."""
    if isinstance(exc, requests.exceptions.SSLError):
        text = f"{public_url(url)}: TLS fails ({_short(exc)}): see [images] ca_file"
        return InstructionError("image.fetch_failed", text)
    if isinstance(exc, requests.exceptions.ProxyError):
        # Its text may hold the proxy's password.
        text = f"{public_url(url)}: the proxy does not serve it: see [images] proxy"
        return InstructionError("image.fetch_failed", text, retryable=True)
    return InstructionError("image.fetch_failed", f"{public_url(url)}: {_short(exc)}", retryable=True)


def origin_of_proxy(url: str) -> tuple[str, int]:
    host, _, port = url.partition("://")[2].rpartition("@")[2].rstrip("/").rpartition(":")
    return host.strip("[]").lower(), int(port) if port.isdigit() else 0


def _short(exc: BaseException) -> str:
    """The innermost cause: what requests and urllib3 put around it names objects, and URLs with their queries."""
    seen: BaseException = exc
    for _ in range(8):
        inner = getattr(seen, "reason", None) or (seen.args[0] if seen.args else None)
        if not isinstance(inner, BaseException):
            break
        seen = inner
    if isinstance(seen, TimeoutError | urllib3.exceptions.TimeoutError | requests.Timeout):
        return "no answer in time"
    if isinstance(seen, OSError) and seen.strerror:
        return str(seen.strerror)
    if isinstance(seen, urllib3.exceptions.NewConnectionError | requests.ConnectionError):
        return "no connection"
    return " ".join(f"{seen}".split())[:160] or type(seen).__name__
