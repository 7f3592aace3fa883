"""The console: ring, log and clients, with the guest's end played by the test."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from hypervisor.devices.console import ConsoleClient, ConsoleLog, ConsoleRing
from hypervisor.devices.console.client import BUFFER_MAX
from hypervisor.devices.console.ring import BURST, INPUT_MAX, RATE

IN_CONS, IN_PROD, OUT_CONS, OUT_PROD = range(768, 772)


class Guest:
    """A guest's hvc driver, and the host around the ring."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.page = bytearray(4096)
        self.index = memoryview(self.page).cast("I")
        self.page[3088] = 1
        self.now = 0.0
        self.notified = 0
        self.calls: list[tuple[float, Callable[[], None]]] = []
        self.ring = self.connect()

    def connect(self, state: dict[str, object] | None = None) -> ConsoleRing:
        log = ConsoleLog(self.path, 8192)
        self.ring = ConsoleRing(
            memoryview(self.page), self.notify, log, self.call_later, clock=lambda: self.now, state=state
        )
        self.run_calls()
        return self.ring

    def notify(self) -> None:
        self.notified += 1

    def call_later(self, seconds: float, function: Callable[[], None]) -> None:
        self.calls.append((seconds, function))

    def run_calls(self) -> None:
        due, self.calls = self.calls, []
        for _seconds, function in due:
            function()

    def put(self, data: bytes) -> bytes:
        """Print into the ring what fits; returns the rest."""
        room = 2048 - ((self.index[OUT_PROD] - self.index[OUT_CONS]) & 0xFFFF_FFFF)
        for byte in data[:room]:
            self.page[1024 + (self.index[OUT_PROD] & 2047)] = byte
            self.index[OUT_PROD] = (self.index[OUT_PROD] + 1) & 0xFFFF_FFFF
        return data[room:]

    def print(self, data: bytes) -> None:
        while data:
            data = self.put(data)
            self.ring.on_notify()

    def typed(self) -> bytes:
        data = b""
        while self.index[IN_CONS] != self.index[IN_PROD]:
            data += self.page[self.index[IN_CONS] & 1023 : (self.index[IN_CONS] & 1023) + 1]
            self.index[IN_CONS] = (self.index[IN_CONS] + 1) & 0xFFFF_FFFF
        self.ring.on_notify()
        return data


class Attached:
    def __init__(self, guest: Guest, history: int = 0) -> None:
        self.woken = 0
        self.room = 0
        self.client: ConsoleClient = guest.ring.attach(self.wake, self.space, history=history)

    def wake(self) -> None:
        self.woken += 1

    def space(self) -> None:
        self.room += 1

    def read(self) -> bytes:
        data = b""
        while part := self.client.take(1000):
            data += part
        return data


@pytest.fixture
def guest(tmp_path: Path) -> Guest:
    return Guest(tmp_path / "console.log")


def test_output_goes_to_the_log_and_every_client(guest: Guest) -> None:
    assert guest.page[3088] == 0  # XENCONSOLE_CONNECTED
    one, two = Attached(guest), Attached(guest)
    text = bytes(random.Random(1).randbytes(5000))
    guest.print(text)
    assert one.read() == two.read() == guest.ring.log.tail(10000) == text
    assert one.woken == 1
    assert guest.notified >= 3
    assert guest.index[OUT_CONS] == guest.index[OUT_PROD]


def test_a_new_client_gets_what_was_printed_before(guest: Guest) -> None:
    guest.print(b"booting\nlogin: ")
    late = Attached(guest, history=7)
    assert late.read() == b"login: "
    guest.print(b"x")
    assert late.read() == b"x"


def test_a_slow_client_loses_output_and_is_told(guest: Guest) -> None:
    slow, quick = Attached(guest), Attached(guest)
    total = b""
    for number in range(300):
        guest.now += 1.0
        part = b"%6d" % number * 200
        guest.print(part)
        total += part
        quick.read()
    assert slow.client.pending == BUFFER_MAX
    got = slow.read()
    assert len(got) < BUFFER_MAX + 200
    assert got[:BUFFER_MAX] == total[:BUFFER_MAX]
    assert f"[{len(total) - BUFFER_MAX} bytes of console output left out".encode() in got
    guest.print(b"after")
    assert slow.read() == b"after"
    assert guest.ring.log.tail(5) == b"after"


def test_a_detached_client_gets_nothing_more(guest: Guest) -> None:
    one = Attached(guest)
    guest.ring.detach(one.client)
    guest.ring.detach(one.client)
    guest.print(b"x")
    assert one.read() == b""
    assert one.client.send(b"typed") == 0
    assert guest.typed() == b""


def test_typing_reaches_the_guest(guest: Guest) -> None:
    one = Attached(guest)
    before = guest.notified
    assert one.client.send(b"ls\r") == 3
    assert guest.notified == before + 1
    assert guest.typed() == b"ls\r"


def test_typing_waits_for_room_and_is_bounded(guest: Guest) -> None:
    one = Attached(guest)
    text = bytes(random.Random(2).randbytes(10000))
    sent = one.client.send(text)
    assert sent == INPUT_MAX
    sent += one.client.send(text[sent:])
    assert sent == INPUT_MAX + 1024
    assert one.client.send(text[sent:]) == 0
    got = b""
    while len(got) < len(text):
        part = guest.typed()
        assert part
        got += part
        if one.room:
            one.room = 0
            sent += one.client.send(text[sent:])
    assert got == text


def test_a_guest_that_prints_without_end_is_slowed(guest: Guest) -> None:
    printed = 0
    while not guest.calls:
        guest.put(b"x" * 2048)
        guest.ring.on_notify()
        printed += 2048
    assert BURST <= printed <= BURST + 3 * 2048
    guest.ring.on_notify()
    ((seconds, _),) = guest.calls
    assert 0 < seconds <= 2 * 2048 / RATE
    assert guest.index[OUT_PROD] != guest.index[OUT_CONS]
    assert Attached(guest).client.send(b"^C") == 2  # typing still works
    guest.now += seconds
    guest.run_calls()
    assert guest.index[OUT_PROD] == guest.index[OUT_CONS]


@pytest.mark.parametrize(("at", "value"), [(OUT_PROD, 2049), (OUT_PROD, 2**31), (IN_CONS, 1), (IN_CONS, 2**31)])
def test_impossible_indices_stop_this_console_only(guest: Guest, at: int, value: int) -> None:
    one = Attached(guest)
    guest.index[at] = value
    one.client.send(b"x")
    guest.ring.on_notify()
    assert guest.ring.broken
    assert b"console stopped" in one.read()
    guest.ring.on_notify()
    assert one.client.send(b"x" * 10000) == 10000
    guest.ring.close()
    assert one.client.ended


def test_a_restart_goes_on(guest: Guest) -> None:
    one = Attached(guest)
    guest.print(b"before ")
    one.client.send(b"t" * 3000)
    state = json.loads(json.dumps(guest.ring.save()))
    guest.put(b"meanwhile ")  # nobody listens

    guest.connect(state)
    guest.print(b"after")
    assert guest.ring.log.tail(100) == b"before meanwhile after"
    assert guest.ring.save() == state
    got = b""
    while part := guest.typed():
        got += part
    assert got == b"t" * 3000
    assert guest.ring.save() == {"typed": ""}


def test_closing_takes_the_last_words_and_lets_the_page_go(guest: Guest) -> None:
    one = Attached(guest)
    guest.put(b"reboot: Power down\r\n")
    guest.ring.close()
    guest.ring.close()
    assert one.read() == b"reboot: Power down\r\n"
    assert one.client.ended and one.woken == 2
    assert guest.path.read_bytes() == b"reboot: Power down\r\n"
    guest.ring.on_notify()
    guest.run_calls()


def test_the_log_is_bounded_and_rotates(tmp_path: Path) -> None:
    path = tmp_path / "log"
    log = ConsoleLog(path, 4096, keep=2)
    text = b"".join(b"%7d\n" % number for number in range(5000))
    for at in range(0, len(text), 777):
        log.write(text[at : at + 777])
    assert sorted(os.listdir(tmp_path)) == ["log", "log.1", "log.2"]
    assert sum(p.stat().st_size for p in tmp_path.iterdir()) <= 3 * 4096
    assert log.tail(9000) == text[-9000:]
    assert log.tail(10) == text[-10:]
    assert text.endswith(log.tail(1 << 20))
    assert path.stat().st_mode & 0o777 == 0o600
    again = ConsoleLog(path, 4096, keep=2)
    again.write(b"more")
    assert again.tail(14) == text[-10:] + b"more"
    again.remove()
    assert os.listdir(tmp_path) == []


def test_a_log_without_old_files(tmp_path: Path) -> None:
    log = ConsoleLog(tmp_path / "log", 4096, keep=0)
    log.write(b"x" * 5000)
    assert log.tail(10000) == b"x" * 904
    assert os.listdir(tmp_path) == ["log"]


def test_a_full_disk_does_not_stop_the_guest(guest: Guest, monkeypatch: pytest.MonkeyPatch) -> None:
    one = Attached(guest)
    real = os.write

    def full(_fd: int, _data: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    guest.print(b"lost")
    monkeypatch.setattr(os, "write", real)
    guest.print(b"kept")
    assert one.read() == b"lostkept"
    assert guest.ring.log.tail(100) == b"kept"
    assert guest.ring.log.lost == 4


def test_a_log_that_cannot_be_rotated_loses_output_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = ConsoleLog(tmp_path / "log", 4096)

    def refuse(*_args: object) -> None:
        raise PermissionError(13, "no")

    monkeypatch.setattr(os, "replace", refuse)
    log.write(b"x" * 5000)
    assert log.lost == 904
    monkeypatch.undo()
    log.write(b"y")
    assert log.tail(2) == b"xy"


def test_a_link_in_the_logs_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / "log").symlink_to(tmp_path / "precious")
    with pytest.raises(OSError):
        ConsoleLog(tmp_path / "log")
    with pytest.raises(ValueError):
        ConsoleLog(tmp_path / "other", 10)


@pytest.mark.parametrize("seed", range(20))
def test_a_page_of_noise(tmp_path: Path, seed: int) -> None:
    noise = random.Random(seed)
    guest = Guest(tmp_path / "console.log")
    one = Attached(guest)
    for _ in range(50):
        at = noise.choice([IN_CONS, IN_PROD, OUT_CONS, OUT_PROD])
        guest.index[at] = noise.choice([noise.getrandbits(32), (guest.index[at] + noise.randrange(100)) & 0xFFFF_FFFF])
        guest.ring.on_notify()
        one.client.send(noise.randbytes(noise.randrange(100)))
        guest.run_calls()
    assert len(one.read()) <= BUFFER_MAX + 200
    guest.ring.close()
