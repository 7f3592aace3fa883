"""Something that speaks TLS on loopback where a broker would: with any certificate, alone or in front of a real one."""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
from types import TracebackType
from typing import Self

WAIT = 10.0


class TlsBroker:
    """Answers one connection at a time, as often as somebody comes.

    :param certificate: with `key`, what it shows.
    :param authority: who must have signed the client's; "": none is asked for.
    :ivar received: what it was sent after each handshake, at most 8 bytes; "" where there was none.
    """

    def __init__(self, certificate: str, key: str, authority: str = "", *, plain: bool = False) -> None:
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(certificate, key)
        if authority:
            self._context.load_verify_locations(authority)
            self._context.verify_mode = ssl.CERT_REQUIRED
        self._plain = plain
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.received: list[bytes] = []
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        return f"amqps://guest:secret@127.0.0.1:{self.port}/"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(WAIT)
        assert not self._thread.is_alive()

    def _serve(self) -> None:
        while True:
            try:
                taken, _ = self._listener.accept()
            except OSError:
                return
            taken.settimeout(WAIT)
            got = b""
            with contextlib.suppress(OSError), taken:
                if self._plain:
                    taken.recv(65536)
                    taken.sendall(b"HTTP/1.0 400 no\r\n\r\n")
                    taken.recv(65536)
                else:
                    with self._context.wrap_socket(taken, server_side=True, do_handshake_on_connect=False) as speaking:
                        got = _listen(speaking)
            self.received.append(got)


def _listen(speaking: ssl.SSLSocket) -> bytes:
    try:
        speaking.do_handshake()
    except ssl.SSLError:
        # What the client has sent meanwhile must not become a reset, which would overtake the alert.
        speaking.shutdown(socket.SHUT_WR)
        while socket.socket.recv(speaking, 4096):
            pass
        return b""
    return speaking.recv(8)
