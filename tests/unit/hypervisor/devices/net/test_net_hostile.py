"""A front end that writes anything anywhere: its own device may break, nothing else happens."""

from __future__ import annotations

import random
import struct

import pytest

from hypervisor import abi
from hypervisor.devices.net.driver import NetDriver
from hypervisor.devices.net.message import PLAIN, Header
from tests.support.fake_link import FakeGuest
from tests.support.net_frontend import FakeLoop, Frontend, ethernet, tcp4


class Hostile:
    """One guest, two nics: the first is attacked, the second must go on."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.guest = FakeGuest(frames=3000, buffer_bytes=1 << 18)
        self.bad, self.good = Frontend(self.guest, queues=2), Frontend(self.guest)
        self.loop = FakeLoop()
        self.reports: list[tuple[int, str, str]] = []
        self.link = self.guest.link()
        self.driver = NetDriver(self.link, self.loop, lambda *what: self.reports.append(what))
        self.driver.connect(1, self.good.config(), self.good.fds())
        self.connect()
        self.refs = [self.guest.grant(self.guest.new_frame(tcp4(b"x" * 4000))) for _ in range(4)]
        self.turn = 0

    def connect(self) -> None:
        for queue in self.bad.queues:
            for page in (queue.tx, queue.rx):
                page[:] = bytes(4096)
            queue.tx_prod = queue.rx_prod = 0
        self.driver.connect(0, self.bad.config(), self.bad.fds())

    def number(self) -> int:
        edge = [0, 1, 13, 14, 60, 255, 256, 4095, 4096, 4097, 65535, 1 << 31, (1 << 32) - 1]
        return self.random.choice([*edge, self.random.getrandbits(16), self.random.getrandbits(32)])

    def attack(self) -> None:
        choice, queue = self.random.randrange(8), self.random.randrange(2)
        rings = self.bad.queues[queue]
        if choice == 0:
            ring = self.random.choice([rings.tx, rings.rx])
            struct.pack_into("<I", ring, 4 * self.random.randrange(4), self.number() & 0xFFFF_FFFF)
        elif choice == 1:
            ring = self.random.choice([rings.tx, rings.rx])
            at = self.random.randrange(4090)
            ring[at : at + 6] = self.random.randbytes(6)
        elif choice in (2, 3):
            for _ in range(self.random.randrange(1, 12)):
                gref = self.random.choice([*self.refs, self.number() & 0xFFFF_FFFF])
                offset, size = self.number() & 0xFFFF, self.number() & 0xFFFF
                flags = self.random.choice([0, 1, 4, 4, 5, 8, 9, 12, 0xFFFF])
                self.bad.request(gref, offset % 4096, flags, self.random.getrandbits(16), size % 4097, queue)
            self.bad.push(queue)
        elif choice == 4:
            self.bad.request(self.refs[0], 0, 9, 1, 4054, queue)
            self.bad.gso(self.random.randrange(4), self.number() & 0xFFFF, queue, self.random.randrange(2))
            self.bad.push(queue)
        elif choice == 5:
            self.bad.post(self.random.randrange(1, 30), queue)
            for gref in self.random.sample(list(rings.posted.values()), 1):
                self.guest.grants.pop(gref, None)
        elif choice == 6:
            kind = Header(1, 1, 54, self.random.randrange(1, 3000), 34, 16)
            try:
                self.bad.switch_end.send(kind.pack() + tcp4(self.random.randbytes(self.random.randrange(1, 9000))))
            except BlockingIOError:
                self.bad.sent()
        else:
            self.guest.notify(self.random.choice([rings.tx_port, rings.rx_port]))

    def check_neighbour(self) -> None:
        self.turn += 1
        frame = ethernet(self.turn.to_bytes(4, "big") * 30)
        ids = self.good.send(frame)
        self.good.push()
        self.good.post(1)
        self.good.switch_end.send(PLAIN + frame)
        self.loop.run(0.002)
        assert self.good.sent() == [PLAIN + frame]
        assert self.good.tx_responses() == [(ids[0], 0)]
        assert [got for got, _, _ in self.good.received()] == [frame]


@pytest.mark.parametrize("seed", range(12))
def test_a_neighbour_goes_on(seed: int) -> None:
    rig = Hostile(seed)
    broken = 0
    for _ in range(150):
        for _ in range(rig.random.randrange(1, 6)):
            rig.attack()
        rig.check_neighbour()
        for data in rig.bad.sent():
            assert len(data) <= 65545
        if rig.reports:
            assert {(devid, what) for devid, what, _ in rig.reports} == {(0, "broken")}
            assert not any("the driver failed" in detail for _, _, detail in rig.reports), rig.reports
            rig.reports.clear()
            rig.driver.disconnect(0)
            broken += 1
            rig.connect()
    assert broken
    assert len(rig.link.pages) == 2 + 4
    rig.bad.close()
    rig.good.close()


def test_requests_that_change_while_they_are_read() -> None:
    """Each request is copied once: what the guest writes afterwards changes nothing."""
    rig = Hostile(0)
    from hypervisor.devices.net import rings

    before = rings.TxRing.peek

    def peek(self: rings.TxRing, ahead: int) -> rings.TxRequest:
        request = before(self, ahead)
        at = 64 + ((self.cons + ahead) & 255) * 12
        self._page[at : at + 12] = struct.pack("<IHHHH", 1, 4000, abi.NETTXF_more_data, 9, 60000)
        return request

    rings.TxRing.peek = peek  # type: ignore[method-assign]
    try:
        frame = ethernet(b"as it was" * 10)
        ids = rig.bad.send(frame)
        rig.bad.push()
        rig.loop.run()
    finally:
        rings.TxRing.peek = before  # type: ignore[method-assign]
    assert rig.bad.sent() == [PLAIN + frame]
    assert rig.bad.tx_responses() == [(ids[0], 0)]
    rig.bad.close()
    rig.good.close()
