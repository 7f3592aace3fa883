"""A domain's part of xenstored goes to another host; the guest sees the ring it knows."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hypervisor.xenstore import moving
from hypervisor.xenstore.errors import Invalid
from hypervisor.xenstore.handle import Handle
from hypervisor.xenstore.journal import load, open_server
from hypervisor.xenstore.ring import XenstoreRing
from hypervisor.xenstore.wire import Op, Packet, Parser

UUID = "00000000-0000-4000-8000-000000000007"
REQ_CONS, REQ_PROD, RSP_CONS, RSP_PROD = range(512, 516)
BACKEND = "/local/domain/0/backend/vbd/7/51712"


class Guest:
    """A page that goes along."""

    def __init__(self) -> None:
        self.page = bytearray(4096)
        self.index = memoryview(self.page).cast("I")
        self.parser = Parser()

    def send(self, op: int, payload: bytes, tx: int = 0, *, upto: int | None = None, skip: int = 0) -> None:
        for byte in Packet(op, 9, tx, payload).encode()[skip:upto]:
            self.page[self.index[REQ_PROD] & 1023] = byte
            self.index[REQ_PROD] += 1

    def read(self) -> list[tuple[int, bytes]]:
        count, start = self.index[RSP_PROD] - self.index[RSP_CONS], self.index[RSP_CONS]
        self.parser.feed(bytes(self.page[1024 + ((start + i) & 1023)] for i in range(count)))
        self.index[RSP_CONS] += count
        found = []
        while (packet := self.parser.next()) is not None:
            found.append((packet.type, packet.payload))
        return found


class Host:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.server = open_server(path)
        self.handle = Handle(self.server)
        self.calls: list[Callable[[], None]] = []
        if not self.handle.exists("/local/domain/0/backend"):
            self.handle.write("/local/domain/0/backend", "")

    def serve(self, guest: Guest) -> XenstoreRing:
        later = lambda _seconds, function: self.calls.append(function)  # noqa: E731
        self.ring = XenstoreRing(self.server, 7, memoryview(guest.page), lambda: None, later)
        return self.ring

    def turn(self) -> None:
        self.ring.on_notify()
        while self.calls:
            due, self.calls = self.calls, []
            for function in due:
                function()


def lay_out(host: Host) -> None:
    write = host.handle.write
    for path, value, perms in (
        ("/local/domain/7", "", "n0,r7"),
        ("/local/domain/7/data", "", "n7"),
        ("/local/domain/7/shared", "yes", "n7,r12,b0"),
        (f"/vm/{UUID}", "", "n0,r7"),
        (f"/vm/{UUID}/name", "web", "n0,r7"),
        (f"{BACKEND}/state", "4", "n0,r7"),
        ("/local/domain/8/own", "not theirs", "n8"),
    ):
        write(path, value)
        host.handle.set_perms(path, perms)


@pytest.fixture
def hosts(tmp_path: Path) -> tuple[Host, Host, Guest]:
    here, there = Host(tmp_path / "here"), Host(tmp_path / "there")
    lay_out(here)
    guest = Guest()
    here.serve(guest)
    here.turn()
    return here, there, guest


def given(here: Host) -> dict[str, Any]:
    here.ring.close()
    data: dict[str, Any] = json.loads(json.dumps(moving.give(here.server, 7, UUID)))
    return data


def test_nodes_watches_half_requests_and_unread_output_go_along(hosts: tuple[Host, Host, Guest]) -> None:
    here, there, guest = hosts
    guest.send(Op.WATCH, b"data\0tok\0")
    guest.send(Op.WATCH, b"/local/domain/7/shared\0abs\0")
    guest.send(Op.TRANSACTION_START, b"\0")
    here.turn()
    replies = guest.read()
    tx = int(dict(replies)[Op.TRANSACTION_START][:-1])
    # Output that does not fit into the ring, and a request of which the first half is there.
    here.handle.write("/local/domain/7/data/long", "x" * 800)
    guest.send(Op.READ, b"data/long\0")
    guest.send(Op.READ, b"data/long\0")
    guest.send(Op.READ, b"shared\0", upto=18)
    here.turn()
    data = given(here)
    assert data["connection"]["out"] and data["connection"]["in"]
    moving.take(there.server, 7, UUID, data)
    there.serve(guest)
    seen: list[tuple[int, bytes]] = []
    for _ in range(4):
        there.turn()
        seen += guest.read()
    assert [kind for kind, _ in seen] == [Op.WATCH_EVENT, Op.READ, Op.READ]
    guest.send(Op.READ, b"shared\0", skip=18)
    there.turn()
    assert guest.read() == [(Op.READ, b"yes")]
    there.handle.write("/local/domain/7/data", "news")
    assert guest.read() == [(Op.WATCH_EVENT, b"data\0tok\0")]
    guest.send(Op.TRANSACTION_END, b"T\0", tx)
    there.turn()
    assert guest.read() == [(Op.ERROR, b"EAGAIN\0")]
    assert there.handle.read(f"{BACKEND}/state") == "4" and there.handle.read(f"/vm/{UUID}/name") == "web"
    assert there.handle.perms("/local/domain/7/shared") == "n7,b0", "who has that number there is another domain"
    assert there.handle.read("/local/domain/8/own") is None


def test_what_changes_after_the_nodes_went_ahead_comes_with_the_rest(hosts: tuple[Host, Host, Guest]) -> None:
    here, there, guest = hosts
    known = moving.Given()

    def ahead() -> moving.Nodes:
        nodes: moving.Nodes = json.loads(json.dumps(moving.give_nodes(here.server, 7, UUID, known)))
        return nodes

    here.handle.write("/local/domain/7/data/old/leaf", "x")
    here.handle.write("/local/domain/7/data/again/leaf", "x")
    first = ahead()
    moving.take_nodes(there.server, 7, UUID, first)
    assert there.handle.read("/local/domain/7/data/old/leaf") == "x"
    assert there.handle.read(f"{BACKEND}/state") == "4"
    here.handle.remove("/local/domain/7/data/old")
    here.handle.remove("/local/domain/7/data/again")
    here.handle.write("/local/domain/7/data/again", "made anew")
    here.handle.write("/local/domain/7/data/new/leaf", "y")
    here.handle.write(f"{BACKEND}/state", "5")
    here.handle.set_perms("/local/domain/7/shared", "n0,r7")
    here.ring.close()
    data: dict[str, Any] = json.loads(json.dumps(moving.give(here.server, 7, UUID, known)))
    assert {path for path, *_ in data["nodes"]} < {path for path, *_ in first} | {
        "/local/domain/7/data/new",
        "/local/domain/7/data/new/leaf",
    }
    moving.take(there.server, 7, UUID, data)
    there.serve(guest)
    there.ring.close()
    assert moving.give(there.server, 7, UUID) == moving.give(here.server, 7, UUID)
    moving.forget(there.server, 7, UUID)
    assert there.handle.read("/local/domain/7/data") is None


def test_changes_are_taken_again_and_again_while_it_is_elsewhere(hosts: tuple[Host, Host, Guest]) -> None:
    here, there, guest = hosts
    known = moving.Given()
    moving.take_nodes(there.server, 7, UUID, json.loads(json.dumps(moving.give_nodes(here.server, 7, UUID, known))))
    data: dict[str, Any] = {}
    for number in range(3):
        here.handle.write(f"/local/domain/7/data/{number}", "x")
        here.handle.remove(f"/local/domain/7/data/{number - 1}")
        here.ring.close()
        data = moving.take_changes(
            there.server, 7, UUID, json.loads(json.dumps(moving.give(here.server, 7, UUID, known)))
        )
        here.serve(guest)
        assert (data["nodes"], data["gone"]) == ([], [])
        assert there.handle.read(f"/local/domain/7/data/{number}") == "x"
        assert there.handle.read(f"/local/domain/7/data/{number - 1}") is None
    for bad in (
        {"nodes": data["nodes"]},
        {**data, "gone": ["/local/domain/8/own"]},
        {**data, "nodes": [["/x", "", ""]]},
    ):
        with pytest.raises(Invalid):
            moving.take_changes(there.server, 7, UUID, bad)
    moving.take(there.server, 7, UUID, data)
    here.ring.close()
    there.serve(guest)
    there.ring.close()
    assert moving.give(there.server, 7, UUID)["nodes"] == moving.give(here.server, 7, UUID)["nodes"]
    with pytest.raises(Invalid):
        moving.take_changes(there.server, 7, UUID, data)


@pytest.mark.parametrize("gone", [["/local/domain/8/own"], ["/local/domain/7//x"], ["/local"], [7], None])
def test_only_what_is_its_own_can_be_said_to_be_gone(hosts: tuple[Host, Host, Guest], gone: Any) -> None:
    here, there, _ = hosts
    there.handle.write("/local/domain/8/own", "theirs")
    data = {**given(here), "gone": gone}
    before = there.server.save()
    with pytest.raises(Invalid):
        moving.take(there.server, 7, UUID, data)
    assert there.server.save() == before


def test_nodes_of_who_is_there_already_are_not_touched(hosts: tuple[Host, Host, Guest]) -> None:
    here, _, _ = hosts
    nodes = moving.give_nodes(here.server, 7, UUID, moving.Given())
    before = here.server.save()
    with pytest.raises(Invalid):
        moving.take_nodes(here.server, 7, UUID, nodes)
    for bad in (None, [["/local/domain/8", "", "n0"]], [*nodes, nodes[0]]):
        with pytest.raises(Invalid):
            moving.take_nodes(here.server, 7, UUID, bad)
    assert here.server.save() == before


def test_a_killed_target_knows_what_it_had_taken(hosts: tuple[Host, Host, Guest]) -> None:
    here, there, guest = hosts
    guest.send(Op.WATCH, b"data\0tok\0")
    here.turn()
    moving.take(there.server, 7, UUID, given(here))
    before = there.server.save()
    again = Host(there.path)
    assert again.server.save() == before == load(there.path)
    again.serve(guest)
    again.turn()
    guest.read()
    again.handle.write("/local/domain/7/data", "1")
    assert guest.read() == [(Op.WATCH_EVENT, b"data\0tok\0")]


def test_there_and_back(hosts: tuple[Host, Host, Guest]) -> None:
    here, there, guest = hosts
    first = given(here)
    moving.take(there.server, 7, UUID, first)
    there.serve(guest)
    there.turn()
    here.server.release(7)
    for home in ("/local/domain/7", f"/vm/{UUID}", "/local/domain/0/backend/vbd/7"):
        here.handle.remove(home)
    moving.take(here.server, 7, UUID, given(there))
    here.serve(guest)
    here.turn()
    assert given(here) == first


def test_who_is_there_already_is_not_touched(hosts: tuple[Host, Host, Guest]) -> None:
    here, _, guest = hosts
    data = given(here)
    here.serve(guest)
    before = here.server.save()
    with pytest.raises(Invalid):
        moving.take(here.server, 7, UUID, data)
    assert here.server.save() == before


def change(data: dict[str, Any], where: str, value: Any) -> None:
    part: Any = data
    *way, last = where.split(".")
    for name in way:
        part = part[int(name)] if isinstance(part, list) else part[name]
    if isinstance(part, list):
        part[int(last)] = value
    else:
        part[last] = value


@pytest.mark.parametrize(
    ("where", "value"),
    [
        ("nodes.0.0", "/local/domain/8"),
        ("nodes.1.0", "/local/domain/77/x"),
        ("nodes.1.0", "/vm/other"),
        ("nodes.1.0", "/local/domain/0/backend/vbd/70/1"),
        ("nodes.1.0", "/local/domain/0/backend/vbd"),
        ("nodes.1.0", "/local/domain/7/a/b"),
        ("nodes.1.0", "/local/domain/7/a/7"),
        ("nodes.1.0", "/local/domain/7//a"),
        ("nodes.1.0", "@releaseDomain"),
        ("nodes.1.0", "/local/domain/7/\u20ac"),
        ("nodes.1.1", "x" * 5000),
        ("nodes.1.1", "\u20ac"),
        ("nodes.1.2", "n8"),
        ("nodes.1.2", "n7,r8"),
        ("nodes.1.2", "nonsense"),
        ("nodes.1.2", "n7,r7,r7,r7,r7,r7"),
        ("nodes.1", ["/local/domain/7"]),
        ("nodes.1", ["/local/domain/7", "", "n7"]),
        ("nodes", None),
        ("connection.watches", [["/a", "t", 0, -1]] * 129),
        ("connection.watches", [["relative", "t", 0, -1]]),
        ("connection.watches", [["/a", "t", 3, -1]]),
        ("connection.watches", [["/a", "t" * 5000, 0, -1]]),
        ("connection.watches", [["/a", "\u20ac", 0, -1]]),
        ("connection.out", [["x" * 16, False]] * 40),
        ("connection.out", [["x" * 5000, False]]),
        ("connection.out", [["x" * 3000, True]] * 30),
        ("connection.in", "x" * 5000),
        ("connection.positions", [1]),
        ("connection.positions", "xy"),
        ("connection.transactions", list(range(100))),
        ("connection", []),
    ],
)
def test_what_makes_no_sense_changes_nothing(hosts: tuple[Host, Host, Guest], where: str, value: Any) -> None:
    here, there, _ = hosts
    data = copy.deepcopy(given(here))
    change(data, where, value)
    before = there.server.save()
    with pytest.raises(Invalid):
        moving.take(there.server, 7, UUID, data)
    assert there.server.save() == before
