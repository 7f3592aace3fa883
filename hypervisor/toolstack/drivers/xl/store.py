"""A client of xenstored over its UNIX socket: reads, writes, and watches that survive a restart of xenstored.

The wire code is the server's own (`hypervisor.xenstore.wire`). What comes back is bounded by it: 4096 bytes a packet.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import socket
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

from hypervisor.errors import HostFailure, HostUnavailable, OperationTimeout, ToolstackError
from hypervisor.xenstore.errors import ProtocolViolation
from hypervisor.xenstore.wire import Op, Packet, Parser

LOG = logging.getLogger(__name__)

DEFAULT_SOCKET = Path("/run/xenstored/socket")
ANSWER = 10.0
"""Seconds xenstored has for an answer."""
AGAIN = 0.5
"""Seconds between attempts to connect anew while there are watches."""
MAX_NODES = 100_000
CLOSING, CLOSED = "5", "6"
"""Of XenbusState (public/io/xenbus.h)."""

Listener = Callable[[str], None]
_T = TypeVar("_T")


class _Link:
    """One connection: requests one at a time, answers and events taken in by a thread of its own."""

    def __init__(self, path: Path, events: queue.SimpleQueue[Packet | None]) -> None:
        self._events = events
        self._answers: queue.SimpleQueue[Packet | None] = queue.SimpleQueue()
        self._request = 0
        self.alive = True
        self._socket = socket.socket(socket.AF_UNIX)
        try:
            self._socket.settimeout(ANSWER)
            self._socket.connect(str(path))
        except OSError as exc:
            self._socket.close()
            reason = exc.strerror or str(exc)
            raise HostUnavailable(
                f"xenstored's socket {path}: {reason}: is this a dom0, does xenstored run, and may this user connect?"
            ) from exc
        self._socket.settimeout(None)
        self._thread = threading.Thread(target=self._take_in, name="xenstore-reader", daemon=True)
        self._thread.start()

    def call(self, op: Op, payload: bytes, transaction: int = 0) -> Packet:
        """:raises HostUnavailable, OperationTimeout: the connection is of no use any more then."""
        self._request = self._request % 0xFFFF_FFFF + 1
        try:
            self._socket.sendall(Packet(op, self._request, transaction, payload).encode())
            answer = self._answers.get(timeout=ANSWER)
        except (OSError, queue.Empty) as exc:
            self.close()
            if isinstance(exc, queue.Empty):
                raise OperationTimeout(f"xenstored gave no answer within {ANSWER:g} s: look at the host") from None
            raise HostUnavailable(f"xenstored ended the connection: {exc.strerror}: try again") from exc
        if answer is None or answer.req_id != self._request:
            self.close()
            raise HostUnavailable("xenstored ended the connection, or answered what was not asked: try again")
        return answer

    def close(self) -> None:
        self.alive = False
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        if threading.current_thread() is not self._thread:
            self._thread.join()
        self._socket.close()

    def _take_in(self) -> None:
        parser = Parser()
        try:
            while data := self._socket.recv(65536):
                parser.feed(data)
                while packet := parser.next():
                    (self._events if packet.type == Op.WATCH_EVENT else self._answers).put(packet)
        except (OSError, ProtocolViolation) as exc:
            LOG.debug("xenstore connection: %s", exc)
        self.alive = False
        self._answers.put(None)
        self._events.put(None)


class XenstoreClient:
    """:param path: xenstored's socket. Connects with the first request; safe to use from several threads.

    What only looks is asked again once after xenstored was restarted. Watches are set anew by themselves, and each
    fires then, as it does when it is set first: look at the world in the listener, do not count its calls.
    """

    def __init__(self, path: Path = DEFAULT_SOCKET) -> None:
        self._path = path
        self._lock = threading.RLock()
        self._link: _Link | None = None
        self._events: queue.SimpleQueue[Packet | None] = queue.SimpleQueue()
        self._watches: dict[str, tuple[str, Listener]] = {}  # of each token
        self._tokens = 0
        self._teller: threading.Thread | None = None
        self._closed = threading.Event()

    def read(self, path: str) -> str | None:
        """A node's value; None: there is no such node. :raises HostUnavailable: it cannot be known."""
        answer = self._look(Op.READ, _string(path))
        return None if _errno(answer) == "ENOENT" else _judge(answer, path).decode(errors="replace")

    def names(self, path: str) -> list[str]:
        """The names of a node's children, none if it does not exist."""
        answer = self._look(Op.DIRECTORY, _string(path))
        match _errno(answer):
            case "ENOENT":
                found = b""
            case "E2BIG":
                found = self._long_directory(path)
            case _:
                found = _judge(answer, path)
        return [name.decode(errors="replace") for name in found.split(b"\0") if name]

    def write(self, path: str, value: str) -> None:
        _judge(self._act(Op.WRITE, _string(path) + value.encode()), path)

    def remove(self, path: str) -> None:
        """Remove a node and all below; quiet when there is none."""
        answer = self._act(Op.RM, _string(path))
        if _errno(answer) != "ENOENT":
            _judge(answer, path)

    def claim(self, path: str, value: str) -> str:
        """The node's value; if there is no node, it is made with `value` first. One of several callers wins."""

        def act(link: _Link, number: int) -> str:
            answer = link.call(Op.READ, _string(path), number)
            if _errno(answer) != "ENOENT":
                return _judge(answer, path).decode(errors="replace")
            _judge(link.call(Op.WRITE, _string(path) + value.encode(), number), path)
            return value

        return self._transaction(path, act)

    def close_device(self, path: str) -> None:
        """Ask the two ends of a device to let go of it, as libxl does, unless the back end is closed or gone.

        :param path: of the back end.
        """

        def act(link: _Link, number: int) -> None:
            answer = link.call(Op.READ, _string(f"{path}/state"), number)
            if _errno(answer) == "ENOENT" or _judge(answer, path) == CLOSED.encode():
                return
            for name, value in (("online", "0"), ("state", CLOSING)):
                _judge(link.call(Op.WRITE, _string(f"{path}/{name}") + value.encode(), number), path)

        self._transaction(path, act)

    def swap(self, path: str, old: str, new: str) -> bool:
        """Write `new` where the value is `old` still; False: it is another, or there is no node."""

        def act(link: _Link, number: int) -> bool:
            answer = link.call(Op.READ, _string(path), number)
            if _errno(answer) == "ENOENT" or _judge(answer, path) != old.encode():
                return False
            _judge(link.call(Op.WRITE, _string(path) + new.encode(), number), path)
            return True

        return self._transaction(path, act)

    def set_perms(self, path: str, perms: Iterable[str]) -> None:
        """:param perms: the owner first, for example ``("n0",)``: nobody but dom0."""
        _judge(self._act(Op.SET_PERMS, _string(path) + b"".join(_string(perm) for perm in perms)), path)

    def watch(self, path: str, listener: Listener) -> Callable[[], None]:
        """Call `listener` with the path that changed, in a thread of this client; returns the function that ends it."""
        with self._lock:
            self._tokens += 1
            token = f"reeve-{self._tokens}"
            _judge(self._act(Op.WATCH, _string(path) + _string(token)), path)
            self._watches[token] = (path, listener)  # its first event waits for our lock
            if self._teller is None:
                self._teller = threading.Thread(target=self._tell, name="xenstore-watches", daemon=True)
                self._teller.start()

        def stop() -> None:
            with self._lock:
                if self._watches.pop(token, None) is not None and self._link is not None and self._link.alive:
                    with contextlib.suppress(ToolstackError):
                        self._link.call(Op.UNWATCH, _string(path) + _string(token))

        return stop

    def close(self) -> None:
        with self._lock:
            self._closed.set()
            self._watches.clear()
            if self._link is not None:
                self._link.close()
                self._link = None
        self._events.put(None)
        if self._teller is not None and threading.current_thread() is not self._teller:
            self._teller.join()

    # inside

    def _connected(self) -> _Link:
        """Call with the lock held."""
        if self._closed.is_set():
            raise HostUnavailable("this connection to xenstored was closed: make a new one")
        if self._link is None or not self._link.alive:
            if self._link is not None:
                self._link.close()
            self._link = _Link(self._path, self._events)
            try:
                for token, (path, _) in list(self._watches.items()):
                    _judge(self._link.call(Op.WATCH, _string(path) + _string(token)), path)
            except ToolstackError:
                self._link.close()  # all of them or none
                raise
        return self._link

    def _transaction(self, path: str, act: Callable[[_Link, int], _T]) -> _T:
        """What `act` does with a connection and a transaction's number, all of it or nothing; anew while it clashes."""
        for _ in range(10):
            with self._lock:
                link = self._connected()
                number = int(_judge(link.call(Op.TRANSACTION_START, b"\0"), path).rstrip(b"\0"))
                try:
                    found = act(link, number)
                except HostFailure:
                    link.call(Op.TRANSACTION_END, b"F\0", number)
                    raise
                ended = link.call(Op.TRANSACTION_END, b"T\0", number)
            if _errno(ended) != "EAGAIN":
                _judge(ended, path)
                return found
        raise HostUnavailable(f"xenstore node {path} changes too fast: try again")

    def _look(self, op: Op, payload: bytes) -> Packet:
        with self._lock:
            try:
                return self._connected().call(op, payload)
            except HostUnavailable:
                return self._connected().call(op, payload)

    def _act(self, op: Op, payload: bytes) -> Packet:
        with self._lock:
            return self._connected().call(op, payload)

    def _long_directory(self, path: str) -> bytes:
        """Of more names than fit into one packet; anew when it changes meanwhile (docs/misc/xenstore.txt)."""
        for _ in range(10):
            found, generation = b"", None
            while len(found) <= MAX_NODES * 64:
                answer = self._look(Op.DIRECTORY_PART, _string(path) + _string(str(len(found))))
                if _errno(answer) == "ENOENT":
                    return b""
                now, _, part = _judge(answer, path).partition(b"\0")
                if generation not in (None, now):
                    break
                generation = now
                if part.endswith(b"\0\0") or part in (b"", b"\0"):
                    return found + part
                found += part
        raise HostUnavailable(f"xenstore node {path} changes too fast, or is too large, to be listed: try again")

    def _tell(self) -> None:
        while not self._closed.is_set():
            packet = self._events.get()
            if packet is None:
                self._come_back()
                continue
            path, _, rest = packet.payload.partition(b"\0")
            with self._lock:
                known = self._watches.get(rest.rstrip(b"\0").decode(errors="replace"))
            if known is None:
                continue
            try:
                known[1](path.decode(errors="replace"))
            except Exception:
                LOG.exception("a listener failed on a change of %r", path)

    def _come_back(self) -> None:
        """The connection ended: set the watches anew as soon as xenstored is there again."""
        while not self._closed.is_set():
            with self._lock:
                if not self._watches:
                    return
                try:
                    self._connected()
                    return
                except ToolstackError as exc:
                    LOG.debug("xenstored is not back yet: %s", exc)
            self._closed.wait(AGAIN)


def _errno(answer: Packet) -> str | None:
    """The name of xenstored's error, for example ``EACCES``; None: it is none."""
    if answer.type != Op.ERROR:
        return None
    name = answer.payload.rstrip(b"\0").decode(errors="replace")
    return name if name.isalnum() else "an unknown error"


def _judge(answer: Packet, path: str) -> bytes:
    """:raises HostFailure: xenstored refused."""
    errno = _errno(answer)
    if errno is not None:
        raise HostFailure(f"xenstored refuses {path}: {errno}")
    return answer.payload


def _string(text: str) -> bytes:
    if "\0" in text:
        raise HostFailure(f"xenstore path {text!r} holds a NUL byte")
    return text.encode() + b"\0"
