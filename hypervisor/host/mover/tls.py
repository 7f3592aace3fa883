"""Mutual TLS 1.3 over a non-blocking socket, for a process that may open no file and make no socket.

Both sides have a certificate of the operator's CA; each is good for server and client (extended key usage, if there is
any, names both). The source checks that the target's names it; the target checks the source's if it was told a name.
"""

from __future__ import annotations

import encodings.idna  # ssl looks it up by name, when no file can be opened any more
import ipaddress
import select
import socket
import ssl
from collections.abc import Mapping
from typing import Any, cast

from hypervisor.errors import HostFailure
from hypervisor.host.mover.order import TlsFiles

_CODECS = (encodings.idna,)
CHUNK = 256 << 10
"""Bytes encrypted, or taken from the socket, at a time."""


class PeerClosed(Exception):
    """The other side is gone, or what it says is not TLS. The text says which."""


class Untrusted(Exception):
    """The other side's certificate is not good."""


class Tls:
    """This host's end of such connections: what was read from the files. :raises HostFailure: they are of no use."""

    def __init__(self, files: TlsFiles, *, server: bool) -> None:
        self._peer = files.peer
        self._server = server
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.verify_mode = ssl.CERT_REQUIRED
        context.check_hostname = not server
        if server:
            context.num_tickets = 0
        path = files.ca
        try:
            context.load_verify_locations(cafile=path)
            path = files.key
            # Never a question to a terminal: a key with a passphrase is refused.
            context.load_cert_chain(files.certificate, files.key, password=lambda: "")
            path = files.certificate
            with open(path, encoding="ascii", errors="replace") as file:
                self.certificate = ssl.PEM_cert_to_DER_cert(_first(file.read(1 << 20)))
        except (OSError, ValueError) as exc:  # ssl.SSLError is an OSError
            reason = exc.strerror if isinstance(exc, OSError) and exc.strerror else exc
            raise HostFailure(f"TLS: {path} cannot be used ({reason}): correct the tls_* settings") from exc
        self._context = context

    def connection(self, sock: socket.socket, address: str = "") -> TlsSocket:
        """:param sock: connected; owned from here on. :param address: of the target, for its certificate."""
        return TlsSocket(sock, self._context, server=self._server, name=self._peer or address)


def _first(text: str) -> str:
    end = "-----END CERTIFICATE-----"
    begin = text.find("-----BEGIN CERTIFICATE-----")
    if begin < 0 or end not in text[begin:]:
        raise ValueError("no certificate in it")
    return text[begin : text.index(end, begin) + len(end)]


class TlsSocket:
    """One connection. Encryption goes by way of buffers, so that reading never waits for writing.

    :param name: that the other's certificate must have; "": any (server only).
    :ivar bytes_sent, bytes_received: on the network.
    """

    def __init__(self, sock: socket.socket, context: ssl.SSLContext, *, server: bool, name: str) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._name = name
        self._server = server
        self._in, self._out = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._object = context.wrap_bio(
            self._in, self._out, server_side=server, server_hostname=None if server else name
        )
        self._unsent: memoryview = memoryview(b"")
        self._buffer = memoryview(bytearray(CHUNK))
        self._ended = False
        self.bytes_sent = self.bytes_received = 0

    def fileno(self) -> int:
        return self._sock.fileno()

    # -- handshake

    def handshake(self) -> bool:
        """Go on with it as far as the network allows. Whether it is done.

        :raises Untrusted: with the reason. :raises PeerClosed.
        """
        while True:
            try:
                self._object.do_handshake()
                break
            except ssl.SSLWantReadError:
                self._flush()
                if not self._fill():
                    return False
            except ssl.SSLCertVerificationError as exc:
                self._flush_last_words()
                raise Untrusted(f"its certificate is not good: {exc.verify_message or exc.reason}") from exc
            except ssl.SSLError as exc:
                self._flush_last_words()
                raise PeerClosed(f"TLS: {exc.reason or exc}") from exc
        self._flush()
        if self._server and self._name and not names(self._object.getpeercert() or {}, self._name):
            raise Untrusted(f"its certificate is not one of {self._name}")
        return True

    @property
    def peer_certificate(self) -> bytes:
        """DER."""
        return self._object.getpeercert(True) or b""

    # -- out

    @property
    def idle(self) -> bool:
        """Nothing waits to be sent."""
        return not self._unsent and not self._out.pending

    def write(self, data: bytes | bytearray | memoryview) -> int:
        """Take some bytes; how many. 0: what was taken before must go out first. :raises PeerClosed."""
        if not self.idle and not self._flush():
            return 0
        taken = 0
        view = memoryview(data)[:CHUNK]
        try:
            while taken < len(view):
                taken += self._object.write(view[taken:])
        except ssl.SSLError as exc:
            raise PeerClosed(f"TLS: {exc.reason or exc}") from exc
        self._flush()
        return taken

    def flush(self) -> bool:
        """Whether all is out. :raises PeerClosed."""
        return self._flush()

    def _flush(self) -> bool:
        while True:
            if not self._unsent:
                if not self._out.pending:
                    return True
                self._unsent = memoryview(self._out.read())
            try:
                sent = self._sock.send(self._unsent)
            except BlockingIOError:
                return False
            except OSError as exc:
                raise PeerClosed(f"the connection broke: {exc.strerror}") from exc
            self.bytes_sent += sent
            self._unsent = self._unsent[sent:]

    def _flush_last_words(self) -> None:
        """The alert tells the other side why."""
        try:
            self._flush()
        except PeerClosed:
            return

    # -- in

    def read_into(self, buffer: memoryview) -> int:
        """Some bytes, if there are; else 0. :raises PeerClosed: with what came before it read already."""
        taken = 0
        while taken < len(buffer):
            try:
                got = int(self._object.read(len(buffer) - taken, cast(bytearray, buffer[taken:])))
            except ssl.SSLWantReadError:
                if self._fill():
                    continue
                break
            except ssl.SSLZeroReturnError:
                got = 0
            except ssl.SSLError as exc:
                if taken:
                    break
                raise PeerClosed(f"TLS: {exc.reason or exc}") from exc
            if not got:
                if taken:
                    break
                raise PeerClosed("the other side closed the connection")
            taken += got
        self._flush()
        return taken

    def _fill(self) -> bool:
        """Take from the socket; whether there was anything, its end included."""
        if self._ended:
            return False
        try:
            got = self._sock.recv_into(self._buffer)
        except BlockingIOError:
            return False
        except OSError as exc:
            raise PeerClosed(f"the connection broke: {exc.strerror}") from exc
        if not got:
            self._ended = True
            self._in.write_eof()
            return True
        self.bytes_received += got
        self._in.write(self._buffer[:got])
        return True

    def wait(self, timeout: float) -> bool:
        """Until it can be read, or written to if something waits for that. Whether one of them came true."""
        poll = select.poll()
        poll.register(self._sock.fileno(), select.POLLIN | (0 if self.idle else select.POLLOUT))
        return bool(poll.poll(max(0.0, timeout) * 1000))

    def close(self) -> None:
        self._sock.close()


def names(certificate: Mapping[str, Any], wanted: str) -> bool:
    """Whether a certificate (`ssl.SSLSocket.getpeercert`) is one of `wanted`, a DNS name or an address.

    After RFC 6125: subject alternative names only, a wildcard only as the whole leftmost label.
    """
    found = certificate.get("subjectAltName", ())
    try:
        address = ipaddress.ip_address(wanted)
    except ValueError:
        return any(kind == "DNS" and _matches(str(name).lower(), wanted.lower().rstrip(".")) for kind, name in found)
    return any(kind == "IP Address" and _address(str(name)) == address for kind, name in found)


def _matches(pattern: str, name: str) -> bool:
    if pattern.startswith("*."):
        head, dot, tail = name.partition(".")
        return bool(head and dot) and tail == pattern[2:]
    return pattern == name


def _address(text: str) -> object:
    try:
        return ipaddress.ip_address(text.strip())
    except ValueError:
        return None
