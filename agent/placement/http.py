"""One question and its answer over HTTP, bounded in time and size whatever the server does."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Mapping
from typing import Any

import requests
import urllib3
from urllib3.connection import HTTPConnection

from agent import connections
from agent.images.remote.source import public_url
from agent.placement.errors import PlacementError

MAX_BYTES = 16 << 20
"""Of an answer: the allocations of some 50,000 consumers."""
_CHUNK = 1 << 16


class Http:
    """Connections of one thread at a time; `cut` may come from any.

    :param seconds: for a connection, and for a whole answer.
    :param ca_file: certificates to trust instead of the usual ones, a PEM file.
    """

    def __init__(self, *, seconds: float = 10.0, ca_file: str = "", max_bytes: int = MAX_BYTES) -> None:
        self._seconds = seconds
        self._max_bytes = max_bytes
        self._brake = connections.Brake()
        self._late = False
        self._session = connections.session(self._connect, ca_file=ca_file)

    def ask(
        self, method: str, url: str, headers: Mapping[str, str] | None = None, body: object = None
    ) -> tuple[int, Mapping[str, str], Any]:
        """Status, headers and the JSON of an answer (None if it is none); nothing is followed.

        :raises PlacementError: ``placement.unreachable``; ``placement.bad_answer`` when it is too long.
        """
        sent = {"Accept": "application/json", "Accept-Encoding": "identity", **(headers or {})}
        data = None if body is None else json.dumps(body).encode()
        if data is not None:
            sent["Content-Type"] = "application/json"
        self._late = False
        # A socket's own timeout begins anew with each byte.
        watch = threading.Timer(2 * self._seconds, self.cut)
        watch.daemon = True
        watch.start()
        try:
            with self._session.request(
                method, url, headers=sent, data=data, stream=True, allow_redirects=False, timeout=self._seconds
            ) as answer:
                text = self._read(answer)
            if self._late:
                raise TimeoutError  # what came until then looks like an answer with a short body
        except (requests.RequestException, urllib3.exceptions.HTTPError, OSError, ValueError) as exc:
            raise self._failed(url, exc) from exc
        finally:
            watch.cancel()
        if len(text) > self._max_bytes:
            raise PlacementError("placement.bad_answer", f"{public_url(url)}: the answer is longer than is believed")
        try:
            found = json.loads(text)
        except (ValueError, RecursionError):
            found = None
        return answer.status_code, answer.headers, found

    def cut(self) -> None:
        """End the connection that is open."""
        self._late = True
        self._brake.cut()

    def close(self) -> None:
        self._session.close()
        self._brake.close()

    def _connect(self, connection: HTTPConnection, usual: Callable[[], socket.socket]) -> socket.socket:
        sock = usual()
        self._brake.keep(sock)
        return sock

    def _read(self, answer: requests.Response) -> bytes:
        found = bytearray()
        while len(found) <= self._max_bytes:
            block = answer.raw.read(_CHUNK, decode_content=False)
            if not block:
                break
            found += block
        else:
            answer.close()  # what is left of it is not read to use the connection again
        return bytes(found)

    def _failed(self, url: str, exc: BaseException) -> PlacementError:
        if isinstance(exc, requests.exceptions.SSLError):
            cause = "TLS fails: see [placement] ca_file"
        elif self._late or isinstance(exc, requests.Timeout | TimeoutError | urllib3.exceptions.TimeoutError):
            cause = f"no whole answer within {2 * self._seconds:g} s: see [placement] timeout"
        elif isinstance(exc, requests.exceptions.InvalidURL | requests.exceptions.MissingSchema):
            cause = "no URL: see [placement] endpoint"
        else:
            cause = "no answer: is it running, and is the URL right?"
        return PlacementError("placement.unreachable", f"{public_url(url)}: {cause}", retryable=True)
