"""Disks mirrored while their guest writes and their driver is killed: the images are equal in the end."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import pkgutil
import random
import signal
import subprocess
import threading
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest
from blkfront import PAGE
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mirror_rig import FORMATS, Guest, Killed, Rig, content, die, needs_qemu

from hypervisor.devices.block.image.base import ImageGone
from hypervisor.devices.block.mirror import wire
from hypervisor.devices.block.mirror.images import Copy, DiskAnswer, DiskOffer, DiskPlan, choose, survey
from hypervisor.devices.block.mirror.target import Candidate, MirrorTarget
from hypervisor.errors import HostFailure, MigrationFailed, MigrationRefused, ToolstackError, WrongState

MIB = 1 << 20


def run(work: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(asyncio.wait_for(work, 60))


async def moved(rig: Rig, guests: list[Guest]) -> None:
    """The rest of a mirror that is under way, and both sides closed."""
    for guest in guests:
        await guest.settle()
        guest.disconnect()
    await rig.source.finish()
    for opened in (await rig.end()).values():
        opened.close()
    await rig.close()


@pytest.mark.parametrize("kind", FORMATS)
def test_a_disk_moves_while_it_is_written(tmp_path: Path, kind: str) -> None:
    async def work() -> None:
        rig = Rig(tmp_path)
        path = rig.image("disk", kind, 24 * MIB + 512)
        guest = await rig.attach(path, kind)
        for number in range(30):
            guest.write(number * 1600, number, 11)
            await guest.settle()
        await rig.begin()
        rig.near.on_send = lambda message: (guest.something(), message)[1]
        first = await rig.source.round()
        assert rig.target.paths == [str(rig.homes[1] / "images" / "disk")]
        for _ in range(40):
            guest.something()
            await guest.settle()
        assert rig.source.progress()[1] > 0
        second = await rig.source.round()
        rig.near.on_send = lambda message: message
        assert second.bytes and 0 < first.bytes < 8 * MIB, "holes are not sent"
        await moved(rig, [guest])
        mirrored = rig.homes[1] / "images" / "disk"
        assert content(mirrored, kind) == content(path, kind)
        assert mirrored.stat().st_blocks * 512 < 16 * MIB
        assert not list(rig.homes[1].glob("disks/*"))

    run(work())


class Killer:
    """Does something at every message, and now and then kills and replaces the driver in the middle of a request."""

    def __init__(self, guest: Guest, seed: int, patch: pytest.MonkeyPatch) -> None:
        self.guest = guest
        self.random = random.Random(seed)
        self.patch = patch

    def __call__(self, message: bytes) -> bytes:
        for _ in range(self.random.randint(0, 3)):
            dice = self.random.random()
            if self.guest.driver is None:
                if dice < 0.5:
                    self.guest.start()
            elif dice < 0.15:
                self.guest.kill()
            elif dice < 0.2:
                self.guest.dies_moving = True
            elif dice < 0.3:
                self._kill_at(self.random.choice(PLACES))
            else:
                self.guest.something()
        return message

    def _kill_at(self, place: str) -> None:
        real = pkgutil.resolve_name(place.replace(".raw.os.", ".raw:os."))

        def maybe(*args: Any) -> Any:
            # The target's thread writes, too.
            return die() if threading.current_thread() is threading.main_thread() else real(*args)

        with self.patch.context() as patch, contextlib.suppress(Killed):
            patch.setattr(place, maybe)
            self.guest.something()
        self.guest.kill()


PLACES = [
    "hypervisor.devices.block.image.raw.os.pwritev",
    "hypervisor.devices.block.journal.Journal.write",
    "hypervisor.devices.block.ring.BlkRing.respond",
]


@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.integers(0, 1 << 32), st.integers(3, 9), st.integers(0, 3))
def test_images_are_equal_whatever_happened(
    tmp_path_factory: pytest.TempPathFactory, seed: int, mib: int, rounds: int
) -> None:
    async def work() -> None:
        rig = Rig(tmp_path_factory.mktemp("mirror"))
        path = rig.image("disk.img", "raw", mib * MIB)
        path.write_bytes(random.Random(seed).randbytes(mib * MIB))
        guest = await rig.attach(path, "raw")
        guest.random.seed(seed)
        with pytest.MonkeyPatch.context() as patch:
            killer = Killer(guest, seed, patch)
            await rig.begin()
            rig.near.on_send = killer
            reviver = asyncio.get_running_loop().create_task(revive(guest))
            for _ in range(rounds):
                await rig.source.round()
            reviver.cancel()
        rig.near.on_send = lambda message: message
        if guest.driver is None:
            guest.start()
        await moved(rig, [guest])
        assert content(rig.homes[1] / "images" / "disk.img", "raw") == content(path, "raw")

    run(work())


async def revive(guest: Guest) -> None:
    """As the host process does."""
    while True:
        await asyncio.sleep(0.01)
        if guest.driver is None:
            guest.start()


@needs_qemu
def test_qcow2_whose_driver_and_daemon_die(tmp_path: Path) -> None:
    async def work() -> None:
        rig = Rig(tmp_path)
        path = rig.image("disk", "qcow2", 32 * MIB)
        guest = await rig.attach(path, "qcow2")
        for number in range(20):
            guest.write(number * 3000, number + 1, 11)
        await guest.settle()
        await rig.begin()
        await rig.source.round()
        guest.write(100, 77)
        guest.kill()
        guest.start()
        await guest.settle()
        guest.write(40000, 78)
        await guest.settle()
        (pid_file,) = (rig.homes[0] / "disks").glob("*/pid")
        os.kill(int(pid_file.read_text()), signal.SIGKILL)
        for number in range(10):
            guest.write(number * 5000, 99)
        await rig.source.round()
        await guest.settle()
        await moved(rig, [guest])
        assert content(rig.homes[1] / "images" / "disk", "qcow2") == content(path, "qcow2")

    run(work())


@needs_qemu
def test_a_daemon_that_never_tells_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def work() -> None:
        rig = Rig(tmp_path)
        guest = await rig.attach(rig.image("disk", "qcow2", MIB), "qcow2")

        def gone(*_: object) -> None:
            raise ImageGone("it has closed the connection")

        monkeypatch.setattr("hypervisor.devices.block.image.nbd_status.NbdStatus.extents", gone)
        with pytest.raises(MigrationFailed, match="xvda cannot be read: it has closed"):
            await rig.begin()
        await gave_up(rig, guest)

    run(work())


def test_several_disks_and_one_that_is_read_only(tmp_path: Path) -> None:
    async def work() -> None:
        rig = Rig(tmp_path)
        paths = [rig.image(f"{name}.img", "raw", 3 * MIB) for name in "abc"]
        paths[2].write_bytes(os.urandom(3 * MIB))
        guests = [await rig.attach(path, "raw", readonly=path == paths[2]) for path in paths]
        guests[0].write(0, 1)
        await rig.begin()
        await rig.source.round()
        guests[1].write(8, 2)
        guests[0].front.discard(0, 8)
        guests[0].loop.run()
        for guest in guests[:2]:
            guest.disconnect()
        await rig.source.finish()
        opened = await rig.end()
        assert list(opened) == ["xvda", "xvdb", "xvdc"]
        assert opened["xvdc"].config["readonly"] and not opened["xvda"].config["readonly"]
        for one in opened.values():
            one.close()
        await rig.close()
        for path in paths:
            assert (rig.homes[1] / "images" / path.name).read_bytes() == path.read_bytes()
        assert content(paths[0], "raw") == bytes(3 * MIB)

    run(work())


# -- backing files


async def overlay(rig: Rig, *, base_on_target: bytes | None) -> tuple[Path, Guest]:
    """A disk on a backing file, in which the guest has written; both hosts have the base at the same path."""
    data = random.Random(4).randbytes(4 * MIB)
    shared = rig.homes[1] / "images" / "base.img"
    shared.write_bytes(data)
    rig.backends[0]._opener._folders.append(str(rig.homes[1] / "images"))  # both may use it
    path = rig.image("disk", "qcow2", 8 * MIB, shared)
    guest = await rig.attach(path, "qcow2")
    guest.write(16, 7, 11)
    guest.front.discard(4096, 512)
    await guest.settle()
    if base_on_target is not None:
        shared.unlink()
        shared.write_bytes(base_on_target)
    return path, guest


@needs_qemu
def test_only_the_top_is_copied_where_the_base_is_there(tmp_path: Path) -> None:
    async def work() -> None:
        rig = Rig(tmp_path)
        path, guest = await overlay(rig, base_on_target=None)
        answer = rig.answer(0)
        assert answer.top and not answer.compare and not answer.shared
        await rig.begin()
        done = await rig.source.round()
        assert done.bytes <= 2 * 65536
        await guest.settle()
        guest.write(5000, 3, 2)
        await moved(rig, [guest])
        target = rig.homes[1] / "images" / "disk"
        info = subprocess.run(["qemu-img", "info", str(target)], capture_output=True, text=True, check=True).stdout
        assert "base.img" in info
        assert content(target, "qcow2") == content(path, "qcow2")

    run(work())


@needs_qemu
@pytest.mark.parametrize("same", [True, False])
def test_a_base_of_another_host_is_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, same: bool) -> None:
    async def work() -> None:
        rig = Rig(tmp_path)
        path, guest = await overlay(rig, base_on_target=None)
        base = Path(rig.offer(0).files[1].path)
        monkeypatch.setattr("hypervisor.devices.block.mirror.images.FileFacts.is_here", lambda *_: False)
        if not same:
            # The source goes on with the file that it has open.
            monkeypatch.setattr("hypervisor.devices.block.mirror.images._digest", lambda path: os.urandom(32))
        if same:
            await rig.begin()
            await moved(rig, [guest])
            assert content(rig.homes[1] / "images" / "disk", "qcow2") == content(path, "qcow2")
            return
        with pytest.raises(MigrationRefused, match=f"not the source's.*{base.name}.*flattened"):
            await rig.begin()
        await gave_up(rig, guest)

    run(work())


@needs_qemu
def test_a_disk_is_flattened_when_its_base_is_not_there(tmp_path: Path) -> None:
    async def work() -> None:
        rig = Rig(tmp_path)
        base = rig.image("base.img", "raw", 4 * MIB)
        base.write_bytes(random.Random(5).randbytes(4 * MIB))
        path = rig.image("disk", "qcow2", 8 * MIB, base)
        guest = await rig.attach(path, "qcow2")
        with pytest.raises(
            MigrationRefused, match=r"xvda: its backing file .*base.img .* is not on the target: copy it"
        ):
            await rig.begin()
        assert not rig.images_left()
        guest.write(16, 7, 11)
        await guest.settle()
        await rig.begin(flatten=True)
        await rig.source.round()
        guest.write(9000, 0, 11)
        await moved(rig, [guest])
        target = rig.homes[1] / "images" / "disk"
        assert content(target, "qcow2") == content(path, "qcow2")
        info = subprocess.run(["qemu-img", "info", str(target)], capture_output=True, text=True, check=True).stdout
        assert "backing" not in info

    run(work())


# -- what goes wrong


async def gave_up(rig: Rig, *guests: Guest) -> None:
    """A mirror that failed is ended: the guest goes on where it was, the target has nothing."""
    await rig.source.abort()
    rig.near.cut()
    await asyncio.gather(rig.serving, return_exceptions=True)
    await rig.target.abort()
    for guest in guests:
        await guest.settle()
        guest.write(0, 42)
        await guest.settle()
        assert rig.backends[0].hold(guest.opened).record is None
    await rig.close()
    assert "disk" not in rig.images_left() and "disk.img" not in rig.images_left()
    assert not list(rig.homes[1].glob("disks/*"))


@pytest.mark.parametrize("at", [0, 1, 2, 5])
def test_a_cut_connection_ends_it_on_both_sides(tmp_path: Path, at: int) -> None:
    async def work() -> None:
        rig = Rig(tmp_path)
        path = rig.image("disk.img", "raw", 8 * MIB)
        path.write_bytes(os.urandom(8 * MIB))
        guest = await rig.attach(path, "raw")

        def maybe(message: bytes) -> bytes:
            if rig.near.count == at:
                rig.near.cut()
            return message

        rig.near.on_send = maybe
        before = len(os.listdir("/proc/self/fd"))
        with pytest.raises(MigrationFailed, match="is over"):
            await rig.begin()
            await rig.source.round()
        with pytest.raises(MigrationFailed, match="is over"):
            await rig.serving
        await gave_up(rig, guest)
        deadline = time.monotonic() + 20
        while len(os.listdir("/proc/self/fd")) >= before:
            assert time.monotonic() < deadline, "descriptors are left"
            await asyncio.sleep(0.01)

    run(work())


def test_a_full_target_is_told_to_the_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def work() -> None:
        rig = Rig(tmp_path)
        path = rig.image("disk.img", "raw", 4 * MIB)
        path.write_bytes(os.urandom(4 * MIB))
        guest = await rig.attach(path, "raw")
        await rig.begin()
        real = os.pwritev

        def full(fd: int, pieces: Any, offset: int) -> int:
            if str(rig.homes[1]) in os.readlink(f"/proc/self/fd/{fd}") and offset >= 2 * MIB:
                raise OSError(28, "No space left on device")
            return real(fd, pieces, offset)

        monkeypatch.setattr("hypervisor.devices.block.image.raw.os.pwritev", full)
        with pytest.raises(HostFailure, match=r"xvda cannot be written on the target .*No space left.*make room there"):
            await rig.source.round()
        with pytest.raises(HostFailure, match="No space left"):
            await rig.serving
        await gave_up(rig, guest)

    run(work())


def test_no_room_on_the_target_is_found_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def work() -> None:
        rig = Rig(tmp_path)
        path = rig.image("disk.img", "raw", 4 * MIB)
        path.write_bytes(os.urandom(4 * MIB))
        await rig.attach(path, "raw")
        real = os.statvfs(tmp_path)
        fields = [*real[:4], 100, *real[5:]]
        monkeypatch.setattr("hypervisor.devices.block.mirror.images.os.statvfs", lambda _: os.statvfs_result(fields))
        with pytest.raises(MigrationRefused, match=r"takes 4 MiB, and .* on the target has 0 MiB: make room"):
            await rig.begin()
        await rig.close()

    run(work())


def test_an_image_that_is_there_is_not_touched(tmp_path: Path) -> None:
    async def work() -> None:
        rig = Rig(tmp_path)
        guest = await rig.attach(rig.image("disk.img", "raw", MIB), "raw")
        taken = rig.homes[1] / "images" / "disk.img"
        taken.write_bytes(b"mine")
        with pytest.raises(
            MigrationRefused, match=r"there is an image .*disk.img on the target already: remove or rename"
        ):
            await rig.begin()
        plan = DiskPlan("xvda", str(taken), "raw", MIB, False, ())
        with pytest.raises(ToolstackError, match="exists already"):
            plan.create()
        # It appeared after the target was asked.
        answer = dataclasses.replace(rig.answer(0), path=str(taken))
        target = MirrorTarget(rig.backends[1], "d1", 3, [Candidate(rig.offer(0), answer, rig.specs[0])])
        await rig.near.send(hello())
        with pytest.raises(ToolstackError, match="exists already"):
            await target.serve(rig.far)
        await target.abort()
        assert target.paths == []
        assert taken.read_bytes() == b"mine" and guest.driver is not None
        await rig.close()

    run(work())


def test_a_shared_disk_is_copied_only_when_asked(tmp_path: Path) -> None:
    async def work() -> None:
        rig = Rig(tmp_path)
        path = rig.image("disk.img", "raw", MIB)
        guest = await rig.attach(path, "raw")
        offer = rig.offer(0)
        here, there = [rig.homes[0] / "images"], [rig.homes[1] / "images"]
        answer = survey(offer, here, [])
        assert answer.shared and choose(offer, answer, flatten=False, copy=False) is Copy.NOTHING
        with pytest.raises(MigrationRefused, match="on the target already"):
            choose(offer, answer, flatten=False, copy=True)
        assert not survey(offer, there, []).shared, "it is here, but nothing may be opened there"
        foreign = dataclasses.replace(offer.files[0], boot="another machine")
        elsewhere = dataclasses.replace(offer, files=(foreign,))
        assert not survey(elsewhere, here, []).shared, "an equal name proves nothing"
        assert survey(elsewhere, here, here).shared
        smaller = dataclasses.replace(offer, files=(dataclasses.replace(foreign, size=512),))
        assert not survey(smaller, here, here).shared
        assert guest.driver is not None
        await rig.close()

    run(work())


WRONG: list[dict[str, Any]] = [
    {"id": 1},
    {"size": 0},
    {"size": -1},
    {"size": 1 << 60},
    {"stored": "x"},
    {"files": []},
    {"files": [{}]},
    {"files": 3},
    {"files": None},
    *[
        {"files": [{"path": "/a", "format": "raw", "size": 1, "device": 1, "inode": 1, "boot": "", **wrong}]}
        for wrong in (
            {"path": "a"},
            {"path": "/a\0"},
            {"format": "vmdk"},
            {"size": -1},
            {"inode": "x"},
            {"boot": 3},
            {"x": 1},
        )
    ],
]


@pytest.mark.parametrize("change", WRONG, ids=range(len(WRONG)))
def test_an_offer_that_makes_no_sense_is_refused(change: dict[str, Any]) -> None:
    file = {"path": "/a", "format": "raw", "size": 1, "device": 1, "inode": 1, "boot": ""}
    good: dict[str, Any] = {"id": "xvda", "size": 512, "stored": 0, "files": [file]}
    assert DiskOffer.from_json(good).to_json()["files"] == (file,)
    with pytest.raises(MigrationRefused, match="makes no sense"):
        DiskOffer.from_json({**good, **change})
    for answer in ({"id": "a", "shared": 1}, {"id": "a", "path": None}, {"id": "a", "x": ""}, {}):
        with pytest.raises(MigrationRefused, match="makes no sense"):
            DiskAnswer.from_json(answer)


def test_an_image_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def work() -> None:
        rig = Rig(tmp_path)
        path = rig.image("disk.img", "raw", 4 * MIB)
        path.write_bytes(os.urandom(4 * MIB))
        guest = await rig.attach(path, "raw")
        await rig.begin()
        real = os.preadv

        def bad(fd: int, pieces: Any, offset: int) -> int:
            if offset == MIB:
                raise OSError(5, "Input/output error")
            return real(fd, pieces, offset)

        monkeypatch.setattr("hypervisor.devices.block.image.raw.os.preadv", bad)
        with pytest.raises(MigrationFailed, match=r"xvda cannot be read at 1048576 .*repair"):
            await rig.source.round()
        monkeypatch.undo()
        await gave_up(rig, guest)

    run(work())


def test_a_disk_that_is_mirrored_does_not_grow(tmp_path: Path) -> None:
    async def work() -> None:
        rig = Rig(tmp_path)
        guest = await rig.attach(rig.image("disk.img", "raw", MIB), "raw")
        await rig.begin()
        with pytest.raises(WrongState, match="being mirrored"):
            await rig.backends[0].resize(guest.opened, rig.specs[0], 2 * MIB)
        await gave_up(rig, guest)

    run(work())


def test_a_driver_that_does_not_record_is_looked_at_again_whole(tmp_path: Path) -> None:
    """It came with its own idea of the record: then everything counts as written."""

    async def work() -> None:
        rig = Rig(tmp_path)
        path = rig.image("disk.img", "raw", 4 * MIB)
        guest = await rig.attach(path, "raw")
        guest.write(0, 1)
        await rig.begin()
        await rig.source.round()
        assert guest.driver is not None
        guest.driver.track(51712, None)
        guest.write(2048, 9)
        done = await rig.source.round()
        assert done.bytes == 2 * 65536 or done.bytes == 2 * PAGE
        await moved(rig, [guest])
        assert content(rig.homes[1] / "images" / "disk.img", "raw") == content(path, "raw")

    run(work())


def test_bandwidth_is_limited_but_not_in_the_last_round(tmp_path: Path) -> None:
    async def work() -> None:
        rig = Rig(tmp_path)
        path = rig.image("disk.img", "raw", 4 * MIB)
        path.write_bytes(os.urandom(4 * MIB))
        guest = await rig.attach(path, "raw")
        await rig.begin(rate=8 * MIB)
        first = await rig.source.round()
        assert first.seconds > 0.3
        path.touch()
        for number in range(64):
            guest.write(number * 88, 5, 11)
            await guest.settle()
        rig.source.limit(1)
        await moved(rig, [guest])
        assert content(rig.homes[1] / "images" / "disk.img", "raw") == content(path, "raw")

    run(work())


# -- a source that says what it should not


def hello(**changes: Any) -> bytes:
    document = {"version": 1, "disks": [{"id": "xvda", "size": MIB, "top": False, "digest": ""}], **changes}
    return wire.note(wire.Kind.HELLO, document=document)


def one(offset: int, data: bytes, disk: int = 0) -> bytes:
    return b"".join(wire.extents(disk, 1, [wire.Extent(offset, len(data))], [memoryview(data)]))


BAD = [
    (b"", "a message of 0 bytes"),
    (bytes(wire.MAX_MESSAGE + 1), "a message of"),
    (hello()[:-1], "checksum"),
    (hello(version=2), "version 2"),
    (hello(disks=[]), "disks that are none"),
    (hello(disks={}), "disks that are none"),
    (hello(disks=[{"id": "xvda", "size": MIB}] * 2), "disks that are none"),
    (hello(disks=[{"id": "xvda", "size": "x"}]), "disks that are none"),
    (hello(disks=[{"id": "xvda", "sizes": 1}]), "a disk that is none"),
    (hello(), "a second greeting"),
    (wire.note(wire.Kind.READY), "out of place"),
    (wire.note(wire.Kind.FAILED, document={}), "out of place"),
    (one(MIB, b"x" * 512), "behind the end"),
    (one(MIB - 512, b"x" * 1024), "behind the end"),
    (one(0, b"x" * 512, disk=1), "disk 1 of 1"),
    (one(0, b"x" * 512, disk=200), "out of place"),
    (one(0, b"x" * 512)[:-1] + b"y", "checksum"),
    (b"".join(wire.extents(0, 1, [wire.Extent(0, 512)], [memoryview(b"x" * 511)])), "511 bytes of data"),
    (b"".join(wire.extents(0, 1, [wire.Extent(0, 0)], [])), "an extent of 0 bytes"),
    (b"".join(wire.extents(0, 1, [], [])), "0 extents"),
    (b"".join(wire.extents(0, 1, [wire.Extent(0, 1 << 31, True)], [])), "an extent of"),
    (
        b"".join(wire.extents(0, 1, [wire.Extent(512, 512, True), wire.Extent(0, 512, True)], [])),
        "an extent of 512 bytes at 0",
    ),
]


@pytest.mark.parametrize(("message", "why"), BAD, ids=range(len(BAD)))
def test_what_makes_no_sense_ends_the_mirror(tmp_path: Path, message: bytes, why: str) -> None:
    async def work() -> None:
        rig = Rig(tmp_path)
        guest = await rig.attach(rig.image("disk.img", "raw", MIB), "raw")
        await rig.begin()
        await rig.near.send(message)
        with pytest.raises(ToolstackError, match=why):
            await rig.serving
        with pytest.raises(ToolstackError, match=why):
            await rig.source.round()
        await gave_up(rig, guest)

    run(work())


GREETINGS = [
    ({"id": "xvdb", "size": MIB}, "a disk 'xvdb' that the domain has not"),
    ({"id": "xvda", "size": 2 * MIB}, "it was resized"),
    ({"id": "xvda", "size": MIB, "top": True}, "xvda: its"),
]


@pytest.mark.parametrize(("disk", "why"), GREETINGS, ids=range(len(GREETINGS)))
def test_a_greeting_for_other_disks_makes_nothing(tmp_path: Path, disk: dict[str, Any], why: str) -> None:
    async def work() -> None:
        rig = Rig(tmp_path)
        guest = await rig.attach(rig.image("disk.img", "raw", MIB), "raw")
        target = MirrorTarget(rig.backends[1], "d1", 3, [Candidate(rig.offer(0), rig.answer(0), rig.specs[0])])
        await rig.near.send(hello(disks=[disk]))
        with pytest.raises(ToolstackError, match=why):
            await target.serve(rig.far)
        assert wire.parse(await rig.near.receive(), wire.FROM_TARGET).kind is wire.Kind.FAILED
        await target.abort()
        assert not rig.images_left() and guest.driver is not None
        await rig.close()

    run(work())


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200), st.integers(0, 600), st.integers(0, 7))
def test_damaged_messages_are_refused(junk: bytes, at: int, bit: int) -> None:
    good = bytearray(one(4096, b"x" * 512))
    with pytest.raises(wire.BadMessage):
        wire.parse(junk, wire.FROM_SOURCE)
    good[at % len(good)] ^= 1 << bit
    with pytest.raises(wire.BadMessage):
        wire.parse(bytes(good), wire.FROM_SOURCE)
