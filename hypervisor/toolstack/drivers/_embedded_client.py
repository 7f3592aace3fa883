"""The client's side of the control socket: requests from any thread, events, reconnection."""

from __future__ import annotations

import contextlib
import itertools
import logging
import queue
import select
import socket
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from hypervisor.errors import HostUnavailable, ProtocolError, from_json
from hypervisor.host import channel as channels
from hypervisor.host import protocol
from hypervisor.toolstack.api import DomainEvent

LOG = logging.getLogger(__name__)

CONNECT_TIMEOUT = 5.0
MARGIN = 10.0
"""Seconds beyond a verb's own time in which an answer must come."""

RETRY_EVENTS = 0.5
"""Seconds between attempts to hear events again after the host process went away."""

Listener = Callable[[DomainEvent], None]


class Lines:
    """A connected socket, read by lines. The greeting has been exchanged.

    :raises HostUnavailable: nobody answers there, or it speaks another protocol.
    """

    def __init__(self, path: Path) -> None:
        self._buffer = bytearray()
        try:
            self.sock = channels.connect(path, socket.SOCK_STREAM, CONNECT_TIMEOUT)
        except OSError as exc:
            raise protocol.unavailable(path, exc.strerror or exc) from exc
        try:
            self._greet()
        except (OSError, EOFError, ProtocolError) as exc:
            self.sock.close()
            raise protocol.unavailable(path, exc) from exc
        self.sock.settimeout(None)

    def send(self, message: dict[str, Any]) -> None:
        self.sock.sendall(protocol.encode(message))

    def receive(self) -> dict[str, Any]:
        """:raises EOFError: the other end closed. :raises ProtocolError: no line of ours."""
        while (end := self._buffer.find(b"\n")) < 0:
            if len(self._buffer) > protocol.ANSWER_MAX:
                raise ProtocolError(f"a line is longer than {protocol.ANSWER_MAX} bytes")
            data = self.sock.recv(1 << 16)
            if not data:
                raise EOFError("it closed the connection")
            self._buffer += data
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        return protocol.decode(line)

    def rest(self) -> bytes:
        """What was read beyond the last line."""
        data = bytes(self._buffer)
        self._buffer.clear()
        return data

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)
        self.sock.close()

    def _greet(self) -> None:
        hello = self.receive().get("hello")
        if not isinstance(hello, dict):
            raise ProtocolError("it does not greet as a host process does")
        protocol.check_version(hello.get("protocol"))
        self.send({"id": 0, "verb": "hello", "args": {"protocol": list(protocol.VERSION)}})
        answer = self.receive()
        if "error" in answer:
            raise ProtocolError(from_json(answer["error"]).message)


class Client:
    """One connection with one reader thread, made when needed and made again when it broke."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._send_lock = threading.Lock()
        self._lines: Lines | None = None
        self._numbers = itertools.count(1)
        self._waiting: dict[int, Future[Any]] = {}
        self._listeners: dict[int, Listener] = {}
        self._events: queue.SimpleQueue[DomainEvent | None] = queue.SimpleQueue()
        self._teller: threading.Thread | None = None
        self._closed = threading.Event()

    def call(self, verb: str, args: dict[str, Any], timeout: float) -> Any:
        """:raises HostUnavailable: no answer; whether the verb took effect is unknown then.
        :raises ToolstackError: the host's answer.
        """
        lines = self._connected()
        number = next(self._numbers)
        future: Future[Any] = Future()
        with self._lock:
            if self._lines is not lines:
                raise protocol.unavailable(self.path, "it closed the connection")
            self._waiting[number] = future
        try:
            with self._send_lock:
                lines.send({"id": number, "verb": verb, "args": args})
            return future.result(timeout + MARGIN)
        except TimeoutError:
            raise protocol.unavailable(self.path, f"no answer to {verb} within {timeout + MARGIN:g} s") from None
        except OSError as exc:
            self._broken(lines, exc)
            raise protocol.unavailable(self.path, exc.strerror or exc) from exc
        finally:
            with self._lock:
                self._waiting.pop(number, None)

    def subscribe(self, listener: Listener) -> Callable[[], None]:
        """Events are told in one thread, in order. Those that happen while the host process is away are lost."""
        number = next(self._numbers)
        with self._lock:
            self._listeners[number] = listener
            if self._teller is None:
                self._teller = threading.Thread(target=self._tell, name="reeve-events", daemon=True)
                self._teller.start()
        try:
            self.call("events.subscribe", {}, CONNECT_TIMEOUT)
        except BaseException:
            with self._lock:
                self._listeners.pop(number, None)
            raise

        def unsubscribe() -> None:
            with self._lock:
                self._listeners.pop(number, None)

        return unsubscribe

    def close(self) -> None:
        self._closed.set()
        with self._lock:
            lines, self._lines = self._lines, None
            self._listeners.clear()
            if self._teller is not None:
                self._events.put(None)
        if lines is not None:
            lines.close()

    def _connected(self) -> Lines:
        if self._closed.is_set():
            raise protocol.unavailable(self.path, "this connection was closed")
        with self._lock:
            if self._lines is None:
                lines = self._lines = Lines(self.path)
                threading.Thread(target=self._read, args=(lines,), name="reeve-host", daemon=True).start()
            return self._lines

    def _read(self, lines: Lines) -> None:
        try:
            while True:
                self._received(lines.receive())
        except (OSError, EOFError, ProtocolError, ValueError, KeyError, TypeError) as exc:
            self._broken(lines, exc)
        if self._listens():
            self._listen_again()

    def _received(self, message: dict[str, Any]) -> None:
        if "event" in message:
            self._events.put(DomainEvent(**message["event"]))
            return
        with self._lock:
            future = self._waiting.pop(message["id"], None)
        if message["id"] == 0 and "error" in message:
            raise ProtocolError(from_json(message["error"]).message)
        if future is None:
            return
        if "error" in message:
            future.set_exception(from_json(message["error"]))
        else:
            future.set_result(message["result"])

    def _broken(self, lines: Lines, why: Exception) -> None:
        with self._lock:
            if self._lines is lines:
                self._lines = None
            waiting = list(self._waiting.values())
            self._waiting.clear()
        lines.close()
        for future in waiting:
            if not future.done():
                future.set_exception(protocol.unavailable(self.path, why))

    def _listens(self) -> bool:
        with self._lock:
            return bool(self._listeners) and not self._closed.is_set()

    def _listen_again(self) -> None:
        """Runs in the thread of the connection that broke, until another one brings events."""
        while self._listens():
            try:
                self.call("events.subscribe", {}, CONNECT_TIMEOUT)
                return
            except HostUnavailable as exc:
                LOG.debug("no events yet: %s", exc)
                self._closed.wait(RETRY_EVENTS)

    def _tell(self) -> None:
        while (event := self._events.get()) is not None:
            with self._lock:
                listeners = list(self._listeners.values())
            for listener in listeners:
                try:
                    listener(event)
                except Exception:
                    LOG.exception("a listener failed on %s of %s", event.kind, event.uuid)


class SocketConsole:
    """An attached console: after the greeting the socket carries bytes."""

    def __init__(self, path: Path, uuid: str) -> None:
        self._uuid = uuid
        lines = Lines(path)
        try:
            lines.sock.settimeout(CONNECT_TIMEOUT)
            lines.send({"id": 1, "verb": "console.attach", "args": {"uuid": uuid}})
            # Byte by byte up to the end of the answer: what follows stays in the socket, so that fileno() polls.
            answer = bytearray(lines.rest())
            while not answer.endswith(b"\n"):
                byte = lines.sock.recv(1)
                if not byte:
                    raise EOFError("it closed the connection")
                answer += byte
            message = protocol.decode(bytes(answer))
            if "error" in message:
                raise from_json(message["error"])
            lines.sock.settimeout(None)
        except (OSError, EOFError, ProtocolError) as exc:
            lines.close()
            raise protocol.unavailable(path, exc) from exc
        except BaseException:
            lines.close()
            raise
        self._lines = lines

    def read(self, size: int = 65536, timeout: float | None = None) -> bytes:
        poll = select.poll()
        poll.register(self._lines.sock.fileno(), select.POLLIN)
        if not poll.poll(None if timeout is None else max(0, timeout) * 1000):
            return b""
        try:
            data = self._lines.sock.recv(size)
        except OSError as exc:
            raise EOFError(f"the console of domain {self._uuid} is closed: {exc}") from exc
        if not data:
            raise EOFError(f"domain {self._uuid} is gone, or its host process is")
        return data

    def write(self, data: bytes) -> None:
        try:
            self._lines.sock.sendall(data)
        except OSError as exc:
            LOG.debug("console of %s: %s", self._uuid, exc)  # the reader learns of it by EOFError

    def fileno(self) -> int:
        return self._lines.sock.fileno()

    def close(self) -> None:
        self._lines.close()
