"""The state on disk: whatever moment the process ends at, a guest goes on as if nothing had been."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hypervisor.xenstore import journal as journal_module
from hypervisor.xenstore.handle import Handle
from hypervisor.xenstore.journal import StateDamaged, load, open_server, replay
from hypervisor.xenstore.records import Record
from hypervisor.xenstore.ring import XenstoreRing
from hypervisor.xenstore.server import Server
from hypervisor.xenstore.wire import Op, Packet, Parser

REQ_CONS, REQ_PROD, RSP_CONS, RSP_PROD = range(512, 516)


class Killed(BaseException):
    """The process ends here."""


class Host:
    """Memory that outlives the host process (the page), and host processes that come and go."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.page = bytearray(4096)
        self.index = memoryview(self.page).cast("I")
        self.parser = Parser()
        self.calls: list[Callable[[], None]] = []
        self.notify: Callable[[], None] = lambda: None
        self.boot()

    def boot(self) -> None:
        self.server = open_server(self.path)
        self.handle = Handle(self.server)
        self.calls = []
        self.ring: XenstoreRing | None = None
        if not self.handle.exists("/local/domain/5"):
            self.handle.write("/local/domain/5", "")
            self.handle.set_perms("/local/domain/5", "n5")
        self.ring = XenstoreRing(self.server, 5, memoryview(self.page), lambda: self.notify(), self.later)

    def later(self, _seconds: float, function: Callable[[], None]) -> None:
        self.calls.append(function)

    def turn(self) -> None:
        assert self.ring is not None
        self.ring.on_notify()
        while self.calls:
            due, self.calls = self.calls, []
            for function in due:
                function()

    def put(self, data: bytes) -> bytes:
        """Into the ring what fits; returns the rest."""
        room = 1024 - ((self.index[REQ_PROD] - self.index[REQ_CONS]) & 0xFFFF_FFFF)
        for byte in data[:room]:
            self.page[self.index[REQ_PROD] & 1023] = byte
            self.index[REQ_PROD] += 1
        return data[room:]

    def take(self) -> list[Packet]:
        count = self.index[RSP_PROD] - self.index[RSP_CONS]
        start = self.index[RSP_CONS]
        self.parser.feed(bytes(self.page[1024 + ((start + i) & 1023)] for i in range(count)))
        self.index[RSP_CONS] += count
        packets = []
        while (packet := self.parser.next()) is not None:
            packets.append(packet)
        return packets


def test_everything_is_there_after_a_restart(tmp_path: Path) -> None:
    host = Host(tmp_path / "state")
    host.put(Packet(Op.WATCH, 1, 0, b"control/shutdown\0tok\0").encode())
    host.turn()
    host.handle.write("/x/y", "value")
    host.handle.set_perms("/x/y", "n0,r5")
    host.server.set_target(5, 5)
    host.server.domain_shutdown(5)
    before = host.server.save()
    assert len(host.take()) == 2

    host.boot()
    assert host.server.save()["store"] == before["store"]
    assert host.server.save()["domains"] == before["domains"]
    host.turn()
    assert host.take() == []
    host.handle.write("/local/domain/5/control/shutdown", "poweroff")
    assert [p.payload for p in host.take()] == [b"control/shutdown\0tok\0"]


def test_a_guest_is_woken_after_a_restart(tmp_path: Path) -> None:
    """The event that told of the last change of the ring may have been lost with the process before."""
    host = Host(tmp_path / "state")
    rung: list[int] = []
    host.notify = lambda: rung.append(1)
    host.boot()
    assert rung


def test_quotas_that_were_set_are_kept(tmp_path: Path) -> None:
    server = open_server(tmp_path / "state")
    server.set_quota("watches", 7)
    server.settle()
    for _ in range(2):
        server = open_server(tmp_path / "state")
        assert server.limits.watches == 7


def test_a_transaction_across_a_restart_ends_in_eagain(tmp_path: Path) -> None:
    host = Host(tmp_path / "state")
    host.put(Packet(Op.TRANSACTION_START, 1, 0, b"\0").encode())
    host.turn()
    ident = int(host.take()[0].payload[:-1])
    host.put(Packet(Op.WRITE, 2, ident, b"a\0one").encode())
    host.turn()
    host.take()
    host.boot()
    for op, payload, expected in (
        (Op.WRITE, b"b\0two", b"OK\0"),
        (Op.READ, b"b\0", b"two"),
        (Op.TRANSACTION_END, b"T\0", b"EAGAIN\0"),
        (Op.TRANSACTION_END, b"T\0", b"ENOENT\0"),
    ):
        host.put(Packet(op, 3, ident, payload).encode())
        host.turn()
        assert [p.payload for p in host.take()] == [expected]
    assert host.handle.read("/local/domain/5/b") is None
    host.put(Packet(Op.TRANSACTION_START, 4, 0, b"\0").encode())
    host.turn()
    assert host.take()[0].payload != b"%d\0" % ident


@pytest.mark.parametrize("seed", range(12))
def test_killed_at_any_record_each_request_happens_once(tmp_path: Path, monkeypatch, seed: int) -> None:
    """Dies before, after and in the middle of writing a record, and between filling the ring and what follows."""
    chance = random.Random(seed)
    real = journal_module._write_all

    def deadly(fd: int, data: bytes) -> None:
        fate = chance.randrange(12)
        if fate == 0:
            raise Killed
        if fate == 1:
            os.write(fd, data[: chance.randrange(len(data))])
            raise Killed
        real(fd, data)
        if fate == 2:
            raise Killed

    def deadly_notify() -> None:
        if chance.randrange(12) == 0:
            raise Killed

    host = Host(tmp_path / "state")
    monkeypatch.setattr(journal_module, "COMPACT_AT", 2000)
    monkeypatch.setattr(journal_module, "NODES_PER_STEP", 1)
    # Each answer tells whether a request was lost, repeated or answered twice: removal and creation alternate.
    wanted: list[bytes] = []
    stream = b""
    for number in range(60):
        value = b"%d " % number * chance.choice([1, 1, 200])
        stream += Packet(Op.WRITE, 2 * number, 0, b"a\0" + value).encode()
        stream += Packet(Op.READ, 2 * number + 1, 0, b"a\0").encode()
        wanted += [b"OK\0", value]
    got: list[Packet] = []
    deaths = 0
    monkeypatch.setattr(journal_module, "_write_all", deadly)
    host.notify = deadly_notify
    for _ in range(5000):
        if len(got) == len(wanted):
            break
        try:
            stream = host.put(stream)
            host.turn()
            got += host.take()
        except Killed:
            deaths += 1
            monkeypatch.setattr(journal_module, "_write_all", real)
            host.notify = lambda: None
            host.boot()
            host.notify = deadly_notify
            monkeypatch.setattr(journal_module, "_write_all", deadly)
    assert [p.req_id for p in got] == list(range(120))
    assert [p.payload for p in got] == wanted
    assert deaths > 5


@pytest.mark.parametrize("same_process", [True, False])
def test_a_ring_that_lets_go_is_followed_by_another(tmp_path: Path, same_process: bool) -> None:
    host = Host(tmp_path / "state")
    host.handle.write("/local/domain/5/big", "x" * 900)
    host.put(Packet(Op.READ, 1, 0, b"big\0").encode() * 3)
    host.turn()  # one and a part of the replies are in the ring
    assert host.ring is not None
    host.ring.close()
    assert host.server.journal is not None
    host.server.journal.compact()  # type: ignore[attr-defined]
    host.handle.write("/local/domain/5/other", "y")
    if same_process:
        host.ring = XenstoreRing(host.server, 5, memoryview(host.page), lambda: None, host.later)
    else:
        host.boot()
    got = host.take()
    for _ in range(3):
        host.turn()
        got += host.take()
    assert [(p.req_id, p.payload) for p in got] == [(1, b"x" * 900)] * 3


class Recorder:
    def __init__(self) -> None:
        self.state: dict[str, Any] = {}

    def append(self, records: list[Record]) -> None:
        replay(self.state, json.loads(json.dumps(records)))


@pytest.mark.parametrize("seed", range(5))
def test_snapshot_and_records_say_the_same(make_world, seed: int) -> None:
    recorder = Recorder()
    recorder.state = Server().save()
    world = make_world(journal=recorder)
    chance = random.Random(seed)
    clients = [world.domain(d) for d in (0, 5, 6)]
    for _ in range(300):
        client = chance.choice(clients)
        client.reading = chance.random() < 0.9
        name = chance.choice([b"a", b"b", b"a/b", b"/local/domain/5/a"])
        op, payload = chance.choice(
            [
                (Op.WRITE, name + b"\0v\xff"),
                (Op.RM, name + b"\0"),
                (Op.WATCH, name + b"\0t\0"),
                (Op.UNWATCH, name + b"\0t\0"),
                (Op.TRANSACTION_START, b"\0"),
                (Op.TRANSACTION_END, b"T\0"),
                (Op.RESET_WATCHES, b"\0"),
                (Op.SET_PERMS, name + b"\0n5\0r6\0"),
            ]
        )
        tx = chance.choice([0, *client.conn.transactions])
        client.send(op, payload, 0 if op == Op.TRANSACTION_START else tx)
    saved = world.server.save()
    for state in (saved, recorder.state):
        for domain in state["domains"].values():
            domain.pop("out")  # what was read is only known from the ring
            domain.pop("positions")
            domain["watches"].sort()
            domain["transactions"].sort()
        state["store"].pop("generation")
    assert recorder.state == saved


def test_save_and_restore_round_trip(world) -> None:
    domain = world.domain(5)
    domain.ask(Op.WATCH, b"a\0t\xff\0" + b"2\0")
    domain.ask(Op.WRITE, b"a\0\x00\xff")
    domain.start()
    domain.reading = False
    domain.send(Op.READ, b"a\0")
    saved = json.loads(json.dumps(world.server.save()))
    again = Server.restore(saved)
    assert again.save() == saved


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "no complete line"),
        (b"{}\n", "no snapshot"),
        (b"[]\n", "no snapshot"),
        (b'{"version":99}\n', "no snapshot"),
        (b"\xff\n", "makes no sense"),
        (b'{"version":1}\n', "makes no sense"),
        (b'{"version":1,"store":{"generation":1,"nodes":{"/a/b":["","n0",1]}},"domains":{}}\n', "makes no sense"),
        (b'{"version":1,"store":{"generation":1,"nodes":{"/":["","z",1]}},"domains":{}}\n', "makes no sense"),
        (b'{"version":1,"store":{},"domains":{}}\n[["n","/a",["","n0",1]]]\n', "makes no sense"),
    ],
)
def test_a_damaged_file_is_told_of_and_left_alone(tmp_path: Path, content: bytes, why: str) -> None:
    path = tmp_path / "state"
    path.write_bytes(content)
    with pytest.raises(StateDamaged, match=why) as caught:
        open_server(path)
    assert str(path) in str(caught.value) and "move the file away" in str(caught.value)
    assert path.read_bytes() == content


def test_a_torn_last_record_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "state"
    handle = Handle(open_server(path))
    handle.write("/a", "1")
    with path.open("ab") as file:
        file.write(b'[["n","/a",["2","n0"')
    assert Handle(open_server(path)).read("/a") == "1"


def test_the_file_stays_small(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(journal_module, "COMPACT_AT", 4096)
    path = tmp_path / "state"
    handle = Handle(open_server(path))
    for number in range(500):
        handle.write("/a", str(number))
    assert path.stat().st_size < 12000
    assert path.stat().st_mode & 0o777 == 0o600
    state = load(path)
    assert state is not None and state["store"]["nodes"]["/a"][0] == "499"


def test_no_step_waits_for_all_of_a_large_store(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "state"
    server = open_server(path)
    handle = Handle(server)
    for number in range(2000):
        handle.write(f"/n/{number}", "x" * 500)
    whole = len(json.dumps(server.save()))
    written: list[int] = []
    real = journal_module._write_all

    def counting(fd: int, data: bytes) -> None:
        written[-1] += len(data)
        real(fd, data)

    monkeypatch.setattr(journal_module, "_write_all", counting)
    inode = path.stat().st_ino
    for number in range(20000):
        written.append(0)
        # The file is written anew under changes of what is written already, and of what is not yet.
        handle.write(f"/n/{number * 7 % 2000}", f"{number} " * 80)
        if number % 50 == 0:
            handle.remove(f"/n/{number * 3 % 2000}")
        if path.stat().st_ino != inode:
            break
    else:
        pytest.fail("the file was never made anew")
    assert max(written) < whole / 10
    assert load(path) == json.loads(json.dumps(server.save()))
    assert not path.with_name("state.new").exists()


def test_a_new_file_that_cannot_be_written_is_given_up(tmp_path: Path, monkeypatch, caplog) -> None:
    monkeypatch.setattr(journal_module, "COMPACT_AT", 4096)
    path = tmp_path / "state"
    server = open_server(path)
    handle = Handle(server)
    real = journal_module._write_all
    fds = len(os.listdir("/proc/self/fd"))

    def full(fd: int, data: bytes) -> None:
        if os.readlink(f"/proc/self/fd/{fd}").endswith(".new"):
            raise OSError(28, "No space left on device")
        real(fd, data)

    monkeypatch.setattr(journal_module, "_write_all", full)
    for number in range(300):
        handle.write("/a", str(number))
    assert "is not made smaller" in caplog.text and "cannot be kept" not in caplog.text
    assert len(os.listdir("/proc/self/fd")) <= fds
    assert Handle(open_server_elsewhere(path, tmp_path, monkeypatch, real)).read("/a") == "299"


def open_server_elsewhere(path: Path, folder: Path, monkeypatch: Any, write: Any) -> Server:
    """What the file says, without touching it."""
    monkeypatch.setattr(journal_module, "_write_all", write)
    copy = folder / "copy"
    copy.write_bytes(path.read_bytes())
    return open_server(copy)


def test_a_full_disk_stops_nobody_and_is_made_good(tmp_path: Path, monkeypatch, caplog) -> None:
    path = tmp_path / "state"
    handle = Handle(open_server(path))
    real = journal_module._write_all

    def full(fd: int, data: bytes) -> None:
        os.write(fd, data[:3])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(journal_module, "_write_all", full)
    handle.write("/a", "1")
    handle.write("/a", "2")
    assert handle.read("/a") == "2"
    assert caplog.text.count("cannot be kept") == 1
    monkeypatch.setattr(journal_module, "_write_all", real)
    handle.write("/b", "3")
    again = Handle(open_server(path))
    assert (again.read("/a"), again.read("/b")) == ("2", "3")
