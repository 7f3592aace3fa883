"""Pieces of driver processes: their loop, their log, when they are started again, what they may say."""

from __future__ import annotations

import itertools
import json
import os
import sys
from pathlib import Path

import pytest

from hypervisor.host import channel as channels
from hypervisor.host import driver_process
from hypervisor.host.driver_loop import EventLoop
from hypervisor.host.driver_process import BoundedLog, DriverOrder, DriverProcess
from hypervisor.host.drivers import FIRST_DELAY, GOOD_LIFE, LONGEST_DELAY, Backoff, numbers, parse_counters

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "support"))

import toy_device


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_the_loop_calls_in_order() -> None:
    clock, seen = Clock(), []
    loop = EventLoop(clock)
    reader, writer = os.pipe()
    loop.add_reader(reader, lambda: seen.append(os.read(reader, 10)))
    loop.on_activity = lambda: seen.append("active")
    loop.call_later(2.0, lambda: seen.append("late"))
    cancel = loop.call_later(1.0, lambda: seen.append("never"))
    loop.call_later(1.0, lambda: seen.append("soon"))
    loop.run_once(0)
    assert seen == []
    cancel()
    clock.now += 1
    os.write(writer, b"x")
    loop.call_soon(lambda: loop.call_soon(lambda: seen.append("next turn")))
    loop.run_once(0)
    assert seen == [b"x", "active", "soon"]
    loop.run_once(None)  # does not wait: there is work
    assert seen[3:] == ["next turn"]
    clock.now += 1
    loop.run_once(0)
    assert seen[4:] == ["late"]
    loop.remove_reader(reader)
    loop.remove_reader(reader)
    os.write(writer, b"y")
    loop.run_once(0)
    assert len(seen) == 5
    os.close(reader)
    os.close(writer)
    loop.close()


def test_a_reader_closed_by_its_owner_is_forgotten() -> None:
    loop = EventLoop()
    reader, writer = os.pipe()
    loop.add_reader(reader, lambda: None)
    os.close(reader)
    loop.remove_reader(reader)
    os.close(writer)
    loop.run_once(0)


def test_what_a_callback_raises_ends_the_loop() -> None:
    loop = EventLoop()

    def bad() -> None:
        raise KeyError("bug")

    loop.call_soon(bad)
    with pytest.raises(KeyError):
        loop.run()
    loop.call_soon(loop.stop)
    loop.run()


def test_backoff() -> None:
    clock = Clock()
    backoff = Backoff(clock)
    assert backoff.left() == 0
    backoff.started()
    clock.now += GOOD_LIFE
    backoff.ended()
    assert backoff.left() == 0, "one that lived is replaced at once"
    waits = []
    for _ in range(8):
        backoff.started()
        backoff.ended()
        waits.append(backoff.left())
        clock.now += backoff.left()
    assert waits[0] == pytest.approx(FIRST_DELAY) and waits[-1] == pytest.approx(LONGEST_DELAY)
    assert all(after >= before - 1e-9 for before, after in itertools.pairwise(waits))
    backoff.started()
    clock.now += LONGEST_DELAY + 0.1
    backoff.ended()
    assert backoff.left() == 0, "the time it lived counts"


def test_the_log_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[bytes] = []
    monkeypatch.setattr(driver_process.os, "write", lambda fd, data: written.append(data))
    log = BoundedLog(10)
    assert log.write("12345678") == 8 and log.write("abcdef") == 6 and log.write("more") == 4
    assert b"".join(written) == b"12345678ab"


@pytest.mark.parametrize("data", [None, [], {"x": {"a": 1}}, {"5": []}, {"5": {"a": "1", "b": True, "c": 1.5}}])
def test_counters_that_are_none(data: object) -> None:
    assert not any(parse_counters(data).values())


def test_counters() -> None:
    assert parse_counters({"51712": {"read_bytes": 3, "note": "x"}}) == {51712: {"read_bytes": 3}}
    assert len(numbers({f"n{i}": i for i in range(1000)})) <= 40


def test_an_order_crosses_the_channel() -> None:
    order = DriverOrder("u", 7, "disk", "module:Driver")
    assert DriverOrder.from_json(order.to_json()) == order


def test_noted_counters_are_of_the_device_that_is_served(tmp_path: Path) -> None:
    """A number is used again: who is killed before the next note must not leave an earlier device's counters."""
    near, far = channels.pair()
    noted = os.open(tmp_path / "stats", os.O_RDWR | os.O_CREAT)
    loop = EventLoop()
    process = DriverProcess(near, toy_device.NoLink(), loop, noted)
    process._driver = toy_device.ToyDriver(toy_device.NoLink(), loop, lambda *_: None)

    def tell(op: str, **fields: object) -> dict[str, object]:
        disk = [os.open(tmp_path / "disk", os.O_WRONLY | os.O_CREAT)] if op == "connect" else []
        answer = process._answer({"op": op, "devid": 51728, **fields}, disk)
        return {"answer": answer["result"], "noted": json.loads(os.pread(noted, 1000, 0))}

    config = {"frontend": {"ring": "1"}, "device": {}}
    assert tell("connect", config=config)["noted"] == {"51728": {"read_requests": 3}}
    process._driver.stats()[51728]["errors"] = 9
    assert tell("disconnect") == {"answer": {"stats": {"read_requests": 3, "errors": 9}}, "noted": {}}
    assert tell("connect", config=config)["noted"] == {"51728": {"read_requests": 3}}
    loop.close()
    os.close(noted)
    near.close()
    far.close()


class RecordingDriver:
    """What `hypervisor.devices.driver.Recording` asks for. :ivar said: what it was told, with descriptors' contents."""

    def __init__(self) -> None:
        self.said: list[tuple[object, ...]] = []

    def stats(self) -> dict[int, dict[str, int]]:
        return {}

    def track(self, devid: int, fd: int | None) -> None:
        self.said.append(("track", devid, fd if fd is None else self._content(fd)))

    def written(self, devid: int, fd: int) -> bool:
        self.said.append(("written", devid, self._content(fd)))
        return len(self.said) > 1

    def _content(self, fd: int) -> bytes:
        content = os.pread(fd, 10, 0)
        os.close(fd)
        return content


def test_what_was_written_is_asked_over_the_channel(tmp_path: Path) -> None:
    near, far = channels.pair()
    loop = EventLoop()
    process = DriverProcess(near, toy_device.NoLink(), loop, -1)
    record = tmp_path / "record"
    record.write_bytes(b"record")

    def tell(op: str, *, fds: int = 1, **fields: object) -> dict[str, object]:
        before = len(os.listdir("/proc/self/fd"))
        answer = process._answer({"op": op, "devid": 5, **fields}, [os.open(record, os.O_RDONLY) for _ in range(fds)])
        assert len(os.listdir("/proc/self/fd")) <= before, "a descriptor is left"
        return answer["result"]  # type: ignore[no-any-return]

    process._driver = toy_device.ToyDriver(toy_device.NoLink(), loop, lambda *_: None)
    assert tell("written") == tell("track") == {"broken": "this driver does not record what is written"}
    process._driver = driver = RecordingDriver()  # type: ignore[assignment]
    assert tell("written") == {"known": False} and tell("written") == {"known": True}
    assert tell("track") == tell("track", fds=0) == {}
    asked = ("written", 5, b"record")
    assert driver.said == [asked, asked, ("track", 5, b"record"), ("track", 5, None)]
    loop.close()
    near.close()
    far.close()


class CommittingDriver:
    """What `hypervisor.devices.driver.Committing` asks for. :ivar said: what it was told."""

    def __init__(self) -> None:
        self.said: list[tuple[object, ...]] = []

    def stats(self) -> dict[int, dict[str, int]]:
        return {3: {"tx_packets": 4}}

    def update(self, devid: int, device: object) -> None:
        self.said.append(("update", devid))

    def hold(self) -> None:
        self.said.append(("hold",))

    def boundary(self, number: int) -> None:
        self.said.append(("boundary", number))

    def release(self, number: int) -> None:
        self.said.append(("release", number))

    def let_out(self) -> None:
        self.said.append(("let_out",))

    def discard(self) -> None:
        self.said.append(("discard",))


class Still:
    """A driver process whose loop is run by the test, and the host's end of its channel."""

    def __init__(self) -> None:
        self.host, theirs = channels.pair()
        theirs.setblocking(False)
        self.loop, self.link = EventLoop(), toy_device.NoLink()
        self.process = DriverProcess(theirs, self.link, self.loop, os.memfd_create("stats"))
        self.driver = CommittingDriver()
        self.process._driver = self.driver  # type: ignore[assignment]
        self.loop.add_reader(theirs.fileno(), self.process._one_message)
        self.rung, self.bell = os.pipe()
        self.loop.add_reader(self.rung, lambda: self.driver.said.append(("rung", os.read(self.rung, 1))))

    def tell(self, *ops: str, **fields: object) -> None:
        for number, op in enumerate(ops):
            self.host.send({"id": number, "op": op, **fields})

    def answers(self, count: int) -> list[tuple[object, object]]:
        said = [self.host.receive()[0] for _ in range(count)]
        return [(one["id"], one["result"]) for one in said]


def test_a_driver_that_stands_still_serves_nothing_until_it_goes_on() -> None:
    still = Still()
    os.write(still.bell, b"x")
    still.tell("hold")
    still.tell("boundary", epoch=4, still=True)
    still.tell("update", devid=3, device={})
    still.tell("go_on")
    seen = still.driver.said
    while len(seen) < 4:
        still.loop.run_once(1.0)
    assert sorted(map(str, seen[:2])) == sorted(map(str, [("hold",), ("rung", b"x")]))
    assert seen[2:] == [("boundary", 4), ("update", 3)]
    stats = {"stats": {"3": {"tx_packets": 4}}}
    assert still.answers(4) == [(0, {}), (0, stats), (0, {}), (0, {})], "what was put off is answered"


@pytest.mark.parametrize("end", ["host", "quit", "guest"])
def test_a_driver_does_not_stand_still_for_ever(end: str) -> None:
    still = Still()
    still.tell("boundary", epoch=1, still=True)
    if end == "quit":
        still.tell("quit")
    elif end == "host":
        still.host.close()
    else:
        still.link.alive = lambda: False  # type: ignore[method-assign]
        still.link._far.close()
    still.loop.run_once(1.0)
    assert still.driver.said == [("boundary", 1)]
    os.write(still.bell, b"x")
    still.loop.run_once(1.0)
    assert still.driver.said[1:] == [("rung", b"x")]


def test_what_is_kept_back_is_given_away_over_the_channel() -> None:
    still = Still()
    still.tell("hold")
    still.tell("boundary", epoch=1, still=False)
    still.tell("release", epoch=1)
    still.tell("discard", "let_out")
    for _ in range(5):
        still.loop.run_once(1.0)
    wanted = [("hold",), ("boundary", 1), ("release", 1), ("discard",), ("let_out",)]
    assert still.driver.said == wanted
    still.process._driver = toy_device.ToyDriver(still.link, still.loop, lambda *_: None)
    still.tell("hold", "boundary", "release", epoch=1)
    for _ in range(3):
        still.loop.run_once(1.0)
    assert still.answers(8)[5:] == [(0, {}), (1, {"stats": {}}), (2, {})], (
        "a driver that sends nothing out has no part in it"
    )
