"""Sessions of requests whose connection can be cut from another thread, whatever the server does."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import socket
import threading
from collections.abc import Callable
from typing import Any

import requests
from requests.adapters import HTTPAdapter
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool

Connect = Callable[[HTTPConnection, Callable[[], socket.socket]], socket.socket]
"""Makes the socket of a connection. The second argument is urllib3's own way, for those to whom that is right."""


class Brake:
    """The connection that is open. Its owner's thread keeps it, any thread may cut it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._socket: socket.socket | None = None

    def keep(self, sock: socket.socket) -> None:
        """A connection has come about; the one before is history."""
        # Another descriptor of the same connection: TLS takes the first one over.
        brake = socket.socket(fileno=os.dup(sock.fileno()))
        with self._lock:
            before, self._socket = self._socket, brake
        if before is not None:
            before.close()

    def cut(self) -> None:
        """End it; no effect if there is none."""
        with self._lock:
            if self._socket is not None:
                with contextlib.suppress(OSError):
                    self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        with self._lock:
            if self._socket is not None:
                self._socket.close()
                self._socket = None


def session(connect: Connect, *, ca_file: str = "", proxy: str = "") -> requests.Session:
    """A session that asks nothing of the environment, tries nothing twice and keeps one connection for each host.

    :param ca_file: certificates to trust instead of the usual ones, a PEM file. :param proxy: its URL.
    """
    made = requests.Session()
    made.headers["User-Agent"] = f"reeve/{importlib.metadata.version('reeve')}"
    made.trust_env = False  # no proxies, certificates or passwords of the environment
    if ca_file:
        made.verify = ca_file
    if proxy:
        made.proxies = {"http": proxy, "https": proxy}
    adapter = _Adapter(connect)
    made.mount("http://", adapter)
    made.mount("https://", adapter)
    return made


class _Adapter(HTTPAdapter):
    """Connections as `Connect` makes them, also those to a proxy."""

    def __init__(self, connect: Connect) -> None:
        self._pools = _pools(connect)
        super().__init__(pool_connections=2, pool_maxsize=1, max_retries=0)

    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        super().init_poolmanager(*args, **kwargs)
        self.poolmanager.pool_classes_by_scheme = self._pools

    def proxy_manager_for(self, *args: Any, **kwargs: Any) -> Any:
        manager = super().proxy_manager_for(*args, **kwargs)
        manager.pool_classes_by_scheme = self._pools
        return manager


def _pools(connect: Connect) -> dict[str, type[HTTPConnectionPool]]:
    class Plain(HTTPConnection):
        def _new_conn(self) -> socket.socket:
            return connect(self, super()._new_conn)

    class Tls(HTTPSConnection):
        def _new_conn(self) -> socket.socket:
            return connect(self, super()._new_conn)

    class PlainPool(HTTPConnectionPool):
        ConnectionCls = Plain

    class TlsPool(HTTPSConnectionPool):
        ConnectionCls = Tls

    return {"http": PlainPool, "https": TlsPool}
