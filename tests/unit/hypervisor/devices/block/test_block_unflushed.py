"""What is not flushed outlives the storage daemon that holds it back, and the driver that wrote it."""

from __future__ import annotations

import errno
import json
import mmap
import os
import socket
from collections.abc import Iterator, Sequence

import pytest
from blkfront import PAGE, Front, Rig, pattern
from hypothesis import given
from hypothesis import strategies as st

import hypervisor.devices.block.driver
from hypervisor.devices.block.driver import AGAIN_IN
from hypervisor.devices.block.image.base import Action, ImageGone, Operation
from hypervisor.devices.block.kept import Kept, batches
from hypervisor.devices.block.ring import ERROR, OKAY
from hypervisor.devices.block.unflushed import KEPT, ROOM, Unflushed
from hypervisor.devices.block.written import Written, runs
from hypervisor.devices.driver import DeviceBroken

READ, WRITE, FLUSH = 0, 1, 3
DEVID = 51712
SIZE = 16 * PAGE


class Store:
    """What is on stable storage."""

    def __init__(self, size: int = SIZE) -> None:
        self.data = bytearray(size)


class Daemon:
    """An image whose changes reach the store with a flush.

    :ivar left: operations until it dies; None: it does not. :ivar error: of the changes and flushes to come.
    """

    def __init__(self, store: Store) -> None:
        self.store = store
        self.cache = bytearray(store.data)
        self.left: int | None = None
        self.error = 0
        self.ran: list[Action] = []

    def run(self, operations: Sequence[Operation]) -> None:
        for operation in operations:
            if self.left == 0:
                raise ImageGone("killed")
            self.left = None if self.left is None else self.left - 1
            self.ran.append(operation.action)
            self._do(operation)

    def _do(self, operation: Operation) -> None:
        first, end = operation.offset, operation.offset + operation.length
        if operation.action == Action.READ:
            (piece,) = operation.pieces
            piece[:] = self.cache[first:end]
        elif self.error:
            operation.error = self.error
        elif operation.action == Action.WRITE:
            self.cache[first:end] = b"".join(operation.pieces)
        elif operation.action == Action.FLUSH:
            self.store.data[:] = self.cache
        else:
            self.cache[first:end] = bytes(operation.length)

    def close(self) -> None: ...


def write(offset: int, data: bytes) -> Operation:
    half = len(data) // 2
    return Operation(Action.WRITE, offset, len(data), [memoryview(data)[:half], memoryview(data)[half:]])


def nobody(error: int) -> None:
    raise AssertionError(f"a flush of its own failed: {error}")


@pytest.fixture
def unflushed() -> Iterator[Unflushed]:
    made = Unflushed.create(known=True)
    yield made
    made.close()


def again(unflushed: Unflushed) -> Unflushed:
    """As the next driver sees it."""
    return Unflushed.attach(os.dup(unflushed.fd))


def test_records_outlive_the_driver(unflushed: Unflushed) -> None:
    unflushed.append(write(5, b"five!"))
    unflushed.append(Operation(Action.DISCARD, 8, 64))
    end = unflushed.end
    unflushed.append(Operation(Action.ZERO, 1 << 40, 1 << 30))
    unflushed.append(write(7, b"seven"))
    found = again(unflushed)
    told = [(o.action, o.offset, o.length, b"".join(o.pieces)) for o in found.records()]
    assert told == [
        (Action.WRITE, 5, 5, b"five!"),
        (Action.DISCARD, 8, 64, b""),
        (Action.ZERO, 1 << 40, 1 << 30, b""),
        (Action.WRITE, 7, 5, b"seven"),
    ]
    found.drop(end)
    assert [o.offset for o in unflushed.records()] == [1 << 40, 7]
    found.drop(found.end)
    assert unflushed.empty and not list(found.records())
    found.close()


def test_a_driver_that_dies_while_it_forgets(unflushed: Unflushed) -> None:
    """Between the two words: what comes afterwards must be found."""
    unflushed.append(write(0, bytes(100)))
    unflushed._words[1], unflushed._words[2] = unflushed.end, 0
    assert unflushed.empty
    found = again(unflushed)
    found.append(write(3, b"new"))
    assert [o.offset for o in found.records()] == [3]
    found.close()


def test_what_is_no_such_record_is_refused() -> None:
    for data in (b"", b"reeveunf", bytes(mmap.PAGESIZE + ROOM)):
        fd = os.memfd_create("x")
        os.write(fd, data)
        with pytest.raises(ValueError, match="no record"):
            Unflushed.attach(fd)
        with pytest.raises(OSError):
            os.fstat(fd)


def test_memory_comes_back_when_the_guest_is_quiet(unflushed: Unflushed) -> None:
    def taken() -> int:
        return os.fstat(unflushed.fd).st_blocks * 512

    big = memoryview(bytes(1 << 20))
    for _ in range(8):
        unflushed.append(Operation(Action.WRITE, 0, 1 << 20, [big]))
    unflushed.drop(unflushed.end)
    assert taken() > 8 << 20, "while it writes much, the memory is used again"
    unflushed.append(write(0, b"little"))
    unflushed.drop(unflushed.end)
    assert taken() <= KEPT + mmap.PAGESIZE


def test_a_full_one_flushes_by_itself(unflushed: Unflushed) -> None:
    store = Store(2 << 20)
    daemon = Daemon(store)
    kept = Kept(daemon, unflushed, nobody)
    data = memoryview(b"x" * (1 << 20))
    operations = [Operation(Action.WRITE, 0, 1 << 20, [data]) for _ in range(40)]
    kept.run(operations)
    assert not any(operation.error for operation in operations)
    assert daemon.ran.count(Action.FLUSH) == 1 and daemon.ran.count(Action.WRITE) == 40
    assert 0 < unflushed.end < ROOM and store.data[: 1 << 20] == data


def test_a_flush_of_its_own_that_fails_is_told(unflushed: Unflushed) -> None:
    daemon, told = Daemon(Store(1 << 20)), list[int]()
    kept = Kept(daemon, unflushed, told.append)
    data = memoryview(bytes(1 << 20))
    operations = [Operation(Action.WRITE, 0, 1 << 20, [data]) for _ in range(31)]
    kept.run(operations)
    daemon.error = errno.EIO
    kept.run([last := Operation(Action.WRITE, 0, 1 << 20, [data])])
    assert told == [errno.EIO] and last.error == errno.EIO
    assert not any(operation.error for operation in operations)
    daemon.error = 0
    kept.run([last := Operation(Action.WRITE, 0, 1 << 20, [data])])
    assert not last.error and told == [errno.EIO]


def test_writes_to_one_place_are_not_mixed_up() -> None:
    places = [(0, 8), (8, 8), (4, 2), (16, 8), (15, 2), (100, 1)]
    found = [[o.offset for o in batch] for batch in batches(Operation(Action.WRITE, at, n) for at, n in places)]
    assert found == [[0, 8], [4, 16], [15, 100]]
    assert [len(b) for b in batches(Operation(Action.WRITE, n, 1) for n in range(40))] == [16, 16, 8]


CHANGE = st.tuples(
    st.sampled_from([Action.WRITE, Action.WRITE, Action.DISCARD, Action.ZERO]), st.integers(0, 15), st.integers(1, 4)
)
STEP = st.one_of(CHANGE, st.just("flush"), st.just("driver"), st.integers(0, 6))


@given(st.lists(st.lists(STEP, min_size=1, max_size=6), max_size=8))
def test_nothing_is_lost_whatever_dies(batches_: list[list[object]]) -> None:
    """A batch is done whole, again after the daemon's death (a number: after so many operations), as a queue does it.

    A model without any deaths says what the disk has to hold.
    """
    unflushed, store, model = Unflushed.create(known=True), Store(), bytearray(SIZE)
    host, daemon = unflushed, Daemon(store)
    kept = Kept(daemon, unflushed, nobody)
    stamp = 0
    for steps in batches_:
        operations: list[Operation] = []
        for step in steps:
            if step == "driver":
                unflushed = again(host)
                kept = Kept(daemon, unflushed, nobody)
                assert not kept.settle(daemon)
            elif step == "flush":
                operations.append(Operation(Action.FLUSH))
            elif isinstance(step, int):
                daemon.left = step
            elif isinstance(step, tuple):
                stamp += 1
                action, page, count = step
                first, length = page * PAGE, min(count, 16 - page) * PAGE
                data = bytes([stamp % 255 + 1]) * length if action == Action.WRITE else bytes(length)
                model[first : first + length] = data
                pieces = [memoryview(data)] if action == Action.WRITE else []
                operations.append(Operation(action, first, length, pieces))
        for _ in range(3):
            try:
                kept.run(operations)
                break
            except ImageGone:
                host.daemon_ended()
                daemon = Daemon(store)
                kept = Kept(daemon, unflushed, nobody)
                assert not kept.settle(daemon)
        assert daemon.cache == model
        if operations and operations[-1].action == Action.FLUSH:
            assert store.data == model
    host.daemon_ended()
    daemon = Daemon(store)
    assert not Kept(daemon, unflushed, nobody).settle(daemon)
    assert store.data == model and host.empty and not host.stale
    for each in {id(unflushed): unflushed, id(host): host}.values():
        each.close()


# -- in the driver


class DaemonDisk:
    """The host's end of a disk behind a daemon."""

    def __init__(self, rig: Rig, monkeypatch: pytest.MonkeyPatch, *, known: bool = True) -> None:
        self.rig = rig
        rig.device["kind"] = "nbd"
        self.store = Store()
        self.daemon = Daemon(self.store)
        self.unflushed = Unflushed.create(known=known)
        monkeypatch.setattr(hypervisor.devices.block.driver, "NbdImage", self._image)

    def _image(self, fd: int, *, flags: int) -> Daemon:
        assert flags == 5
        os.close(fd)
        return self.daemon

    def connect(self, front: Front, *more: int) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.control = ours
        self.rig.connect_fd(front, theirs.detach(), DEVID, [os.dup(self.unflushed.fd), *more])
        self.give()

    def give(self) -> None:
        near, far = socket.socketpair()
        socket.send_fds(self.control, [json.dumps({"size": SIZE, "flags": 5}).encode()], [near.fileno()])
        near.close()
        far.close()
        self.rig.loop.run()

    def next_daemon(self, *, error: int = 0) -> None:
        self.daemon.left = 0
        self.unflushed.daemon_ended()
        self.daemon = Daemon(self.store)
        self.daemon.error = error


@pytest.fixture
def disk(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> DaemonDisk:
    return DaemonDisk(rig, monkeypatch)


def statuses(front: Front) -> list[int]:
    return [status for _, _, status in front.answers()]


@pytest.mark.parametrize("driver_dies", [False, True])
@pytest.mark.parametrize("flushed", [False, True])
def test_a_daemon_that_dies_loses_nothing(rig: Rig, disk: DaemonDisk, driver_dies: bool, flushed: bool) -> None:
    front = Front(rig.guest)
    disk.connect(front)
    refs = [rig.guest.grant(rig.guest.new_frame(pattern(n))) for n in range(3)]
    front.request(WRITE, 0, [(refs[0], 0, 7)])
    if flushed:
        front.request(FLUSH, 0)
    front.request(WRITE, 8, [(refs[1], 0, 7)])
    front.request(WRITE, 0, [(refs[2], 0, 7)])
    rig.loop.run()
    assert set(statuses(front)) == {OKAY}
    disk.next_daemon()
    if driver_dies:
        rig.kill()
        disk.connect(front)
    else:
        disk.give()
    front.request(FLUSH, 0)
    front.request(FLUSH, 0)
    rig.loop.run()
    assert statuses(front) == [OKAY, OKAY]
    assert disk.store.data[: 2 * PAGE] == pattern(2) + pattern(1)
    assert disk.unflushed.empty


def test_requests_wait_while_what_was_lost_finds_no_room(rig: Rig, disk: DaemonDisk) -> None:
    front = Front(rig.guest)
    disk.connect(front)
    ref = rig.guest.grant(rig.guest.new_frame(pattern(1)))
    front.request(WRITE, 0, [(ref, 0, 7)])
    rig.loop.run()
    assert statuses(front) == [OKAY]
    disk.next_daemon(error=errno.ENOSPC)
    disk.give()
    flush = front.request(FLUSH, 0)
    rig.loop.now += AGAIN_IN
    rig.loop.run()
    assert not front.answers() and "make room" in rig.reports[-1][2]
    disk.daemon.error = 0
    rig.loop.now += AGAIN_IN
    rig.loop.run()
    assert [(ident, status) for ident, _, status in front.answers()] == [(flush, OKAY)]
    assert disk.store.data[:PAGE] == pattern(1)


def test_a_daemon_that_dies_once_more_while_it_is_written_to(rig: Rig, disk: DaemonDisk) -> None:
    front = Front(rig.guest)
    disk.connect(front)
    for n in range(3):
        front.request(WRITE, 8 * n, [(rig.guest.grant(rig.guest.new_frame(pattern(n))), 0, 7)])
    rig.loop.run()
    disk.next_daemon()
    disk.daemon.left = 2
    disk.give()
    front.answers()
    front.request(FLUSH, 0)
    rig.loop.run()
    assert not front.answers()
    disk.next_daemon()
    disk.give()
    assert statuses(front) == [OKAY]
    assert disk.store.data[: 3 * PAGE] == b"".join(pattern(n) for n in range(3))


@pytest.mark.parametrize("why", ["nobody kept it", "it cannot be written"])
def test_what_may_be_lost_fails_one_flush(rig: Rig, monkeypatch: pytest.MonkeyPatch, why: str) -> None:
    disk = DaemonDisk(rig, monkeypatch, known=why != "nobody kept it")
    front = Front(rig.guest)
    if not disk.unflushed.known:
        # The guest went on while host process, driver and daemon were away.
        disk.next_daemon()
        disk.connect(front)
    else:
        disk.connect(front)
        front.request(WRITE, 0, [(rig.guest.grant(), 0, 7)])
        rig.loop.run()
        front.answers()
        disk.next_daemon(error=errno.EIO)
        disk.give()
        disk.daemon.error = 0
    rig.kill()
    disk.connect(front)
    front.request(READ, 0, [(rig.guest.grant(), 0, 7)])
    front.request(FLUSH, 0)
    front.request(FLUSH, 0)
    rig.loop.run()
    assert statuses(front) == [OKAY, ERROR, OKAY]
    assert any("flush" in said for _, _, said in rig.reports)


def test_what_an_earlier_driver_wrote_is_flushed_first(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The daemon outlived the host process, whose record of what is unflushed did not."""
    disk = DaemonDisk(rig, monkeypatch, known=False)
    disk.daemon.cache[:4] = b"here"
    disk.connect(Front(rig.guest))
    assert disk.store.data[:4] == b"here" and disk.unflushed.known


def test_what_is_written_again_is_in_a_mirrors_record(rig: Rig, disk: DaemonDisk) -> None:
    front = Front(rig.guest)
    disk.connect(front)
    front.request(WRITE, 16, [(rig.guest.grant(), 0, 7)])
    rig.loop.run()
    record = Written.create(SIZE)
    rig.driver.track(DEVID, os.dup(record.fd))
    assert record.recorded() == 0
    disk.next_daemon()
    disk.give()
    assert list(runs(record.peek())) == [(2, 3)]
    front.request(WRITE, 0, [(rig.guest.grant(), 0, 7)])
    rig.loop.run()
    assert list(runs(record.peek())) == [(0, 1), (2, 3)]
    record.close()


def test_a_daemons_disk_comes_with_its_record(rig: Rig, disk: DaemonDisk) -> None:
    front = Front(rig.guest)
    for more in ([], [os.memfd_create("x")]):
        _, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with pytest.raises(DeviceBroken, match=r"descriptors|no record"):
            rig.connect_fd(front, theirs.detach(), DEVID, more)
