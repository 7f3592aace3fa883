"""The driver process's half of a nic, with a front end played by the test."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import pytest

from hypervisor import abi
from hypervisor.devices.driver import DeviceBroken
from hypervisor.devices.net import message
from hypervisor.devices.net.driver import NetDriver
from hypervisor.devices.net.message import DATA_VALID, GSO_TCPV4, GSO_TCPV6, NEEDS_CSUM, PLAIN, Header
from tests.support.fake_link import FakeGuest
from tests.support.net_frontend import FakeLoop, Frontend, checksums_right, ethernet, tcp4, tcp6, udp4


class Rig:
    """A guest with one nic, and its driver."""

    def __init__(self, **options: object) -> None:
        self.guest = FakeGuest(frames=6000)
        self.front = Frontend(self.guest, **options)  # type: ignore[arg-type]
        self.reports: list[tuple[int, str, str]] = []
        self.start()

    def start(self) -> None:
        self.link = self.guest.link()
        self.loop = FakeLoop()
        self.driver = NetDriver(self.link, self.loop, lambda *what: self.reports.append(what))
        self.driver.connect(0, self.front.config(), self.front.fds())
        self.loop.run()

    def restart(self) -> None:
        """As if it had been killed: nothing is given back in an orderly way."""
        self.link.close()
        self.start()

    def run(self, seconds: float = 0.0) -> None:
        self.loop.run(seconds)

    def arrive(self, frame: bytes, header: Header = message.NO_OFFLOAD) -> None:
        self.front.switch_end.send(header.pack() + frame)

    @property
    def stats(self) -> dict[str, int]:
        return self.driver.stats()[0]


@pytest.fixture(params=[True, False], ids=["split", "one-port"])
def rig(request: pytest.FixtureRequest) -> Iterator[Rig]:
    made = Rig(split=request.param)
    yield made
    made.front.close()


def test_frames_reach_the_switch_in_order(rig: Rig) -> None:
    frames = [ethernet(bytes([number]) * (20 + number * 100)) for number in range(20)]
    ids = [rig.front.send(frame) for frame in frames]
    rig.front.push()
    rig.run()
    assert rig.front.sent() == [PLAIN + frame for frame in frames]
    assert rig.front.tx_responses() == [(id_, 0) for pair in ids for id_ in pair]
    assert rig.guest.notifications(rig.front.queues[0].tx_port)
    assert rig.stats["tx_packets"] == 20
    assert rig.stats["tx_bytes"] == sum(map(len, frames))


def test_a_frame_of_many_pieces(rig: Rig) -> None:
    frame = ethernet(os.urandom(50_000))
    ids = rig.front.send(frame, piece=3000)
    rig.front.push()
    rig.run()
    assert rig.front.sent() == [PLAIN + frame]
    assert rig.front.tx_responses() == [(id_, 0) for id_ in ids]


def test_ring_goes_round(rig: Rig) -> None:
    for turn in range(10):
        frames = [ethernet(bytes([turn, number]) * 20) for number in range(100)]
        for frame in frames:
            rig.front.send(frame)
        rig.front.push()
        rig.run()
        assert rig.front.sent() == [PLAIN + frame for frame in frames]
        assert len(rig.front.tx_responses()) == 100


@pytest.mark.parametrize(
    ("frame", "gso", "kind", "start"),
    [
        (tcp4(b"x" * 9000), abi.XEN_NETIF_GSO_TYPE_TCPV4, GSO_TCPV4, 34),
        (tcp6(b"x" * 9000), abi.XEN_NETIF_GSO_TYPE_TCPV6, GSO_TCPV6, 54),
    ],
)
def test_segmentation_is_passed_on(rig: Rig, frame: bytes, gso: int, kind: int, start: int) -> None:
    rig.front.send(frame, flags=abi.NETTXF_csum_blank | abi.NETTXF_data_validated, gso=(gso, 1448))
    rig.front.push()
    rig.run()
    assert rig.front.sent() == [Header(NEEDS_CSUM, kind, start + 20, 1448, start, 16).pack() + frame]
    statuses = [status for _, status in rig.front.tx_responses()]
    assert statuses == [0, 1, 0, 0], "the extra's response is NETIF_RSP_NULL"


def test_checksums_are_passed_on(rig: Rig) -> None:
    rig.front.send(udp4(b"hello"), flags=abi.NETTXF_csum_blank)
    rig.front.send(udp4(b"known"), flags=abi.NETTXF_data_validated)
    rig.front.push()
    rig.run()
    assert rig.front.sent() == [
        Header(NEEDS_CSUM, csum_start=34, csum_offset=6).pack() + udp4(b"hello"),
        Header(DATA_VALID).pack() + udp4(b"known"),
    ]


@pytest.mark.parametrize(
    ("frame", "flags", "gso"),
    [
        (b"x" * 13, 0, None),  # shorter than Ethernet's header
        (ethernet(b"no checksum here" * 9), abi.NETTXF_csum_blank, None),
        (tcp6(b"x" * 3000), abi.NETTXF_csum_blank, (abi.XEN_NETIF_GSO_TYPE_TCPV4, 1000)),
        (udp4(b"x" * 3000), abi.NETTXF_csum_blank, (abi.XEN_NETIF_GSO_TYPE_TCPV4, 1000)),
    ],
)
def test_a_frame_that_makes_no_sense_is_an_error_and_no_more(
    rig: Rig, frame: bytes, flags: int, gso: tuple[int, int] | None
) -> None:
    rig.front.send(frame, flags=flags, gso=gso)
    rig.front.send(ethernet(b"good" * 20))
    rig.front.push()
    rig.run()
    assert rig.front.sent() == [PLAIN + ethernet(b"good" * 20)]
    statuses = [status for _, status in rig.front.tx_responses()]
    assert statuses[0] == abi.NETIF_RSP_ERROR
    assert statuses[-1] == 0
    assert rig.stats["tx_dropped"] == 1
    assert not rig.reports


def test_a_grant_that_is_none_is_an_error(rig: Rig) -> None:
    rig.front.request(99_999, 0, 0, 5, 100)
    rig.front.push()
    rig.run()
    assert rig.front.tx_responses() == [(5, abi.NETIF_RSP_ERROR)]


def test_too_many_pieces_are_an_error(rig: Rig) -> None:
    ids = rig.front.send(ethernet(b"x" * 1900), piece=100)
    assert len(ids) == 20
    rig.front.push()
    rig.run()
    assert rig.front.tx_responses() == [(id_, abi.NETIF_RSP_ERROR) for id_ in ids]
    assert not rig.reports


@pytest.mark.parametrize(
    ("what", "slots"),
    [
        ("over its page", [(1, 4000, 0, 1, 200)]),
        ("more than 20", [(1, 0, abi.NETTXF_more_data, 1, 100)] * 40),
        ("type 0", [(1, 0, abi.NETTXF_extra_info, 1, 100), b"\0\0"]),
        ("type 9", [(1, 0, abi.NETTXF_extra_info, 1, 100), b"\x09\0"]),
        ("into 0 bytes", [(1, 0, abi.NETTXF_extra_info, 1, 100), b"\1\0\0\0\1"]),
        ("segmentation of type 7", [(1, 0, abi.NETTXF_extra_info, 1, 100), b"\1\0\1\0\7"]),
        ("more extra infos", [(1, 0, abi.NETTXF_extra_info, 1, 100), *([b"\4\1"] * 9)]),
    ],
)
def test_a_hostile_request_breaks_the_device(rig: Rig, what: str, slots: list[object]) -> None:
    for slot in slots:
        if isinstance(slot, bytes):
            rig.front.put(slot)
        else:
            rig.front.request(*slot)  # type: ignore[misc]
    rig.front.push()
    rig.run()
    assert [(devid, kind) for devid, kind, _ in rig.reports] == [(0, "broken")]
    assert what in rig.reports[0][2]
    assert not rig.front.sent()
    assert rig.guest.mapped == 0, "the rings are given back"


def test_an_index_that_cannot_be_breaks_the_device(rig: Rig) -> None:
    rig.front.queues[0].tx[0:4] = (5000).to_bytes(4, "little")
    rig.guest.notify(rig.front.queues[0].tx_port)
    rig.run()
    assert "5000 requests" in rig.reports[0][2]


def test_another_nic_goes_on_when_one_breaks(rig: Rig) -> None:
    other = Frontend(rig.guest)
    rig.driver.connect(1, other.config(), other.fds())
    rig.front.queues[0].tx[0:4] = (5000).to_bytes(4, "little")
    rig.guest.notify(rig.front.queues[0].tx_port)
    other.send(ethernet(b"fine" * 20))
    other.push()
    rig.run()
    assert other.sent() == [PLAIN + ethernet(b"fine" * 20)]
    assert list(rig.driver.stats()) == [1]
    other.close()


def test_the_end_of_a_frame_may_come_later(rig: Rig) -> None:
    frame = ethernet(b"x" * 300)
    rig.front.send(frame, piece=200)
    rig.front.queues[0].tx_prod -= 1
    rig.front.push()
    rig.run()
    assert not rig.front.sent()
    rig.front.queues[0].tx_prod += 1
    rig.front.push()
    rig.run()
    assert rig.front.sent() == [PLAIN + frame]


def test_a_full_switch_makes_the_guest_wait_and_loses_nothing(rig: Rig) -> None:
    frames = [ethernet(bytes([number]) * 30_000) for number in range(30)]
    for frame in frames:
        rig.front.send(frame)
    rig.front.push()
    rig.run()
    got = rig.front.sent()
    assert 0 < len(got) < 30
    for _ in range(30):
        rig.run(0.01)
        got += rig.front.sent()
    assert got == [PLAIN + frame for frame in frames]
    assert len(rig.front.tx_responses()) == 30 * 8


# -- receive


def test_frames_reach_the_guest(rig: Rig) -> None:
    rig.front.post(64)
    frames = [ethernet(os.urandom(60 + 211 * number)) for number in range(20)]
    for frame in frames:
        rig.arrive(frame)
    rig.run()
    assert rig.front.received() == [(frame, _flags(frame), None) for frame in frames]
    assert rig.guest.notifications(rig.front.queues[0].rx_port)
    assert rig.stats["rx_packets"] == 20
    assert rig.stats["rx_bytes"] == sum(map(len, frames))


def _flags(frame: bytes) -> int:
    return abi.NETRXF_more_data if len(frame) > 4096 else 0


def test_offloads_reach_the_guest(rig: Rig) -> None:
    rig.front.post(64)
    big = tcp4(os.urandom(60_000))
    rig.arrive(big, Header(NEEDS_CSUM, GSO_TCPV4, 54, 1448, 34, 16))
    rig.arrive(udp4(b"valid"), Header(DATA_VALID))
    rig.run()
    blank = abi.NETRXF_csum_blank | abi.NETRXF_data_validated
    assert rig.front.received() == [
        (big, blank | abi.NETRXF_extra_info | abi.NETRXF_more_data, (abi.XEN_NETIF_GSO_TYPE_TCPV4, 1448)),
        (udp4(b"valid"), abi.NETRXF_data_validated, None),
    ]


def test_without_buffers_frames_wait(rig: Rig) -> None:
    frames = [ethernet(bytes([number]) * 6000) for number in range(5)]
    for frame in frames:
        rig.arrive(frame)
    rig.run()
    assert rig.front.received() == []
    rig.front.post(1)
    rig.run()
    assert rig.front.received() == [], "half a frame is none"
    got = []
    for _ in range(9):
        rig.front.post(1)
        rig.run()
        got += [frame for frame, _, _ in rig.front.received()]
    assert got == frames


def test_a_buffer_that_cannot_be_written_spoils_its_frame_only(rig: Rig) -> None:
    rig.front.post(3)
    rig.guest.grants[rig.front.queues[0].posted[1]].readonly = True
    for number in range(3):
        rig.arrive(ethernet(bytes([number]) * 50))
    rig.run()
    assert [frame for frame, _, _ in rig.front.received()] == [ethernet(b"\0" * 50), None, ethernet(b"\2" * 50)]
    assert rig.stats["rx_dropped"] == 1


@pytest.mark.parametrize("missing", ["gso4", "sg"])
def test_a_guest_without_offloads_gets_segments(missing: str) -> None:
    rig = Rig(offloads={missing: False, "gso4": False})
    rig.front.post(64)
    payload = os.urandom(20_000)
    rig.arrive(tcp4(payload), Header(NEEDS_CSUM, GSO_TCPV4, 54, 1448, 34, 16))
    rig.run()
    frames = rig.front.received()
    assert b"".join(frame[54:] for frame, _, _ in frames) == payload
    assert all(checksums_right(frame) for frame, _, _ in frames)
    assert {flags for _, flags, _ in frames} == {abi.NETRXF_data_validated}
    rig.front.close()


def test_a_guest_without_checksums_gets_them_made() -> None:
    rig = Rig(offloads={"csum4": False})
    rig.front.post(8)
    rig.arrive(tcp4(b"hello"), Header(NEEDS_CSUM, csum_start=34, csum_offset=16))
    rig.run()
    ((frame, flags, _),) = rig.front.received()
    assert frame[50:52] != b"\0\0"
    assert flags == abi.NETRXF_data_validated
    rig.front.close()


def test_a_guest_without_pieces_gets_no_large_frames() -> None:
    rig = Rig(offloads={"sg": False, "gso4": False})
    rig.front.post(8)
    rig.arrive(ethernet(b"x" * 5000))
    rig.arrive(ethernet(b"y" * 50))
    rig.run()
    assert [frame for frame, _, _ in rig.front.received()] == [ethernet(b"y" * 50)]
    assert rig.stats["rx_dropped"] == 1
    rig.front.close()


def test_queues_keep_flows_in_order() -> None:
    rig = Rig(queues=4)
    for queue in range(4):
        rig.front.post(200, queue)
    frames = [udp4(bytes([number]), ports=(number % 16, 9)) for number in range(64)]
    for frame in frames:
        rig.arrive(frame)
    rig.run()
    by_queue = [[frame for frame, _, _ in rig.front.received(queue)] for queue in range(4)]
    assert sum(bool(queue) for queue in by_queue) > 1, "flows are spread"
    for port in range(16):
        flow = [frame for frame in frames if frame[35] == port]
        homes = [queue for queue in by_queue if any(frame in queue for frame in flow)]
        assert len(homes) == 1
        assert [frame for frame in homes[0] if frame in flow] == flow
    for queue in range(4):
        rig.front.send(ethernet(bytes([queue]) * 60), queue=queue)
        rig.front.push(queue)
    rig.run()
    assert sorted(rig.front.sent()) == [PLAIN + ethernet(bytes([queue]) * 60) for queue in range(4)]
    rig.front.close()


def test_multicast_is_filtered_when_the_guest_wants_it() -> None:
    rig = Rig()
    rig.front.multicast = True
    rig.driver.disconnect(0)
    rig.start()
    wanted, other = b"\x01\0\x5e\0\0\1", b"\x01\0\x5e\0\0\2"
    rig.front.request(0, 0, abi.NETTXF_extra_info, 3, 0)
    rig.front.put(bytes([abi.XEN_NETIF_EXTRA_TYPE_MCAST_ADD, 0]) + wanted)
    rig.front.push()
    rig.front.post(8)
    rig.run()
    assert [status for _, status in rig.front.tx_responses()] == [0, 1]
    frames = [ethernet(b"x" * 50, target=target) for target in (wanted, other, b"\xff" * 6, b"\0\x16\x3e\0\0\1")]
    for frame in frames:
        rig.arrive(frame)
    rig.run()
    assert [frame for frame, _, _ in rig.front.received()] == [frames[0], frames[2], frames[3]]
    rig.front.close()


# -- when the driver dies


def test_rings_go_on_where_a_killed_driver_left_them(rig: Rig) -> None:
    rig.front.post(10)
    rig.front.send(ethernet(b"before" * 20))
    rig.front.push()
    rig.arrive(ethernet(b"in" * 30))
    rig.run()
    rig.link.close()
    rig.front.send(ethernet(b"while away" * 20))
    rig.front.push()
    rig.arrive(ethernet(b"in while away" * 30))
    rig.start()
    assert rig.front.sent() == [PLAIN + ethernet(b"before" * 20), PLAIN + ethernet(b"while away" * 20)]
    assert [status for _, status in rig.front.tx_responses()] == [0, 0]
    assert [frame for frame, _, _ in rig.front.received()] == [ethernet(b"in" * 30), ethernet(b"in while away" * 30)]


@pytest.mark.parametrize("steps", range(1, 60))
def test_killed_at_any_write(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the driver was about to write: no frame of wrong bytes, none lost, at most some sent twice."""
    from hypervisor.devices.net import rings

    rig = Rig()
    left = steps

    def step() -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise SystemExit

    def wrap(name: str, cls: type) -> None:
        before = getattr(cls, name)

        def stepping(self: object, *args: object, **kwargs: object) -> object:
            step()
            result = before(self, *args, **kwargs)
            step()
            return result

        monkeypatch.setattr(cls, name, stepping)

    with monkeypatch.context() as patch:
        monkeypatch = patch
        for name in ("mark", "respond", "respond_extra"):
            wrap(name, rings.TxRing)
        wrap("_publish", rings._Ring)
        wrap("store", rings.Journal)
        rig.front.post(40)
        frames = [ethernet(bytes([65 + number]) * (100 + number)) for number in range(3)]
        big = tcp4(b"Z" * 6000)
        for frame in frames:
            rig.front.send(frame)
        rig.front.send(big, flags=abi.NETTXF_csum_blank, gso=(abi.XEN_NETIF_GSO_TYPE_TCPV4, 1000))
        rig.front.push()
        arriving = [ethernet(bytes([97 + number]) * 150) for number in range(4)]
        for frame in arriving:
            rig.arrive(frame)
        with contextlib.suppress(SystemExit):
            rig.run()
    died = left < 0
    for queue in rig.front.queues:
        rig.guest.notifications(queue.tx_port)
        rig.guest.notifications(queue.rx_port)
    rig.restart()
    rig.run()
    for queue in rig.front.queues:
        assert rig.guest.notifications(queue.tx_port), "the driver before may not have come to telling the guest"
        assert rig.guest.notifications(queue.rx_port)
    sent = [data[10:] for data in rig.front.sent()]
    assert list(dict.fromkeys(sent)) == [*frames, big], "all of them, in order, no other bytes"
    assert len(sent) <= len(frames) + 2 + died
    assert [status for _, status in rig.front.tx_responses()] == [0, 0, 0, 0, 1, 0]
    received = [frame for frame, _, _ in rig.front.received()]
    assert [frame for frame in arriving if frame in received] == received
    again = ethernet(b"later" * 30)
    rig.arrive(again)
    rig.run()
    assert [frame for frame, _, _ in rig.front.received()] == [again]
    assert not rig.reports
    rig.front.close()


def test_unusable_grants_are_refused() -> None:
    guest = FakeGuest()
    front = Frontend(guest)
    config = front.config()
    config["frontend"]["queues"][0]["rx_ref"] = 4242
    driver = NetDriver(guest.link(), FakeLoop(), lambda *what: None)
    with pytest.raises(DeviceBroken, match="4242"):
        driver.connect(0, config, front.fds())
    assert guest.mapped == 0
    front.close()


def test_disconnect_gives_everything_back(rig: Rig) -> None:
    rig.front.post(5)
    rig.run()
    rig.driver.disconnect(0)
    assert rig.guest.mapped == 0
    assert not rig.loop.readers
    assert not rig.link.events
    assert rig.driver.stats() == {}
