"""How source and target come together: TLS, version, proof. In the mover process, non-blocking.

What speaks before it has proved itself is a stranger: strangers have `DEADLINE` seconds and little room, and do not
keep the one who is expected from coming in.
"""

from __future__ import annotations

import logging
import os
import select
import socket
import time
from collections.abc import Callable
from typing import TypeVar

from hypervisor.errors import HostUnavailable, MigrationRefused
from hypervisor.host.mover import wire
from hypervisor.host.mover.tls import PeerClosed, Tls, TlsSocket, Untrusted
from hypervisor.host.mover.wire import BadRecord, Header, Kind, Secret

LOG = logging.getLogger(__name__)
_T = TypeVar("_T")

DEADLINE = 10.0
MAX_STRANGERS = 16


class _Talk:
    """Records of a greeting: at most one at a time each way."""

    def __init__(self, tls: TlsSocket) -> None:
        self.tls = tls
        self.secure = False
        self._data = bytearray()

    def say(self, record: bytes) -> None:
        """Greetings are short: they always fit the socket's buffer."""
        if self.tls.write(record) != len(record) or not self.tls.flush():
            raise PeerClosed("it does not read")

    def hear(self, allowed: frozenset[Kind]) -> tuple[Header, bytes] | None:
        """A record, once it is there. :raises BadRecord, PeerClosed."""
        while True:
            want = wire.HEADER.size
            head = None
            if len(self._data) >= want:
                head = wire.parse_header(self._data[:want], allowed)
                want += head.length
            if head is not None and len(self._data) == want:
                body = bytes(self._data[wire.HEADER.size :])
                self._data.clear()
                return head, body
            buffer = memoryview(bytearray(want - len(self._data)))
            got = self.tls.read_into(buffer)
            if not got:
                return None
            self._data += buffer[:got]


class _Stranger:
    """Somebody at the target's door."""

    def __init__(self, tls: TlsSocket, own: Tls, secret: Callable[[bytes, bytes], Secret]) -> None:
        self._talk = _Talk(tls)
        self._own = own
        self._secret = secret
        self._nonce = os.urandom(wire.NONCE_BYTES)
        self.tls = tls
        self.until = time.monotonic() + DEADLINE

    def go_on(self) -> int | None:
        """Features, once it has proved who it is. :raises PeerClosed, Untrusted, BadRecord."""
        if not self._talk.secure:
            if not self.tls.handshake():
                return None
            self._talk.secure = True
            self._talk.say(wire.challenge(self._nonce))
        heard = self._talk.hear(frozenset({Kind.HELLO}))
        if heard is None:
            return None
        secret = self._secret(self._own.certificate, self.tls.peer_certificate)
        try:
            answer, features = wire.check_hello(heard[1], secret, self._nonce)
        except BadRecord as exc:
            self._talk.say(wire.record(Kind.REFUSED, str(exc).encode()[: wire.MAX_TEXT]))
            raise
        self._talk.say(wire.welcome(secret, self._nonce, answer))
        return features


def await_source(
    listener: socket.socket,
    own: Tls,
    secret: Callable[[bytes, bytes], Secret],
    channel_fd: int,
    serve: Callable[[], None],
    refused: Callable[[str], None],
) -> tuple[TlsSocket, int]:
    """The source's connection and features; the listener is closed then.

    :param secret: made of the target's and the source's certificates.
    :param serve: called when the channel can be read. :param refused: told why a stranger was sent away.
    """
    listener.setblocking(False)
    strangers: dict[int, _Stranger] = {}

    def drop(fd: int, why: str) -> None:
        strangers.pop(fd).tls.close()
        refused(why)

    try:
        while True:
            poll = select.poll()
            for fd in (listener.fileno(), channel_fd, *strangers):
                poll.register(fd, select.POLLIN)
            now = time.monotonic()
            first = min((s.until for s in strangers.values()), default=now + 60)
            for fd, _ in poll.poll(max(0.0, first - now) * 1000):
                if fd == channel_fd:
                    serve()
                elif fd == listener.fileno():
                    if len(strangers) >= MAX_STRANGERS:
                        drop(next(iter(strangers)), "too many others came after it")
                    _admit(listener, own, secret, strangers)
                elif fd in strangers:
                    try:
                        features = strangers[fd].go_on()
                    except (PeerClosed, Untrusted, BadRecord) as exc:
                        drop(fd, str(exc))
                        continue
                    if features is not None:
                        return strangers.pop(fd).tls, features
            for fd in [fd for fd, s in strangers.items() if s.until <= time.monotonic()]:
                drop(fd, f"it did not prove who it is within {DEADLINE:g} s")
    finally:
        listener.close()
        for stranger in strangers.values():
            stranger.tls.close()


def _admit(
    listener: socket.socket, own: Tls, secret: Callable[[bytes, bytes], Secret], strangers: dict[int, _Stranger]
) -> None:
    try:
        sock, _ = listener.accept()
    except OSError as exc:
        LOG.debug("accept: %s", exc)
        return
    tls = own.connection(sock)
    strangers[tls.fileno()] = _Stranger(tls, own, secret)


def greet_target(
    tls: TlsSocket,
    own: Tls,
    secret: Callable[[bytes, bytes], Secret],
    features: int,
    channel_fd: int,
    serve: Callable[[], None],
) -> None:
    """Prove to the target who this is, and have it prove the same.

    :raises MigrationRefused: it says no, or is not who it should be. :raises HostUnavailable: it does not answer.
    """
    until = time.monotonic() + DEADLINE
    try:
        _until(tls.handshake, tls, until, channel_fd, serve)
        talk = _Talk(tls)
        kinds = frozenset({Kind.CHALLENGE})
        nonce = wire.parse_challenge(_until(lambda: talk.hear(kinds), tls, until, channel_fd, serve)[1])
        known, answer = secret(tls.peer_certificate, own.certificate), os.urandom(wire.NONCE_BYTES)
        talk.say(wire.hello(known, nonce, answer, features))
        kinds = frozenset({Kind.WELCOME, Kind.REFUSED})
        head, body = _until(lambda: talk.hear(kinds), tls, until, channel_fd, serve)
        if head.kind is Kind.REFUSED:
            text = body.decode("ascii", "replace")
            raise MigrationRefused(f"the target refuses: {text if text.isprintable() else 'with a text of no use'}")
        wire.check_welcome(body, known, nonce, answer)
    except Untrusted as exc:
        raise MigrationRefused(f"the target is not trusted: {exc}: give it a certificate of the same CA") from exc
    except BadRecord as exc:
        raise MigrationRefused(f"the target is not the one expected: {exc}") from exc
    except PeerClosed as exc:
        raise MigrationRefused(
            f"the target ended the connection ({exc}): is this host's certificate one that it trusts, and is the "
            "migration still expected there?"
        ) from exc


def _until(
    step: Callable[[], _T | None], tls: TlsSocket, until: float, channel_fd: int, serve: Callable[[], None]
) -> _T:
    """What `step` gives once it is not nothing."""
    while True:
        result = step()
        if result:
            return result
        left = until - time.monotonic()
        if left <= 0:
            raise HostUnavailable(f"the target did not answer within {DEADLINE:g} s: try again")
        poll = select.poll()
        poll.register(tls.fileno(), select.POLLIN | (0 if tls.idle else select.POLLOUT))
        poll.register(channel_fd, select.POLLIN)
        if channel_fd in dict(poll.poll(left * 1000)):
            serve()
        tls.flush()
