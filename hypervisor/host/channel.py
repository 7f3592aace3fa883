"""Messages between host, zygote and domain processes.

One message is one datagram of a UNIX ``SOCK_SEQPACKET`` socket: a JSON object of at
most `MAX_MESSAGE` bytes and at most `MAX_FDS` descriptors. The kernel keeps the message
boundaries and tells of a peer's death (end of file).

Paths of any length work: ``sun_path`` holds 107 bytes, so sockets are bound and
connected by way of ``/proc/self/fd/<directory>/<name>``.
"""

from __future__ import annotations

import array
import json
import os
import socket
import struct
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from hypervisor.socket_path import short_path

MAX_MESSAGE = 128 * 1024
MAX_FDS = 16
DOMAIN_SOCKET = "sock"
"""In a domain's folder: where its process is found again by a host process that starts."""

Message = dict[str, Any]


class ChannelClosed(Exception):
    """The other end is gone."""


class BadMessage(Exception):
    """What arrived is no message of ours."""


class Channel:
    """One end. Not locked: `send` may be called by one thread while another sits in `receive`."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock

    def fileno(self) -> int:
        return self._sock.fileno()

    def setblocking(self, flag: bool) -> None:
        self._sock.setblocking(flag)

    def send(self, message: Message, fds: Sequence[int] = ()) -> None:
        """:raises ChannelClosed: nobody is there. :raises BlockingIOError: non-blocking and the buffer is full."""
        data = encode(message)
        try:
            if fds:
                socket.send_fds(self._sock, [data], list(fds))
            else:
                self._sock.send(data)
        except BlockingIOError:
            raise
        except OSError as exc:
            raise ChannelClosed(str(exc)) from exc

    def receive(self) -> tuple[Message, list[int]]:
        """One message and its descriptors.

        :raises ChannelClosed: end of file.
        :raises BadMessage: not JSON, too long or too deep; its descriptors are closed.
        """
        try:
            data, fds, flags = receive_fds(self._sock)
        except BlockingIOError:
            raise
        except OSError as exc:
            raise ChannelClosed(str(exc)) from exc
        if not data:
            raise ChannelClosed("end of file")
        try:
            if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
                raise BadMessage(f"message longer than {MAX_MESSAGE} bytes or with more than {MAX_FDS} descriptors")
            return decode(data), fds
        except BadMessage:
            close_all(fds)
            raise

    def is_closed(self) -> bool:
        """The other end is gone and has left nothing to read."""
        try:
            return not self._sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        except OSError:
            return True

    def close(self) -> None:
        self._sock.close()


def receive_fds(sock: socket.socket) -> tuple[bytes, list[int], int]:
    """Bytes, descriptors and flags of one message.

    ``socket.recv_fds`` takes flags and, in Python 3.11, drops them; to set close-on-exec later is an ioctl, which
    the sandbox refuses.
    """
    size = array.array("i").itemsize
    data, ancillary, flags, _ = sock.recvmsg(MAX_MESSAGE, socket.CMSG_LEN(MAX_FDS * size), socket.MSG_CMSG_CLOEXEC)
    fds = array.array("i")
    for level, kind, content in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(content[: len(content) - len(content) % size])
    return data, list(fds), flags


def pair() -> tuple[Channel, Channel]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    return Channel(ours), Channel(theirs)


def from_fd(fd: int) -> Channel:
    return Channel(socket.socket(fileno=fd))


def encode(message: Message) -> bytes:
    data = json.dumps(message, separators=(",", ":")).encode()
    if len(data) > MAX_MESSAGE:
        raise BadMessage(f"message of {len(data)} bytes: at most {MAX_MESSAGE} fit")
    return data


def decode(data: bytes) -> Message:
    try:
        message = json.loads(data)
    except (ValueError, RecursionError) as exc:
        raise BadMessage(f"not a JSON message: {exc}") from exc
    if not isinstance(message, dict):
        raise BadMessage("a message is a JSON object")
    return message


def close_all(fds: Sequence[int]) -> None:
    for fd in fds:
        with suppress(OSError):
            os.close(fd)


def listen(path: Path, kind: int, *, backlog: int = 16) -> socket.socket:
    """A listening UNIX socket at `path` with mode 0600; a stale one is replaced."""
    path.unlink(missing_ok=True)
    sock = socket.socket(socket.AF_UNIX, kind)
    try:
        with short_path(path) as address:
            # The socket is created with its final mode: there is no moment in which others may connect.
            before = os.umask(0o177)
            try:
                sock.bind(address)
            finally:
                os.umask(before)
        sock.listen(backlog)
    except BaseException:
        sock.close()
        raise
    return sock


def connect(path: Path, kind: int, timeout: float | None = None) -> socket.socket:
    """:raises OSError: nobody listens there."""
    sock = socket.socket(socket.AF_UNIX, kind)
    try:
        sock.settimeout(timeout)
        with short_path(path) as address:
            sock.connect(address)
    except BaseException:
        sock.close()
        raise
    return sock


def peer(sock: socket.socket) -> tuple[int, int, int]:
    """Process id, user id and group id of the other end (SO_PEERCRED)."""
    pid, uid, gid = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return pid, uid, gid


def allowed(uid: int, own: Callable[[], int] = os.geteuid) -> bool:
    """Only the same user and root may speak with the host process."""
    return uid in (0, own())
