"""What a guest sends is kept back while it has a standby, and goes out when its epoch is whole."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator

import pytest

from hypervisor.devices.driver import Committing
from hypervisor.devices.net import driver as driver_module
from hypervisor.devices.net.driver import NetDriver
from hypervisor.devices.net.message import PLAIN
from hypervisor.devices.net.outbox import MAX_BYTES, MAX_FRAMES, Outbox
from tests.support.fake_link import FakeGuest
from tests.support.net_frontend import FakeLoop, Frontend, ethernet


class Rig:
    def __init__(self) -> None:
        self.loop = FakeLoop()
        near, self.far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        near.setblocking(False)
        self.far.setblocking(False)
        self.box = Outbox(near, self.loop)

    def put(self, *numbers: int, size: int = 20) -> list[bool]:
        return [self.box.put(PLAIN, bytes([number]) * size) for number in numbers]

    def seen(self) -> list[int]:
        """Numbers of the messages that have come out since the last call."""
        found = []
        with contextlib.suppress(BlockingIOError):
            while message := self.far.recv(100_000):
                found.append(message[-1])
        return found

    def crowd(self) -> int:
        """Fill the socket; how many messages that takes."""
        count = 0
        while self.put(255) == [True]:
            count += 1
        return count


@pytest.fixture
def rig() -> Iterator[Rig]:
    made = Rig()
    yield made
    made.box.close()
    made.far.close()


def test_nothing_is_kept_back_without_a_standby(rig: Rig) -> None:
    rig.put(1, 2)
    assert rig.seen() == [1, 2]


def test_each_epoch_lets_out_what_belongs_to_it(rig: Rig) -> None:
    rig.box.hold()
    rig.box.hold()
    rig.put(1, 2)
    rig.box.boundary(1)
    rig.put(3)
    assert rig.seen() == []
    rig.box.release(1)
    assert rig.seen() == [1, 2]
    rig.box.boundary(2)
    rig.put(4)
    rig.box.release(1)
    assert rig.seen() == []
    rig.box.release(2)
    assert rig.seen() == [3]
    rig.box.boundary(3)
    rig.box.boundary(4)
    rig.put(5)
    rig.box.release(4)
    assert rig.seen() == [4]


def test_an_epoch_whose_boundary_was_not_seen_lets_nothing_out(rig: Rig) -> None:
    """As in a driver that was started between the two."""
    rig.box.hold()
    rig.put(1)
    rig.box.release(7)
    assert rig.seen() == []
    rig.box.boundary(8)
    rig.box.release(8)
    assert rig.seen() == [1]


def test_the_end_lets_all_out_in_order(rig: Rig) -> None:
    rig.box.hold()
    rig.put(1)
    rig.box.boundary(1)
    rig.put(2)
    rig.box.let_out()
    rig.put(3)
    rig.box.let_out()
    rig.box.release(1)
    assert rig.seen() == [1, 2, 3]


def test_what_was_released_goes_even_when_the_rest_is_discarded(rig: Rig) -> None:
    count = rig.crowd()
    rig.box.hold()
    rig.put(1)
    rig.box.boundary(1)
    rig.put(2)
    rig.box.release(1)
    assert rig.seen() == [255] * count, "the switch had no room until now"
    rig.box.discard()
    rig.put(3)
    rig.loop.run(0.01)
    assert rig.seen() == [1]
    rig.box.let_out()
    assert rig.seen() == [3], "the second is gone, what came later was kept back"


def test_a_switch_that_is_slow_gets_it_in_order(rig: Rig) -> None:
    count = rig.crowd()
    rig.box.hold()
    rig.put(1, 2)
    rig.box.boundary(1)
    rig.box.release(1)
    rig.box.let_out()
    assert rig.put(3) == [False], "nothing overtakes"
    assert rig.seen() == [255] * count
    rig.loop.run(0.01)
    assert rig.put(3) == [True] and rig.seen() == [1, 2, 3]


@pytest.mark.parametrize(("size", "most"), [(20, MAX_FRAMES), (60_000, MAX_BYTES // (60_000 + len(PLAIN)))])
def test_it_is_bounded_and_tells_of_room(rig: Rig, size: int, most: int) -> None:
    called: list[int] = []
    rig.box.on_room = lambda: called.append(1)
    rig.box.hold()
    assert rig.put(*[1] * most, size=size) == [True] * most
    assert rig.put(2, size=size) == [False]
    rig.loop.run(10)
    assert not called, "nobody asks again and again"
    rig.box.boundary(1)
    rig.box.release(1)
    got = 0
    while got < most:
        got += len(rig.seen())
        rig.loop.run(0.01)
    assert called == [1] and rig.put(2, size=size) == [True]
    rig.put(*[1] * (most - 1), size=size)
    assert rig.put(2, size=size) == [False]
    rig.box.discard()
    rig.loop.run()
    assert called == [1, 1]


def test_parted_it_lasts_until_it_is_empty(rig: Rig) -> None:
    rig.box.hold()
    rig.put(1)
    rig.box.boundary(1)
    rig.box.part()
    assert not rig.box.closed
    rig.box.release(1)
    assert rig.box.closed and rig.seen() == [1]


class Nic:
    """A guest with one nic, and its driver."""

    def __init__(self) -> None:
        self.guest = FakeGuest(frames=20_000)
        self.front = Frontend(self.guest)
        self.loop = FakeLoop()
        self.driver = NetDriver(self.guest.link(), self.loop, lambda *what: None)
        self.connect()

    def connect(self) -> None:
        self.driver.connect(0, self.front.config(), self.front.fds())
        self.loop.run()

    def send(self, *numbers: int) -> None:
        for number in numbers:
            self.front.send(ethernet(bytes([number]) * 50))
        self.front.push()
        self.loop.run()

    def sent(self) -> list[int]:
        return [message[-1] for message in self.front.sent()]


@pytest.fixture
def nic() -> Iterator[Nic]:
    made = Nic()
    yield made
    made.driver.disconnect(0)
    made.driver.let_out()
    made.front.close()


def test_the_guest_is_answered_before_anybody_hears(nic: Nic) -> None:
    assert isinstance(nic.driver, Committing)
    nic.driver.hold()
    nic.send(1, 2)
    assert len(nic.front.tx_responses()) == 2 and nic.sent() == []
    nic.driver.boundary(1)
    nic.send(3)
    nic.driver.release(1)
    assert nic.sent() == [1, 2]
    nic.driver.let_out()
    nic.send(4)
    assert nic.sent() == [3, 4]


def test_a_nic_that_comes_later_keeps_back_as_well(nic: Nic) -> None:
    nic.driver.hold()
    nic.driver.disconnect(0)
    nic.front = Frontend(nic.guest)
    nic.connect()
    nic.send(1)
    assert nic.sent() == []
    nic.driver.boundary(1)
    nic.driver.release(1)
    assert nic.sent() == [1]


@pytest.mark.parametrize("leaves", [False, True])
def test_what_was_said_outlives_the_nic(nic: Nic, leaves: bool) -> None:
    nic.driver.hold()
    nic.send(1)
    nic.driver.leave(0) if leaves else nic.driver.disconnect(0)
    nic.driver.boundary(1)
    assert nic.sent() == []
    nic.driver.release(1)
    assert nic.sent() == [1]


def test_nics_that_come_and_go_hold_no_more_than_some(nic: Nic, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver_module, "MAX_PARTED", 2)
    nic.driver.hold()
    fronts = [nic.front]
    for number in range(4):
        nic.send(number)
        nic.driver.disconnect(0)
        nic.front = Frontend(nic.guest)
        fronts.append(nic.front)
        nic.connect()
    nic.driver.let_out()
    said = [[message[-1] for message in front.sent()] for front in fronts]
    assert said == [[], [], [2], [3], []]
    for front in fronts[:-1]:
        front.close()


def test_a_full_box_makes_the_guest_wait(nic: Nic) -> None:
    nic.driver.hold()
    frame = ethernet(b"x" * 60_000)
    most = MAX_BYTES // (len(frame) + len(PLAIN))
    at_once = 14  # what the ring holds
    for _ in range(-(-most // at_once)):
        for _ in range(at_once):
            nic.front.send(frame)
        nic.front.push()
        nic.loop.run()
        answered = len(nic.front.tx_responses()) // 15
    assert answered < at_once
    nic.loop.run(1)
    assert nic.front.tx_responses() == [] and nic.sent() == [], "it waits"
    nic.driver.boundary(1)
    nic.driver.release(1)
    heard = 0
    while heard < most:
        heard += len(nic.front.sent())
        nic.loop.run(0.01)
    assert len(nic.front.tx_responses()) // 15 == at_once - answered, "it is served again"
