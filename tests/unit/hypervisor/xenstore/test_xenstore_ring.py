"""The shared page: a guest's end played by the test, well-behaved and hostile."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hypervisor.xenstore.errors import AlreadyExists
from hypervisor.xenstore.ring import FEATURES, REQUESTS_PER_TURN, XenstoreRing
from hypervisor.xenstore.wire import HEADER, Op, Packet, Parser

REQ_CONS, REQ_PROD, RSP_CONS, RSP_PROD, SERVER_FEATURES, CONNECTION, ERROR = range(512, 519)


class Guest:
    """A guest's xenbus driver on a page."""

    def __init__(self, page: bytearray | None = None, start: int = 0) -> None:
        self.page = page if page is not None else bytearray(4096)
        self.index = memoryview(self.page).cast("I")
        for at in (REQ_CONS, REQ_PROD, RSP_CONS, RSP_PROD):
            self.index[at] = start
        self.parser = Parser()
        self.notified = 0
        self.calls: list[tuple[float, Callable[[], None]]] = []
        self.ring: XenstoreRing | None = None

    def connect(self, server, domid: int = 5) -> XenstoreRing:
        self.ring = XenstoreRing(server, domid, memoryview(self.page), self.notify, self.call_later)
        return self.ring

    def notify(self) -> None:
        self.notified += 1

    def call_later(self, seconds: float, function: Callable[[], None]) -> None:
        self.calls.append((seconds, function))

    def run_calls(self) -> None:
        """Let everything that is due happen."""
        for _ in range(1000):
            due, self.calls = self.calls, []
            if not due:
                return
            for _seconds, function in due:
                function()
        pytest.fail("the ring never rests")

    def put(self, data: bytes) -> int:
        """Write into the ring without telling. :returns: how much fitted."""
        used = (self.index[REQ_PROD] - self.index[REQ_CONS]) & 0xFFFF_FFFF
        data = data[: 1024 - used]
        for byte in data:
            self.page[self.index[REQ_PROD] & 1023] = byte
            self.index[REQ_PROD] = (self.index[REQ_PROD] + 1) & 0xFFFF_FFFF
        return len(data)

    def send(self, data: bytes) -> None:
        """Write all, telling the ring whenever it is full and at the end."""
        while data:
            data = data[self.put(data) :]
            assert self.ring is not None
            self.ring.on_notify()
            self.run_calls()

    def read(self) -> list[Packet]:
        """Read every reply and event there is, telling the ring as room comes."""
        packets = []
        while (count := (self.index[RSP_PROD] - self.index[RSP_CONS]) & 0xFFFF_FFFF) > 0:
            assert count <= 1024
            start = self.index[RSP_CONS]
            self.parser.feed(bytes(self.page[1024 + ((start + i) & 1023)] for i in range(count)))
            self.index[RSP_CONS] = (start + count) & 0xFFFF_FFFF
            while (packet := self.parser.next()) is not None:
                packets.append(packet)
            assert self.ring is not None
            self.ring.on_notify()
            self.run_calls()
        return packets

    def ask(self, op: int, payload: bytes = b"\0", tx: int = 0) -> bytes:
        self.send(Packet(op, 77, tx, payload).encode())
        (reply,) = [p for p in self.read() if p.req_id == 77]
        return reply.payload


@pytest.fixture
def guest(world) -> Guest:
    world.dom0.ask(Op.WRITE, b"/local/domain/5\0")
    world.dom0.ask(Op.SET_PERMS, b"/local/domain/5\0n5\0")
    guest = Guest()
    guest.connect(world.server)
    guest.run_calls()
    return guest


def test_it_announces_itself(guest) -> None:
    assert guest.index[SERVER_FEATURES] == FEATURES == 15
    assert guest.index[CONNECTION] == guest.index[ERROR] == 0


def test_what_a_guest_adds_before_it_sees_the_ring_advance_is_taken(guest, monkeypatch) -> None:
    """Linux tells of new bytes only when it finds the ring empty."""
    packet = Packet(Op.TRANSACTION_START, 77, 0, b"\0").encode()
    settle = guest.ring._server.settle

    def add_body() -> None:
        monkeypatch.undo()
        guest.put(packet[16:])
        settle()

    guest.put(packet[:16])
    monkeypatch.setattr(guest.ring._server, "settle", add_body)
    guest.ring.on_notify()
    guest.run_calls()
    assert [p.req_id for p in guest.read()] == [77]


def test_a_request_and_its_answer(guest) -> None:
    assert guest.ask(Op.WRITE, b"a\0hello") == b"OK\0"
    assert guest.ask(Op.READ, b"a\0") == b"hello"
    assert guest.index[REQ_CONS] == guest.index[REQ_PROD]
    assert guest.notified > 0


@pytest.mark.parametrize("start", [0, 1000, 0xFFFF_FFF0])
def test_long_messages_and_indices_that_wrap(world, start: int) -> None:
    world.domain(5)
    world.server.release(5)
    world.dom0.ask(Op.MKDIR, b"/big\0")
    world.dom0.ask(Op.SET_PERMS, b"/big\0b0\0")
    guest = Guest(start=start)
    guest.connect(world.server)
    value = bytes(random.Random(1).randbytes(2000))
    assert guest.ask(Op.WRITE, b"/big/x\0" + value) == b"OK\0"
    for _ in range(3):
        assert guest.ask(Op.READ, b"/big/x\0") == value


def test_a_request_that_comes_byte_by_byte(guest) -> None:
    for byte in Packet(Op.GET_DOMAIN_PATH, 9, 0, b"5\0").encode():
        guest.send(bytes([byte]))
    assert [p.payload for p in guest.read()] == [b"/local/domain/5\0"]


def test_events_of_others_reach_the_guest_unasked(world, guest) -> None:
    guest.ask(Op.WATCH, b"control\0tok\0")
    before = guest.notified
    world.dom0.ask(Op.WRITE, b"/local/domain/5/control/shutdown\0poweroff")
    assert guest.notified > before
    assert [p.payload for p in guest.read()] == [b"control/shutdown\0tok\0"]


def test_what_was_said_before_it_listened_is_heard(world) -> None:
    guest = Guest()
    guest.put(Packet(Op.GET_DOMAIN_PATH, 9, 0, b"5\0").encode())
    guest.connect(world.server)
    guest.run_calls()
    assert [p.req_id for p in guest.read()] == [9]


def test_many_requests_are_taken_in_turns(guest) -> None:
    guest.put(Packet(Op.GET_DOMAIN_PATH, 9, 0, b"5\0").encode() * 20)
    guest.ring.on_notify()
    assert guest.index[REQ_CONS] == 18 * REQUESTS_PER_TURN
    assert len(guest.calls) == 1
    guest.ring.on_notify()  # however often the guest notifies, one call is outstanding
    assert len(guest.calls) == 1
    guest.run_calls()
    assert len(guest.read()) == 20


def test_a_turn_ends_when_its_time_is_over(world, guest, monkeypatch) -> None:
    answer = world.server.process

    def slow(*args) -> None:
        world.clock.now += 0.5
        answer(*args)

    monkeypatch.setattr(world.server, "process", slow)
    guest.put(Packet(Op.GET_DOMAIN_PATH, 9, 0, b"5\0").encode() * 3)
    guest.ring.on_notify()
    assert guest.index[REQ_CONS] == 18
    guest.run_calls()
    assert guest.index[REQ_CONS] == 3 * 18


def test_a_full_reply_ring_holds_its_own_guest_only(world, guest) -> None:
    world.dom0.ask(Op.WRITE, b"/local/domain/5/big\0" + b"x" * 1000)
    for _ in range(3):
        guest.send(Packet(Op.READ, 1, 0, b"big\0").encode())
    assert (guest.index[RSP_PROD] - guest.index[RSP_CONS]) == 1024
    assert world.domain(6).ask(Op.WRITE, b"a\0") == b"OK\0"
    assert [len(p.payload) for p in guest.read()] == [1000] * 3


def test_a_guest_that_never_reads_replies_is_stopped_at_its_limit(world, guest) -> None:
    world.dom0.ask(Op.WRITE, b"/local/domain/5/big\0" + b"x" * 2000)
    request = Packet(Op.READ, 1, 0, b"big\0").encode()
    for _ in range(100):
        guest.put(request)
        guest.ring.on_notify()
        guest.run_calls()
    assert guest.index[REQ_PROD] - guest.index[REQ_CONS] > 900
    assert len(guest.read()) >= 21


def test_a_throttled_guest_is_called_back(world, guest) -> None:
    world.dom0.start()
    bursts = int(world.server.limits.write_burst)
    for _ in range(bursts + 10):
        guest.put(Packet(Op.WRITE, 1, 0, b"a\0v").encode())
        guest.ring.on_notify()
        guest.read_now = guest.index[RSP_PROD]
        guest.index[RSP_CONS] = guest.index[RSP_PROD]
        guest.calls = [c for c in guest.calls if c[0] > 0 or c[1]()]
    assert [seconds > 0 for seconds, _ in guest.calls] == [True]
    assert guest.index[REQ_CONS] != guest.index[REQ_PROD]
    world.clock.now += 1.0
    guest.run_calls()
    assert guest.index[REQ_CONS] == guest.index[REQ_PROD]


@pytest.mark.parametrize(("at", "value"), [(REQ_PROD, 1025), (REQ_PROD, 0xFFFF_FFFF), (RSP_CONS, 5), (RSP_CONS, 2**31)])
def test_impossible_indices_stop_the_ring(world, guest, at: int, value: int) -> None:
    guest.ask(Op.WATCH, b"a\0t\0")
    for index in (REQ_CONS, REQ_PROD, RSP_CONS, RSP_PROD):
        assert guest.index[index] < 1024
    if at == RSP_CONS:
        value += guest.index[RSP_PROD]
        guest.put(Packet(Op.GET_DOMAIN_PATH, 9, 0, b"5\0").encode())
    else:
        value = (guest.index[REQ_CONS] + value) & 0xFFFF_FFFF
    guest.index[at] = value
    guest.ring.on_notify()
    assert guest.ring.broken
    assert guest.index[ERROR] == 2
    assert world.server.watches.count(world.server.domain(5)) == 0
    guest.ring.on_notify()
    world.dom0.ask(Op.WRITE, b"/local/domain/5/a\0v")
    assert world.domain(6).ask(Op.READ, b"a\0") == b"ENOENT"


def test_a_payload_too_long_stops_the_ring(guest) -> None:
    guest.send(HEADER.pack(Op.READ, 1, 0, 4097))
    assert guest.ring.broken
    assert guest.index[ERROR] == 3


def test_scribbling_on_our_indices_changes_nothing(guest) -> None:
    guest.index[REQ_CONS] = 500
    guest.index[RSP_PROD] = 900
    guest.index[REQ_PROD] = 0
    for i, byte in enumerate(Packet(Op.GET_DOMAIN_PATH, 9, 0, b"5\0").encode()):
        guest.page[i] = byte
    guest.index[REQ_PROD] = 18
    guest.ring.on_notify()
    assert (guest.index[REQ_CONS], guest.index[RSP_PROD]) == (18, 16 + 16)


def test_reconnection_begins_anew(world, guest) -> None:
    guest.ask(Op.WATCH, b"a\0t\0")
    guest.ask(Op.TRANSACTION_START)
    guest.put(b"half a head")
    guest.ring.on_notify()
    guest.index[CONNECTION] = 1
    guest.ring.on_notify()
    assert guest.index[CONNECTION] == 0
    assert [guest.index[i] for i in (REQ_CONS, REQ_PROD, RSP_CONS, RSP_PROD)] == [0] * 4
    guest.parser.clear()
    world.dom0.ask(Op.WRITE, b"/local/domain/5/a\0v")
    assert guest.ask(Op.READ, b"a\0") == b"v"
    assert guest.ask(Op.TRANSACTION_END, b"T\0", tx=1) == b"ENOENT\0"


def test_reconnection_mends_a_broken_ring(guest) -> None:
    guest.send(HEADER.pack(Op.READ, 1, 0, 4097))
    guest.index[CONNECTION] = 1
    guest.ring.on_notify()
    assert not guest.ring.broken and guest.index[ERROR] == 0
    assert guest.ask(Op.GET_DOMAIN_PATH, b"5\0") == b"/local/domain/5\0"


def test_it_can_be_begun_anew(world, guest) -> None:
    guest.ask(Op.WATCH, b"a\0t\0")
    guest.put(b"half a head")
    guest.ring.on_notify()
    guest.ring.reset()
    assert [guest.index[i] for i in (REQ_CONS, REQ_PROD, RSP_CONS, RSP_PROD)] == [0] * 4
    guest.parser.clear()
    world.dom0.ask(Op.WRITE, b"/local/domain/5/a\0v")
    assert guest.ask(Op.READ, b"a\0") == b"v"
    assert world.server.watches.count(world.server.domain(5)) == 0


def test_after_release_the_page_is_not_touched(world, guest) -> None:
    world.server.release(5)
    guest.ring.close()
    before = bytes(guest.page)
    guest.put(Packet(Op.GET_DOMAIN_PATH, 9, 0, b"5\0").encode())
    now = bytes(guest.page)
    guest.ring.on_notify()
    guest.run_calls()
    world.dom0.ask(Op.WRITE, b"/local/domain/5/a\0v")
    assert bytes(guest.page) == now != before
    guest.index.release()
    guest.page.clear()  # nobody holds it any longer


def test_two_rings_for_one_domain_are_refused(world, guest) -> None:
    with pytest.raises(AlreadyExists):
        Guest().connect(world.server)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(st.integers(0, 2**32))
def test_a_page_of_noise_hurts_its_own_guest_only(make_world, caplog, seed: int) -> None:
    world = make_world()
    other = world.domain(6)
    noise = random.Random(seed)
    guest = Guest()
    guest.connect(world.server)
    for _ in range(15):
        for _ in range(noise.randrange(1, 6)):
            at = noise.choice([REQ_PROD, RSP_CONS, REQ_CONS, RSP_PROD, CONNECTION, ERROR])
            near = guest.index[at] + noise.randrange(-3, 40)
            guest.index[at] = noise.choice([near & 0xFFFF_FFFF, noise.randrange(2), noise.getrandbits(32)])
        for _ in range(noise.randrange(3)):
            head = HEADER.pack(noise.randrange(24), noise.getrandbits(32), noise.randrange(3), noise.randrange(40))
            start = noise.randrange(1000)
            guest.page[start : start + 16] = head
        guest.ring.on_notify()
        for _ in range(3):
            due, guest.calls = guest.calls, []
            for _seconds, function in due:
                function()
        assert len(guest.page) == 4096
        assert len(guest.calls) <= 1
    assert other.ask(Op.WRITE, b"a\0v") == b"OK\0"
    assert "a bug of ours" not in caplog.text
