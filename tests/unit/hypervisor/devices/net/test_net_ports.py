"""Ports of the switch on real sockets: queues, limits, offloads, replacement."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from typing import Any

import pytest

from hypervisor.devices.net import ports
from hypervisor.devices.net.message import GSO_TCPV4, NEEDS_CSUM, PLAIN, VALIDATED, Header
from hypervisor.devices.net.pacing import Pace
from hypervisor.devices.net.switchboard import Switchboard
from tests.support.net_frontend import FakeLoop, checksums_right, ethernet, tcp4

MACS = ["00:16:3e:00:00:01", "00:16:3e:00:00:02"]


class Board:
    """A switchboard, and the other ends of its ports' sockets."""

    def __init__(self) -> None:
        self.loop = FakeLoop()
        self.board = Switchboard(self.loop, lambda: self.loop.now)
        self.ends: dict[str, socket.socket] = {}
        self.board.handle({"op": "network", "name": "lan", "uplink": ""}, None)

    def pair(self, name: str) -> int:
        near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        near.setblocking(False)
        self.ends[name] = near
        return far.detach()

    def nic(self, number: int, limits: dict[str, Any] | None = None, network: str = "lan") -> socket.socket:
        name = f"nic{number}"
        message = {"op": "nic", "port": name, "network": network, "mac": MACS[number], "addresses": []}
        self.board.handle({**message, "limits": limits or {}}, self.pair(name))
        return self.ends[name]

    def uplink(self, kind: str = "plain") -> socket.socket:
        self.board.handle({"op": "network", "name": "lan", "uplink": kind}, self.pair("up"))
        return self.ends["up"]

    def counters(self, port: str) -> dict[str, int]:
        answer = self.board.handle({"op": "stats", "id": 1}, None)
        assert answer is not None
        found: dict[str, int] = answer["ports"][port]
        return found


@pytest.fixture
def board() -> Iterator[Board]:
    made = Board()
    yield made
    for end in made.ends.values():
        end.close()


def mac(number: int) -> bytes:
    return bytes.fromhex(MACS[number].replace(":", ""))


def between(body: bytes) -> bytes:
    return ethernet(body, source=mac(0), target=mac(1))


def drain(sock: socket.socket) -> list[bytes]:
    got = []
    while True:
        try:
            got.append(sock.recv(1 << 17))
        except BlockingIOError:
            return got


def test_from_nic_to_nic(board: Board) -> None:
    first, second = board.nic(0), board.nic(1)
    header = Header(NEEDS_CSUM, csum_start=34, csum_offset=6).pack()
    first.send(header + between(b"x" * 100))
    board.loop.run()
    assert drain(second) == [header + between(b"x" * 100)]
    assert board.counters("nic0")["in_bytes"] == board.counters("nic1")["out_bytes"] == 114


def test_networks_are_apart(board: Board) -> None:
    board.board.handle({"op": "network", "name": "other", "uplink": ""}, None)
    first, second = board.nic(0), board.nic(1, network="other")
    first.send(PLAIN + between(b"x" * 100))
    board.loop.run()
    assert not drain(second)


def test_who_does_not_read_loses_and_stops_nobody(board: Board) -> None:
    first, second = board.nic(0), board.nic(1)
    total = 200
    for number in range(total):
        first.send(PLAIN + between(number.to_bytes(4, "big") * 5000))
        board.loop.run()
    got = drain(second)
    for _ in range(20):
        board.loop.run(0.01)
        got += drain(second)
    dropped = board.counters("nic1")["dropped"]
    assert dropped > 0
    assert len(got) == total - dropped
    assert sum(map(len, got)) <= ports.QUEUE_BYTES + (4 << 20)
    numbers = [int.from_bytes(data[24:28], "big") for data in got]
    assert numbers == sorted(numbers), "order is kept"


@pytest.mark.parametrize(("kind", "header"), [("plain", VALIDATED), ("bare-tap", PLAIN)])
def test_an_uplink_without_offloads_gets_segments(board: Board, kind: str, header: bytes) -> None:
    """And its own frames come with a checksum that slirp4netns has made, or that nobody has looked at."""
    nic, uplink = board.nic(0), board.uplink(kind)
    payload = os.urandom(20_000)
    frame = tcp4(payload).replace(b"\0\x16\x3e\0\0\1", mac(0), 1)
    nic.send(Header(NEEDS_CSUM, GSO_TCPV4, 54, 1448, 34, 16).pack() + frame)
    board.loop.run()
    got = drain(uplink)
    assert b"".join(segment[54:] for segment in got) == payload
    assert all(checksums_right(segment) for segment in got)
    uplink.send(ethernet(b"back" * 20, source=b"\2" * 6, target=mac(0)))
    board.loop.run()
    assert drain(nic) == [header + ethernet(b"back" * 20, source=b"\2" * 6, target=mac(0))]


def test_limits_hold_back_and_do_not_drop(board: Board, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ports.time, "monotonic", lambda: board.loop.now)
    first, second = board.nic(0, {"iops": 10, "burst_seconds": 0}), board.nic(1)
    for number in range(20):
        first.send(PLAIN + between(bytes([number]) * 50))
    board.loop.run(0.001)
    assert len(drain(second)) == 1
    board.loop.run(1.0)
    assert 9 <= len(drain(second)) <= 11


def test_limits_towards_a_nic(board: Board, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ports.time, "monotonic", lambda: board.loop.now)
    first, second = board.nic(0), board.nic(1, {"bytes_per_second": 1000, "burst_seconds": 1.0})
    for number in range(40):
        first.send(PLAIN + between(bytes([number]) * 86))
    board.loop.run(0.001)
    assert len(drain(second)) == 11, "what was saved up, and one more"
    board.loop.run(1.0)
    assert 9 <= len(drain(second)) <= 11


def test_a_port_is_replaced_and_removed(board: Board) -> None:
    first, second = board.nic(0), board.nic(1)
    again = board.nic(1)
    first.send(PLAIN + between(b"x" * 50))
    board.loop.run()
    assert drain(again)
    assert second.recv(100) == b"", "the old one is closed"
    second.close()
    board.board.handle({"op": "remove", "port": "nic1"}, None)
    board.loop.run()
    assert again.recv(100) == b""
    assert board.board.nics == 1
    first.close()
    board.loop.run()
    assert board.board.nics == 0


def test_a_duplicate_mac_is_refused(board: Board) -> None:
    board.nic(0)
    message = {"op": "nic", "port": "thief", "network": "lan", "mac": MACS[0], "addresses": [], "limits": {}}
    with pytest.raises(ValueError, match="there already"):
        board.board.handle(message, board.pair("thief"))
    assert board.board.nics == 1


@pytest.mark.parametrize("message", [{"op": "dance"}, {"op": "nic"}, {"op": "network", "name": "x", "uplink": "wire"}])
def test_nonsense_is_refused(board: Board, message: dict[str, Any]) -> None:
    with pytest.raises((ValueError, KeyError)):
        board.board.handle(message, os.dup(0))


def test_a_burst_lasts_as_long_as_told() -> None:
    now = 0.0
    pace = Pace({"bytes_per_second": 1000, "iops": 0, "burst_seconds": 2.0}, lambda: now)
    sent = 0
    while not pace.delay():
        pace.take(100)
        sent += 100
    assert sent == 2100
    now = 0.5
    assert not pace.delay()
    assert not Pace({}, lambda: now).limited
