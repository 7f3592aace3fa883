"""A peer link: the socket between two domain processes, with the patience of one that may not wait for ever.

The channel thread reads; requests wait in an inbox that the run loop's thread empties, also while it waits itself for
the neighbour's answer: so two domains that ask each other at once both get theirs.
"""

from __future__ import annotations

import collections
import logging
import select
import socket
import threading
import time
from collections.abc import Callable
from typing import Protocol, TypeVar

from hypervisor.host import peer_wire as wire
from hypervisor.host.poller import Poller

LOG = logging.getLogger(__name__)

PATIENCE = 1.0
"""Seconds that a hypercall waits for a neighbour. Who takes longer has ended, as far as this domain goes."""
MAX_INBOX = 64
"""Messages of one neighbour that lie unread in this process; the rest waits in the socket."""
_SEND_TURN_MS = 20

T = TypeVar("T")


class PeerGone(Exception):
    """The neighbour has ended, does not answer or talks nonsense; the link is over."""


class Server(Protocol):
    """What executes a neighbour's requests."""

    def execute(self, kind: int, body: bytes) -> tuple[int, bytes] | None:
        """Status and body of the answer, None for what is one-way. :raises wire.BadForm."""


class Desk:
    """Where the run loop's thread waits and serves: the inbox of all peer links of a domain.

    :param post: `Machine.post`.
    """

    def __init__(self, post: Callable[[Callable[[], None]], None]) -> None:
        self._post = post
        self._inbox: collections.deque[Callable[[], None]] = collections.deque()
        self._changed = threading.Condition()

    def put(self, item: Callable[[], None]) -> None:
        """From any thread."""
        with self._changed:
            self._inbox.append(item)
            self._changed.notify()
        self._post(self.serve)

    def wake(self) -> None:
        """Something that a `wait` looks at has changed."""
        with self._changed:
            self._changed.notify()

    def serve(self) -> None:
        """In the run loop's thread: all that waits."""
        while self._inbox:
            self._inbox.popleft()()

    def wait(self, ready: Callable[[], T | None], seconds: float) -> T | None:
        """Serve until `ready` gives something, or the time is over."""
        deadline = time.monotonic() + seconds
        while True:
            self.serve()
            with self._changed:
                result = ready()
                left = deadline - time.monotonic()
                if result is not None or left <= 0:
                    return result
                if not self._inbox:
                    self._changed.wait(left)


class PeerLink:
    """:param server: serves the neighbour. :param gone: called once in the run loop's thread when the link is over."""

    def __init__(self, domid: int, sock: int, poller: Poller, desk: Desk, gone: Callable[[], None]) -> None:
        self.domid = domid
        self.server: Server
        self.open = True
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET, 0, fileno=sock)
        self._socket.setblocking(False)
        self._fd = self._socket.fileno()
        self._poller = poller
        self._desk = desk
        self._gone = gone
        self._number = 0
        self._waiting = 0  # number of the request whose answer is awaited
        self._answer: tuple[int, int, bytes] | None = None
        self._counting = threading.Lock()
        self._unserved = 0
        self._sends: set[bytes] = set()
        self._deaf = False

    def start(self) -> None:
        """In the channel thread."""
        self._poller.add(self._fd, self._readable)

    # -- the channel thread

    def _readable(self) -> None:
        try:
            data = self._socket.recv(wire.MAX_MESSAGE + 1)
            if not data:
                raise wire.BadForm("its process is gone")
            kind, status, number, body = wire.parse(data)
            if kind & wire.ANSWERS:
                self._take_answer(kind, status, number, body)
            else:
                self._take_request(kind, number, body)
        except BlockingIOError:
            return
        except (OSError, wire.BadForm) as exc:
            self.end(str(exc))

    def _take_answer(self, kind: int, status: int, number: int, body: bytes) -> None:
        if number != self._waiting or self._answer is not None:
            raise wire.BadForm(f"an answer {kind:#x} to nothing")
        self._answer = (kind, status, body)
        self._desk.wake()

    def _take_request(self, kind: int, number: int, body: bytes) -> None:
        with self._counting:
            if kind == wire.SEND:
                if body in self._sends:
                    return  # one that was not served yet says the same
                self._sends.add(body)
            self._unserved += 1
            if self._unserved >= MAX_INBOX and not self._deaf:
                self._deaf = True
                self._poller.remove(self._fd)
        self._desk.put(lambda: self._execute(kind, number, body))

    def _listen_again(self) -> None:
        with self._counting:
            if self._deaf and self.open:
                self._deaf = False
                self._poller.add(self._fd, self._readable)

    def _close(self) -> None:
        self._poller.remove(self._fd)
        self._socket.close()

    # -- any thread

    def end(self, why: str) -> None:
        if self.open:
            self.open = False
            LOG.info("the link to domain %d ends: %s", self.domid, why)
            self._poller.call(self._close)
            self._desk.put(self._gone)
            self._desk.wake()

    # -- the run loop's thread

    def _execute(self, kind: int, number: int, body: bytes) -> None:
        with self._counting:
            self._unserved -= 1
            if kind == wire.SEND:
                self._sends.discard(body)
            listen = self._deaf and self._unserved <= MAX_INBOX // 2
        if listen:
            self._poller.call(self._listen_again)
        if not self.open:
            return
        try:
            answer = self.server.execute(kind, body)
        except wire.BadForm as exc:
            self.end(str(exc))
            return
        if answer is not None and kind < wire.UNPIN:
            self._send(wire.HEAD.pack(kind | wire.ANSWERS, answer[0], number) + answer[1])

    def tell(self, kind: int, body: bytes) -> None:
        """One-way; lost when the neighbour is gone."""
        if self.open:
            self._send(wire.HEAD.pack(kind, 0, 0) + body)

    def ask(self, kind: int, body: bytes) -> tuple[int, bytes]:
        """Status and body of the answer. :raises PeerGone."""
        if not self.open:
            raise PeerGone(f"domain {self.domid} has ended")
        self._number = self._number % 0xFFFF_FFFF + 1
        self._answer, self._waiting = None, self._number
        self._send(wire.HEAD.pack(kind, 0, self._number) + body)
        self._desk.wait(lambda: True if self._answer is not None or not self.open else None, PATIENCE)
        answer, self._answer, self._waiting = self._answer, None, 0
        if answer is None or answer[0] != kind | wire.ANSWERS:
            self.end(f"it did not answer request {kind} within {PATIENCE:g} s")
            raise PeerGone(f"domain {self.domid} does not answer")
        return answer[1], answer[2]

    def _send(self, data: bytes) -> None:
        deadline = time.monotonic() + PATIENCE
        while self.open:
            try:
                self._socket.send(data)
                return
            except BlockingIOError:
                if time.monotonic() > deadline:
                    self.end("it does not read")
                    return
                # It may wait for us to read what it sends.
                self._desk.serve()
                poll = select.poll()
                poll.register(self._fd, select.POLLOUT)
                poll.poll(_SEND_TURN_MS)
            except OSError as exc:
                self.end(str(exc))
                return
