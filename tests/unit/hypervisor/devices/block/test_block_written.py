"""The record of what was written: bits, whose they are, and a driver that is killed or replaced."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from blkfront import PAGE, SECTOR, Front, Rig
from hypothesis import given
from hypothesis import strategies as st

from hypervisor.devices.block.image.base import Action, Operation
from hypervisor.devices.block.image.raw import RawImage
from hypervisor.devices.block.written import LARGEST, SMALLEST, Written, clear_bits, cluster_of, runs, set_bits
from hypervisor.devices.driver import DeviceBroken

WRITE, FLUSH = 1, 3
DEVID = 51712


@pytest.fixture
def record() -> Iterator[Written]:
    made = Written.create(64 * PAGE)
    yield made
    made.close()


def clusters(bits: bytes) -> set[int]:
    return {number for first, end in runs(bits) for number in range(first, end)}


@given(st.lists(st.tuples(st.integers(0, 20000), st.integers(0, 9000), st.booleans()), max_size=12))
def test_bits_are_those_of_a_set(changes: list[tuple[int, int, bool]]) -> None:
    bits, expected = bytearray(29001 // 8 + 1), set()
    for first, length, on in changes:
        (set_bits if on else clear_bits)(bits, first, first + length)
        touched = set(range(first, first + length))
        expected = expected | touched if on else expected - touched
    assert clusters(bytes(bits)) == expected
    at = 7777
    assert {n for first, end in runs(bits, at) for n in range(first, end)} == {n for n in expected if n >= at}


def test_clusters_grow_with_the_disk() -> None:
    assert cluster_of(1 << 30) == cluster_of(128 << 30) == SMALLEST
    assert cluster_of(1 << 40) == 1 << 15
    assert cluster_of(1 << 44) == LARGEST


def test_what_is_moved_is_collected_once(record: Written) -> None:
    record.mark(PAGE - 1, 2)
    record.mark(63 * PAGE, 1 << 40)
    record.mark(5 * PAGE, 0)
    assert clusters(record.collect()) == set()
    assert record.recorded() == 3
    record.move()
    record.mark(PAGE, 1)
    assert clusters(record.peek()) == {0, 1, 63}
    assert clusters(record.collect()) == {0, 1, 63}
    assert clusters(record.peek()) == {1}


def test_both_ends_see_the_same(record: Written) -> None:
    other = Written.attach(os.dup(record.fd))
    other.mark(9 * PAGE, 1)
    other.move()
    assert other.ident == record.ident and clusters(record.collect()) == {9}
    other.close()


@pytest.mark.parametrize("content", [b"", b"x" * PAGE, b"reevewrt" + bytes(PAGE * 3)])
def test_what_is_no_record_is_refused(content: bytes) -> None:
    fd = os.memfd_create("x")
    os.write(fd, content)
    with pytest.raises(ValueError, match="no record"):
        Written.attach(fd)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def test_a_record_cannot_be_cut_off(record: Written) -> None:
    with pytest.raises(PermissionError):
        os.ftruncate(record.fd, PAGE)


def test_zeroes_leave_a_hole_and_the_size(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"x" * 3 * 65536)
    image = RawImage(os.open(path, os.O_RDWR))
    operation = Operation(Action.ZERO, 65536, 65536)
    image.run([operation])
    image.close()
    assert not operation.error and path.read_bytes() == b"x" * 65536 + bytes(65536) + b"x" * 65536


# -- in a driver


def write(rig: Rig, front: Front, sector: int) -> None:
    front.request(WRITE, sector, [(rig.guest.grant(rig.guest.new_frame(b"w" * PAGE)), 0, 7)])


def taken(rig: Rig, record: Written) -> set[int] | None:
    known = rig.driver.written(DEVID, os.dup(record.fd))
    found = clusters(record.collect())
    return found if known else None


def test_a_driver_records_writes_and_discards(rig: Rig, record: Written) -> None:
    front = Front(rig.guest)
    rig.connect(front)
    write(rig, front, 0)
    rig.loop.run()
    assert taken(rig, record) is None, "what was written before is not known"
    write(rig, front, 8)
    front.discard(8 * 20, 16)
    front.request(FLUSH, 0)
    front.request(0, 80, [(rig.guest.grant(), 0, 7)])
    rig.loop.run()
    assert taken(rig, record) == {1, 20, 21}
    assert taken(rig, record) == set()
    rig.driver.track(DEVID, None)
    write(rig, front, 16)
    rig.loop.run()
    assert record.recorded() == 0


def test_another_record_begins_anew(rig: Rig, record: Written) -> None:
    front = Front(rig.guest)
    rig.connect(front)
    rig.driver.track(DEVID, os.dup(record.fd))
    write(rig, front, 0)
    rig.loop.run()
    other = Written.create(64 * PAGE)
    assert taken(rig, other) is None
    write(rig, front, 8)
    rig.loop.run()
    assert taken(rig, other) == {1} and clusters(record.peek()) == {0}
    other.close()


def connect(rig: Rig, front: Front, record: Written) -> None:
    journal = os.open(f"{rig.journal}-{DEVID}", os.O_RDWR | os.O_CREAT, 0o600)
    fds = [os.open(rig.path, os.O_RDWR), journal, os.dup(record.fd)]
    rig.driver.connect(DEVID, {"frontend": front.connection, "device": dict(rig.device)}, fds)


@pytest.mark.parametrize("moment", ["before the write", "after the write", "before the response"])
def test_a_killed_driver_forgets_nothing(
    rig: Rig, record: Written, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    front = Front(rig.guest)
    connect(rig, front, record)
    write(rig, front, 0)
    rig.loop.run()
    assert taken(rig, record) == {0}

    class Killed(BaseException):
        pass

    def die(*_: object) -> None:
        raise Killed

    place = {
        "before the write": ("hypervisor.devices.block.image.raw.os.pwritev", die),
        "after the write": ("hypervisor.devices.block.journal.Journal.write", die),
        "before the response": ("hypervisor.devices.block.ring.BlkRing.respond", die),
    }[moment]
    write(rig, front, 40)
    with monkeypatch.context() as patch:
        patch.setattr(*place)
        with pytest.raises(Killed):
            rig.loop.run()
    rig.kill()
    # Before the next one serves the disk, and after it did the request again.
    assert taken(rig, record) == {5}
    write(rig, front, 48)
    connect(rig, front, record)
    rig.loop.run()
    assert len(front.answers()) == 3
    again = {"before the response": set()}.get(moment, {5})
    assert taken(rig, record) == again | {6}


def test_bits_may_count_twice_but_never_not_at_all(record: Written) -> None:
    """A driver killed while it moves."""
    record.mark(3 * PAGE, 1)
    other = Written.attach(os.dup(record.fd))
    live = other._live

    class Killed(BaseException):
        pass

    class Dying:
        def __len__(self) -> int:
            return len(live)

        def __getitem__(self, key: slice) -> memoryview:
            return live[key]

        def __setitem__(self, key: slice, value: bytes) -> None:
            raise Killed

    other._live = Dying()  # type: ignore[assignment]
    with pytest.raises(Killed):
        other.move()
    other._live = live
    other.close()
    assert clusters(record.peek()) == {3}
    record.move()
    assert clusters(record.collect()) == {3}


def test_what_comes_with_a_connection_is_checked(rig: Rig) -> None:
    front = Front(rig.guest)
    journal = os.open(f"{rig.journal}-{DEVID}", os.O_RDWR | os.O_CREAT, 0o600)
    fds = [os.open(rig.path, os.O_RDWR), journal, os.memfd_create("x")]
    with pytest.raises(DeviceBroken, match="no record"):
        rig.driver.connect(DEVID, {"frontend": front.connection, "device": dict(rig.device)}, fds)
    assert rig.data() == bytes(2048 * SECTOR)
