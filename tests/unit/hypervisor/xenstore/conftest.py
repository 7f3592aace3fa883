"""A server with clients that talk to it by packets, no transport between."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from descriptors import as_the_kernel_does

from hypervisor.xenstore.connection import Connection
from hypervisor.xenstore.quota import Limits
from hypervisor.xenstore.records import Journal
from hypervisor.xenstore.server import Server
from hypervisor.xenstore.wire import Op, Packet, Parser


@pytest.fixture(autouse=True)
def closed_descriptors(request: pytest.FixtureRequest) -> Iterator[None]:
    yield from as_the_kernel_does(request)


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Client:
    """One connection of `domid`, 0 for a tool. It reads its output at once, unless `reading` is off."""

    def __init__(self, server: Server, domid: int) -> None:
        self.server = server
        self.reading = True
        self.resumed = 0
        self.replies: list[Packet] = []
        self.events: list[tuple[str, str]] = []
        self._parser = Parser()
        self._number = 0
        self.conn: Connection = server.connect(self) if domid == 0 else server.introduce(domid, self)
        self.output_ready()

    def output_ready(self) -> None:
        if not self.reading or not hasattr(self, "conn"):
            return
        while size := self.conn.pending:
            self._parser.feed(self.conn.peek_output(size))
            self.conn.consume_output(size)
        while (packet := self._parser.next()) is not None:
            if packet.type == Op.WATCH_EVENT:
                assert packet.req_id == 0 and packet.tx_id == 0
                path, token, rest = packet.payload.split(b"\0")
                assert rest == b""
                self.events.append((path.decode(), token.decode("latin-1")))
            else:
                self.replies.append(packet)

    def resume(self) -> None:
        self.resumed += 1

    def positions(self) -> tuple[int, int]:
        return 0, 0

    def send(self, op: int, payload: bytes, tx: int = 0) -> None:
        self._number += 1
        self.server.process(self.conn, Packet(op, self._number, tx, payload))

    def ask(self, op: int, payload: bytes = b"\0", tx: int = 0) -> bytes:
        """The reply's payload, or the errno name."""
        self.send(op, payload, tx)
        reply = self.replies.pop()
        assert reply.req_id == self._number and reply.tx_id == tx
        assert not self.replies
        if reply.type == Op.ERROR:
            return reply.payload[:-1]
        assert reply.type == op
        return reply.payload

    def start(self) -> int:
        return int(self.ask(Op.TRANSACTION_START)[:-1])

    def take_events(self) -> list[tuple[str, str]]:
        events, self.events = self.events, []
        return events


class World:
    def __init__(self, limits: Limits | None = None, journal: Journal | None = None) -> None:
        self.clock = Clock()
        self.server = Server(limits, clock=self.clock, journal=journal)
        self.dom0 = Client(self.server, 0)
        self.clients = {0: self.dom0}

    def domain(self, domid: int) -> Client:
        """A domain with a home of its own, introduced."""
        if domid not in self.clients:
            home = b"/local/domain/%d" % domid
            assert self.dom0.ask(Op.WRITE, home + b"\0") == b"OK\0"
            assert self.dom0.ask(Op.SET_PERMS, home + b"\0n%d\0" % domid) == b"OK\0"
            self.clients[domid] = Client(self.server, domid)
        return self.clients[domid]

    def restart(self, server: Server) -> None:
        """Another server takes over; the domains' clients stay."""
        self.server = server
        self.dom0 = self.clients[0] = Client(server, 0)
        for domid, client in self.clients.items():
            if domid:
                client.server = server
                client.conn = server.introduce(domid, client)


@pytest.fixture
def world() -> World:
    return World()


@pytest.fixture
def make_world() -> type[World]:
    return World


@pytest.fixture
def make_client() -> type[Client]:
    return Client
