"""Two domains in one process that reach each other by a real peer link; and a neighbour that lies."""

from __future__ import annotations

import collections
import gc
import mmap
import os
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from link_rig import PERMIT, READING, READONLY, WRITING, GrantRig
from pv_rig import PAGE, ROOT_L1

from hypervisor import abi
from hypervisor.abi import errno
from hypervisor.devices.link_window import view_of
from hypervisor.errors import HostFailure, XenError
from hypervisor.evtchn.core import ChannelState
from hypervisor.evtchn.hostside import HostRouter
from hypervisor.grants.peer import HOST_READ, HOST_WRITE
from hypervisor.host import introductions, neighbours, peer_link
from hypervisor.host import peer_wire as wire
from hypervisor.host.neighbours import Neighbours
from hypervisor.host.peer_limits import Purse
from hypervisor.host.poller import Poller
from hypervisor.memory.frames import L1

VA, VA2 = 50 * PAGE, 51 * PAGE
HOST, RO = abi.GNTMAP_host_map, abi.GNTMAP_readonly


class Neighbour(GrantRig):
    """A domain with the two threads of its process. The test's thread may take the run loop's part (`act`)."""

    def __init__(self, domid: int, base: int, street: Street) -> None:
        self.domid, self.base = domid, base
        self.street = street
        super().__init__()
        self.start()
        self.router = HostRouter(lambda port: None)
        self.domain.events.router = self.router
        self.poller = Poller()
        self.posts: collections.deque[Callable[[], None]] = collections.deque()
        self.posted = threading.Semaphore(0)
        self.mapped: set[int] = set()
        self.neighbours = Neighbours(
            self.domain, self.memfd, self.post, self.poller, self._ask, lambda index: index in self.mapped
        )
        self.domain.grants.find_peer = self.neighbours.find
        self.router.neighbours = self.neighbours
        self.stopping = False
        self.hung = threading.Event()
        self.threads = [threading.Thread(target=self._poll), threading.Thread(target=self._run)]
        for thread in self.threads:
            thread.start()

    def new_mapping(self, size: int) -> mmap.mmap:
        self.memfd = os.memfd_create("rig")
        os.ftruncate(self.memfd, size)
        return mmap.mmap(self.memfd, size)

    def _ask(self, domid: int) -> bool:
        threading.Thread(target=self.street.introduce, args=(self, domid)).start()
        return self.street.has_host

    def _poll(self) -> None:
        while not self.stopping:
            self.poller.run_once(1000)

    def _run(self) -> None:
        while True:
            self.posted.acquire()
            if self.stopping:
                return
            self.posts.popleft()()

    def post(self, function: Callable[[], None]) -> None:
        self.posts.append(function)
        self.posted.release()

    def act(self, function: Callable[[], Any]) -> Any:
        """Its result, from the run loop's thread."""
        done = threading.Event()
        results: list[Any] = []

        def work() -> None:
            try:
                results.append(function())
            except Exception as exc:
                results.append(exc)
            done.set()

        self.post(work)
        assert done.wait(20)
        if isinstance(results[0], Exception):
            raise results[0]
        return results[0]

    def stop(self) -> None:
        self.act(self.neighbours.end)
        self.stopping = True
        self.posted.release()
        self.poller.call(lambda: None)
        for thread in self.threads:
            thread.join(10)
        os.close(self.memfd)

    def until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 10
        while not self.act(condition):
            assert time.monotonic() < deadline
            time.sleep(0.005)


class Street:
    """Domains 1 and 2, and what the host process does for them."""

    def __init__(self) -> None:
        self.has_host = True
        self.domains: dict[int, Neighbour] = {}
        self.asked: list[int] = []
        self.imposter: socket.socket | None = None
        for domid, base in ((1, 0x20000), (2, 0x30000)):
            self.domains[domid] = Neighbour(domid, base, self)

    def introduce(self, asker: Neighbour, domid: int) -> None:
        self.asked.append(domid)
        if not self.has_host:
            return
        other = self.domains.get(domid)
        if other is None:
            asker.neighbours.introduce({"domid": domid}, [])
            return
        near, far = introductions._ends()
        try:
            other.neighbours.introduce(self.card(asker), far)
        except HostFailure:
            asker.neighbours.introduce({"domid": domid}, [])
            return
        asker.neighbours.introduce(self.card(other), near)

    @staticmethod
    def card(rig: Neighbour) -> dict[str, int]:
        return {"domid": rig.domid, "base_mfn": rig.base, "frames": rig.memory.frames}

    def liar(self, domid: int = 9, base: int = 0x40000) -> socket.socket:
        """The socket of a neighbour of domain 1 that says what it likes."""
        near, far = introductions._ends()
        for fd in far[1:]:
            os.close(fd)
        self.domains[1].neighbours.introduce({"domid": domid, "base_mfn": base, "frames": 64}, near)
        self.domains[1].act(lambda: None)
        sock = socket.socket(fileno=far[0])
        sock.settimeout(10)
        return sock


@pytest.fixture
def street():
    made = Street()
    yield made
    for rig in made.domains.values():
        rig.stop()


@pytest.fixture(scope="module", autouse=True)
def _nothing_left_behind():
    yield
    gc.collect()


@pytest.fixture
def two(street):
    """(granter, mapper)."""
    return street.domains[1], street.domains[2]


def seen(rig: Neighbour, va: int, size: int = 8) -> bytes:
    """What the mapper's engine finds at a linear address that maps a neighbour's frame."""
    entry = rig.entry(va)
    ((mpa, (_, address)),) = rig.engine.neighbours.items()
    return bytes(view_of(address + (entry & 0xF_FFFF_F000) - mpa, size))


def test_a_frame_is_mapped_at_its_machine_address(two):
    granter, mapper = two
    granter.grant(9, 20, domid=2)
    granter.put(20 * PAGE, b"before..")
    status, handle, bus = mapper.act(lambda: mapper.map(9, HOST, VA, domid=1))
    assert (status, bus) == (0, granter.mfn(20) << 12)
    assert seen(mapper, VA) == b"before.."
    granter.put(20 * PAGE, b"after...")
    assert seen(mapper, VA) == b"after...", "it is one page, not two"
    assert granter.act(lambda: granter.flags(9)) == READING | WRITING
    assert mapper.act(lambda: mapper.unmap(handle, VA)) == 0
    granter.until(lambda: granter.flags(9) == 0 and not len(granter.domain.grants.own))
    assert granter.get(20 * PAGE, 8) == b"after..."
    granter.act(granter.check)
    assert not granter.neighbours.shared
    assert os.pread(granter.memfd, 8, 20 * PAGE) == b"after...", "it is in the domain's memory again"


def test_the_same_frame_for_reading_then_writing(two):
    granter, mapper = two
    granter.grant(9, 20, domid=2)
    granter.put(20 * PAGE, b"one.....")
    _, first, _ = mapper.act(lambda: mapper.map(9, HOST | RO, VA, domid=1))
    status, second, _ = mapper.act(lambda: mapper.map(9, HOST, VA2, domid=1))
    assert status == 0
    granter.put(20 * PAGE, b"two.....")
    assert seen(mapper, VA) == seen(mapper, VA2) == b"two....."
    assert mapper.act(lambda: mapper.unmap(second, VA2)) == 0
    assert seen(mapper, VA) == b"two....."
    assert mapper.act(lambda: mapper.unmap(first, VA)) == 0
    granter.until(lambda: not granter.neighbours.shared)


def test_what_is_refused(two, street):
    granter, mapper = two
    granter.grant(9, 20, PERMIT | READONLY, domid=2)
    granter.grant(10, 21, domid=5)
    granter.grant(11, ROOT_L1, domid=2)
    granter.grant(12, 22, domid=2)
    granter.mapped.add(22)
    general, bad_ref = abi.GNTST_general_error, abi.GNTST_bad_gntref
    for ref, flags, want in ((9, HOST, general), (10, HOST, general), (11, HOST, general), (12, HOST, general)):
        assert mapper.act(lambda ref=ref, flags=flags: mapper.map(ref, flags, VA, domid=1))[0] == want
    assert mapper.act(lambda: mapper.map(99999, HOST, VA, domid=1))[0] == bad_ref
    assert mapper.act(lambda: mapper.map(9, HOST, VA, domid=77))[0] == abi.GNTST_bad_domain
    assert street.asked == [1, 77]
    assert mapper.act(lambda: mapper.map(9, HOST | RO, VA, domid=1))[0] == 0
    assert not granter.act(lambda: [ref for ref in granter.domain.grants.own if ref != 9])


def test_copies_in_both_directions_in_their_order(two):
    granter, mapper = two
    granter.grant(9, 20, domid=2)
    granter.put(20 * PAGE, bytes(range(200)))
    source = abi.GNTCOPY_source_gref
    assert mapper.act(lambda: mapper.copy((9, 1, 10), (mapper.mfn(21), 0x7FF0, 5), 20, source)) == 0
    assert mapper.get(21 * PAGE, 30) == bytes(5) + bytes(range(10, 30)) + bytes(5)
    dest = abi.GNTCOPY_dest_gref
    assert mapper.act(lambda: mapper.copy((mapper.mfn(21), 0x7FF0, 5), (9, 1, 100), 20, dest)) == 0
    granter.until(lambda: granter.get(20 * PAGE + 98, 24) == bytes((98, 99, *range(10, 30), 120, 121)))
    granter.until(lambda: not len(granter.domain.grants.own))
    granter.act(granter.check)


def test_events(two):
    granter, mapper = two
    port = granter.act(lambda: granter.domain.events.alloc_unbound(0x7FF0, 2))
    local = mapper.act(lambda: mapper.domain.events.bind_interdomain(1, port))
    mapper.act(lambda: mapper.domain.events.send(local))
    granter.until(lambda: granter.domain.events.is_pending(port))
    mapper.act(lambda: mapper.domain.events.events.clear(local))
    granter.act(lambda: granter.domain.events.send(port))
    mapper.until(lambda: mapper.domain.events.is_pending(local))
    with pytest.raises(XenError) as failure:
        mapper.act(lambda: mapper.domain.events.bind_interdomain(1, port))
    assert failure.value.errno == errno.EINVAL
    mapper.act(lambda: mapper.domain.events.close(local))
    granter.until(lambda: granter.domain.events.status(port).state is ChannelState.UNBOUND)
    again = mapper.act(lambda: mapper.domain.events.bind_interdomain(1, port))
    granter.act(lambda: granter.domain.events.close(port))
    mapper.until(lambda: mapper.domain.events.status(again).state is ChannelState.UNBOUND)


def test_eperm_and_esrch(two, street):
    _, mapper = two
    for domid, want in ((1, errno.EPERM), (0, errno.EPERM), (77, errno.ESRCH)):
        with pytest.raises(XenError) as failure:
            mapper.act(lambda domid=domid: mapper.domain.events.alloc_unbound(domid, 2))
        assert failure.value.errno == want
    with pytest.raises(XenError) as failure:
        mapper.act(lambda: mapper.domain.events.bind_interdomain(77, 3))
    assert failure.value.errno == errno.ESRCH
    street.has_host = False
    with pytest.raises(XenError) as failure:
        mapper.act(lambda: mapper.domain.events.bind_interdomain(78, 3))
    assert failure.value.errno == errno.ESRCH


def test_both_at_once(two):
    """Each waits for the other and serves it meanwhile."""
    one, other = two
    one.grant(9, 20, domid=2)
    other.grant(9, 20, domid=1)

    def busy(rig: Neighbour, peer: int) -> list[int]:
        statuses = []
        for _ in range(100):
            status, handle, _ = rig.map(9, HOST, VA, domid=peer)
            statuses += [status, rig.unmap(handle, VA)]
        return statuses

    assert one.act(lambda: busy(one, 2)[:2]) == [0, 0]
    results: list[list[int]] = []
    threads = [
        threading.Thread(target=lambda rig=rig, peer=peer: results.append(rig.act(lambda: busy(rig, peer))))
        for rig, peer in ((one, 2), (other, 1))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert results == [[0] * 200, [0] * 200]


def test_the_granter_ends_while_mapped(two, street):
    granter, mapper = two
    granter.grant(9, 20, domid=2)
    granter.put(20 * PAGE, b"a legacy")
    port = granter.act(lambda: granter.domain.events.alloc_unbound(0x7FF0, 2))
    local = mapper.act(lambda: mapper.domain.events.bind_interdomain(1, port))
    _, handle, _ = mapper.act(lambda: mapper.map(9, HOST, VA, domid=1))
    granter.act(granter.neighbours.end)
    mapper.until(lambda: mapper.domain.events.status(local).state is ChannelState.UNBOUND)
    assert seen(mapper, VA) == b"a legacy"
    assert mapper.act(lambda: mapper.map(9, HOST, VA2, domid=1))[0] == abi.GNTST_bad_domain
    assert mapper.act(lambda: mapper.unmap(handle, VA)) == 0
    mapper.until(lambda: not mapper.engine.neighbours)
    granter.act(granter.check)


def test_the_mapper_ends(two):
    granter, mapper = two
    granter.grant(9, 20, domid=2)
    port = granter.act(lambda: granter.domain.events.alloc_unbound(0x7FF0, 2))
    mapper.act(lambda: mapper.domain.events.bind_interdomain(1, port))
    mapper.act(lambda: mapper.map(9, HOST, VA, domid=1))
    mapper.act(mapper.neighbours.end)
    granter.until(lambda: not len(granter.domain.grants.own) and not granter.neighbours.shared)
    assert granter.act(lambda: granter.domain.events.status(port)).state is ChannelState.UNBOUND
    granter.act(granter.check)


def test_a_neighbour_that_does_not_answer(two, street, monkeypatch):
    granter, mapper = two
    monkeypatch.setattr(peer_link, "PATIENCE", 0.2)
    granter.grant(9, 20, domid=2)
    mapper.act(lambda: mapper.unmap(mapper.map(9, HOST, VA, domid=1)[1], VA))
    begun = threading.Event()
    granter.post(lambda: (begun.set(), granter.hung.wait(20)))
    assert begun.wait(10)
    assert mapper.act(lambda: mapper.map(9, HOST, VA, domid=1))[0] == abi.GNTST_general_error
    granter.hung.set()
    granter.until(lambda: not len(granter.domain.grants.own))
    assert mapper.act(lambda: mapper.map(9, HOST, VA, domid=1))[0] == 0, "they are introduced again"


def request(kind: int, body: bytes, number: int = 1) -> bytes:
    return wire.HEAD.pack(kind, 0, number) + body


PIN = wire.PIN_BODY.pack(9, HOST_WRITE, 0)


@pytest.mark.parametrize(
    "messages",
    [
        [b"x"],
        [request(99, b"")],
        [request(wire.PIN, b"short")],
        [request(wire.PIN, wire.PIN_BODY.pack(9, 3 * HOST_WRITE, 0))],
        [request(wire.PIN, wire.PIN_BODY.pack(9, HOST_READ, 0))],
        [request(wire.UNPIN, PIN)],
        [request(wire.PIN, PIN), request(wire.UNPIN, wire.PIN_BODY.pack(9, HOST_READ, 1))],
        [request(wire.DROP, wire.HOLD_BODY.pack(0x20014, 1))],
        [request(wire.HOLD, wire.HOLD_BODY.pack(0x20014, 1))],
        [request(wire.PIN, PIN), request(wire.HOLD, wire.HOLD_BODY.pack(0x20015, 1))],
        [request(wire.READ, wire.COPY_BODY.pack(9, 0))],
        [request(wire.UNPIN_COPY, wire.COPY_BODY.pack(9, 0))],
        [request(wire.PIN_COPY, wire.COPY_BODY.pack(9, 0)), request(wire.PIN_COPY, wire.COPY_BODY.pack(9, 0))],
        [
            request(wire.PIN_COPY, wire.COPY_BODY.pack(9, 0)),
            request(wire.WRITE, wire.COPY_BODY.pack(9, 0) + wire.PIECE.pack(4090, 10) + bytes(10)),
        ],
        [
            request(wire.PIN_COPY, wire.COPY_BODY.pack(9, 1)),
            request(wire.WRITE, wire.COPY_BODY.pack(9, 1) + wire.PIECE.pack(0, 1) + b"x"),
        ],
        [request(wire.PIN | wire.ANSWERS, bytes(wire.PLACE_BODY.size))],
        [bytes(wire.MAX_MESSAGE + 10)],
    ],
)
def test_a_lying_neighbour_ends_its_own_link(street, messages):
    granter = street.domains[1]
    granter.grant(9, 20, domid=9)
    granter.put(20 * PAGE, b"unharmed")
    sock = street.liar()
    for message in messages:
        sock.send(message)
    while data := _receive(sock):
        assert wire.HEAD.unpack_from(data)[1] == 0
    sock.close()
    granter.until(lambda: not len(granter.domain.grants.own) and not granter.neighbours.shared)
    assert granter.get(20 * PAGE, 8) == b"unharmed"
    granter.act(granter.check)


def _receive(sock: socket.socket) -> bytes:
    try:
        return sock.recv(wire.MAX_MESSAGE)
    except ConnectionResetError:
        return b""


def test_events_of_a_liar_reach_its_own_channels_only(street):
    granter = street.domains[1]
    events = granter.domain.events
    theirs = granter.act(lambda: events.alloc_unbound(0x7FF0, 9))
    other = granter.act(lambda: events.alloc_unbound(0x7FF0, 2))
    sock = street.liar()
    sock.send(request(wire.BIND, wire.PORTS_BODY.pack(other, 5)))
    assert wire.parse(sock.recv(100))[1] == errno.EINVAL
    sock.send(request(wire.BIND, wire.PORTS_BODY.pack(theirs, 5)))
    assert wire.parse(sock.recv(100))[1] == 0
    for port, sender in ((other, 5), (theirs, 6), (1 << 30, 5)):
        for kind in (wire.SEND, wire.CLOSED):
            sock.send(request(kind, wire.PORTS_BODY.pack(port, sender), 0))
    sock.send(request(wire.PIN, wire.PIN_BODY.pack(99, HOST_READ, 1)))
    assert wire.parse(sock.recv(100))[1] == abi.GNTST_general_error
    assert not granter.act(lambda: events.is_pending(theirs) or events.is_pending(other))
    assert granter.act(lambda: events.status(theirs)).state is ChannelState.INTERDOMAIN
    sock.close()


@pytest.mark.parametrize(
    ("mfn", "slot", "writable"),
    [(0x20014, 0, 1), (0x40040, 0, 1), (0x40001, 4096, 1), (0x40001, 0, 0), (1 << 60, 0, 1)],
)
def test_a_liar_cannot_place_frames_elsewhere(street, mfn, slot, writable):
    """Not over the mapper's own, not outside its extent, not without the right to write."""
    mapper = street.domains[1]
    sock = street.liar()

    def play() -> None:
        _, _, number, _ = wire.parse(sock.recv(100))
        answer = wire.PLACE_BODY.pack(mfn, slot, writable)
        sock.send(wire.HEAD.pack(wire.PIN | wire.ANSWERS, 0, number) + answer)

    thread = threading.Thread(target=play)
    thread.start()
    assert mapper.act(lambda: mapper.map(5, HOST, VA, domid=9))[0] == abi.GNTST_general_error
    thread.join(10)
    assert _receive(sock) == b""
    sock.close()
    mapper.act(mapper.check)


def test_a_flood_waits_in_the_senders_socket(street):
    granter = street.domains[1]
    sock = street.liar()
    sock.setblocking(False)
    granter.post(lambda: granter.hung.wait(20))
    with pytest.raises(BlockingIOError):
        for number in range(1 << 20):
            sock.send(request(wire.SEND, wire.PORTS_BODY.pack(1, number), 0))
    assert len(granter.posts) <= 2 * peer_link.MAX_INBOX
    granter.hung.set()
    sock.settimeout(10)
    sock.send(request(wire.PIN, wire.PIN_BODY.pack(99, HOST_READ, 1)))
    assert wire.parse(sock.recv(100))[1] == abi.GNTST_general_error
    sock.close()


def test_introductions_that_make_no_sense(street):
    rig = street.domains[1]
    for card, fds in (
        ({}, []),
        ({"domid": 1}, []),
        ({"domid": "2"}, []),
        ({"domid": 3, "base_mfn": 0x20010, "frames": -5}, [os.dup(0)]),
        ({"domid": 3, "base_mfn": 5, "frames": 64}, [os.dup(0) for _ in range(5)]),
    ):
        with pytest.raises(HostFailure, match="no use"):
            rig.neighbours.introduce(card, fds)
    near, far = introductions._ends()
    rig.neighbours.introduce({"domid": 3, "base_mfn": rig.base + 4, "frames": 64}, near)
    assert not rig.act(lambda: rig.engine.neighbours), "its frames would lie over the domain's own"
    for fd in far:
        os.close(fd)


def test_who_does_too_much_waits():
    now, slept = [0.0], []
    purse = Purse(10, 3, lambda: now[0], slept.append)
    for _ in range(5):
        purse.spend()
    assert slept == [0.1, 0.1]
    now[0] = 0.25
    purse.spend()
    purse.spend()
    purse.spend()
    assert slept == [0.1] * 3


def test_a_guest_that_is_refused_all_day_waits(two):
    """Each time its neighbour is interrupted for nothing."""
    _, mapper = two
    slept: list[float] = []
    mapper.act(lambda: mapper.map(5, HOST, VA, domid=1))
    mapper.neighbours._peers[1]._refused = Purse(100, 2, sleep=slept.append)
    for _ in range(4):
        assert mapper.act(lambda: mapper.map(5, HOST, VA, domid=1))[0] == abi.GNTST_general_error
    assert slept == [0.01] * 2
    mapper.neighbours._asks = Purse(100, 1, sleep=slept.append)
    for domid in (77, 78):
        assert mapper.act(lambda domid=domid: mapper.neighbours.find(domid)) is None
    assert len(slept) == 3


def test_a_frame_that_was_writable_is_no_page_table_until_it_is_back(two):
    """The neighbour's process can write it until then, though its guest only reads."""
    granter, mapper = two
    granter.grant(9, 20, domid=2)
    granter.unmap_va(20 * PAGE)
    _, reads, _ = mapper.act(lambda: mapper.map(9, HOST | RO, VA, domid=1))
    _, writes, _ = mapper.act(lambda: mapper.map(9, HOST, VA2, domid=1))
    assert mapper.act(lambda: mapper.unmap(writes, VA2)) == 0
    granter.until(lambda: granter.flags(9) == READING)
    with pytest.raises(XenError):
        granter.act(lambda: granter.tables.pin(granter.mfn(20), L1))
    assert mapper.act(lambda: mapper.unmap(reads, VA)) == 0
    granter.until(lambda: not granter.neighbours.shared)
    granter.act(lambda: granter.tables.pin(granter.mfn(20), L1))
    granter.act(lambda: granter.tables.unpin(granter.mfn(20)))
    granter.act(granter.check)


def test_idle_neighbours_make_room(street, monkeypatch):
    monkeypatch.setattr(neighbours, "MAX_NEIGHBOURS", 2)
    rig = street.domains[1]
    rig.grant(9, 20, domid=9)
    busy = street.liar(9)
    busy.send(request(wire.PIN, PIN))
    assert wire.parse(busy.recv(100))[1] == 0
    idle = street.liar(10, 0x50000)
    new = street.liar(11, 0x60000)
    assert _receive(idle) == b"" and sorted(rig.neighbours._peers) == [9, 11]
    rig.grant(10, 21, domid=11)
    new.send(request(wire.PIN, wire.PIN_BODY.pack(10, HOST_READ, 1)))
    assert wire.parse(new.recv(100))[1] == 0
    refused = street.liar(12, 0x70000)
    assert _receive(refused) == b"" and sorted(rig.neighbours._peers) == [9, 11]
    for sock in (busy, idle, new, refused):
        sock.close()


def test_events_that_say_the_same_are_one(street):
    granter = street.domains[1]
    sock = street.liar()
    begun = threading.Event()
    granter.post(lambda: (begun.set(), granter.hung.wait(20)))
    assert begun.wait(10)
    for _ in range(1000):
        sock.send(request(wire.SEND, wire.PORTS_BODY.pack(1, 1), 0))
    sock.send(request(wire.PIN, wire.PIN_BODY.pack(99, HOST_READ, 1)))
    assert len(granter.posts) <= 3
    granter.hung.set()
    assert wire.parse(sock.recv(100))[1] == abi.GNTST_general_error
    sock.close()


def test_the_memfd_can_be_brought_up_to_date(two):
    granter, mapper = two
    granter.grant(9, 20, domid=2)
    mapper.act(lambda: mapper.map(9, HOST, VA, domid=1))
    granter.put(20 * PAGE, b"new data")
    assert os.pread(granter.memfd, 8, 20 * PAGE) != b"new data"
    granter.neighbours.refresh()
    assert os.pread(granter.memfd, 8, 20 * PAGE) == b"new data"


def test_pieces():
    old = bytes(4096)
    new = bytearray(old)
    new[0], new[5:8], new[4095] = 1, b"abc", 7
    pieces = wire.unpack_pieces(wire.pack_pieces(old, bytes(new)))
    assert pieces == [(0, b"\1"), (5, b"abc"), (4095, b"\7")]
    assert wire.pack_pieces(old, old) == b""
    for bad in (b"\0\0\5", wire.PIECE.pack(0, 5) + b"abc", wire.PIECE.pack(4000, 97) + bytes(97)):
        with pytest.raises(wire.BadForm):
            wire.unpack_pieces(bad)
