"""A disk of a guest that has a standby: the copy is what the disk was when the last whole epoch was taken."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest
from mirror_rig import FORMATS, Guest, Rig, content, needs_qemu

from hypervisor.devices.block.image.base import Action, Operation
from hypervisor.devices.block.mirror import wire
from hypervisor.errors import HostFailure, HostUnavailable, MigrationFailed
from hypervisor.waiting import within

MIB = 1 << 20


def run(work: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(within(work, 60))


async def begun(tmp_path: Path, kind: str, size: int = 8 * MIB) -> tuple[Rig, Guest]:
    """A disk with something on it, copied; from now on epochs."""
    rig = Rig(tmp_path)
    path = rig.image("disk", kind, size)
    guest = await rig.attach(path, kind)
    for number in range(12):
        guest.write(number * 160, 1 + number, 11)
        await guest.settle()
    await rig.begin()
    await rig.source.round()
    await rig.source.aside()
    return rig, guest


async def written(guest: Guest, byte: int) -> None:
    for sector in (0, 500, 9000):
        guest.write(sector, byte, 11)
        await guest.settle()


async def seen(rig: Rig) -> bytes:
    """What is on the source's disk now."""
    view = await rig.backends[0].hold(rig.opened[0]).view(writable=False)
    data = bytearray(rig.opened[0].size_bytes)
    reads = [Operation(Action.READ, at, MIB, [memoryview(data)[at : at + MIB]]) for at in range(0, len(data), MIB)]
    try:
        await asyncio.to_thread(view.image.run, reads)
    finally:
        view.close()
    assert not any(read.error for read in reads)
    return bytes(data)


async def epoch(rig: Rig) -> bytes:
    """One that is whole. :returns: what was on the disk then."""
    batch = await rig.source.gather()
    then = await seen(rig)
    await rig.source.deliver(batch)
    await rig.target.apply()
    return then


async def taken(rig: Rig, kind: str) -> bytes:
    """The copy as the target goes on with it."""
    await rig.source.abort()
    (opened,) = (await rig.end()).values()
    opened.close()
    await rig.close()
    return content(rig.homes[1] / "images" / "disk", kind)


@pytest.mark.parametrize("kind", FORMATS)
def test_the_copy_is_that_of_the_last_whole_epoch(tmp_path: Path, kind: str) -> None:
    async def work() -> None:
        rig, guest = await begun(tmp_path, kind)
        await written(guest, 70)
        assert await epoch(rig)
        await written(guest, 71)
        guest.front.discard(200, 64)
        guest.loop.run()
        await guest.settle()
        then = await epoch(rig)
        await written(guest, 72)
        batch = await rig.source.gather()
        await written(guest, 73)
        await rig.source.deliver(batch)
        guest.disconnect()
        assert await taken(rig, kind) == then, "the third came, and was not whole"

    run(work())


@pytest.mark.parametrize("kind", FORMATS)
def test_what_is_written_after_the_boundary_is_of_the_next_epoch(tmp_path: Path, kind: str) -> None:
    async def work() -> None:
        rig, guest = await begun(tmp_path, kind)
        for byte in (80, 81, 82):
            await written(guest, byte)
            batch = await rig.source.gather()
            then = await seen(rig)
            await written(guest, byte + 100)
            await rig.source.deliver(batch)
            await rig.target.apply()
        guest.disconnect()
        assert await taken(rig, kind) == then

    run(work())


def test_a_connection_that_ends_in_the_middle_takes_nothing_with_it(tmp_path: Path) -> None:
    async def work() -> None:
        rig, guest = await begun(tmp_path, "raw")
        await written(guest, 85)
        then = await epoch(rig)
        await written(guest, 86)
        batch = await rig.source.gather()
        rig.far.on_send = lambda message: (rig.near.cut(), message)[1]
        with pytest.raises(MigrationFailed):
            await rig.source.deliver(batch)
        with pytest.raises(MigrationFailed):
            await rig.serving
        assert rig.target.keeps_aside
        guest.disconnect()
        assert await taken(rig, "raw") == then

    run(work())


def test_a_driver_that_was_killed_makes_no_epoch_wrong(tmp_path: Path) -> None:
    async def work() -> None:
        rig, guest = await begun(tmp_path, "raw")
        await written(guest, 90)
        guest.kill()
        first = await epoch(rig)
        assert first[:4096] == bytes([90]) * 4096
        guest.start()
        await guest.settle()
        await written(guest, 91)
        guest.dies_moving = True
        await epoch(rig)
        guest.start()
        await guest.settle()
        then = await epoch(rig)
        guest.disconnect()
        assert await taken(rig, "raw") == then

    run(work())


@needs_qemu
def test_a_storage_daemon_that_was_killed_ends_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def work() -> None:
        rig, guest = await begun(tmp_path, "qcow2")
        hold = rig.backends[0].hold(rig.opened[0])
        await written(guest, 95)
        with monkeypatch.context() as patch:
            patch.setattr(type(hold), "behind", lambda self: True)
            with pytest.raises(HostUnavailable, match="begin anew"):
                await rig.source.gather()
        guest.disconnect()
        await taken(rig, "qcow2")

    run(work())


def test_more_than_an_epoch_may_have(tmp_path: Path) -> None:
    async def work() -> None:
        rig, guest = await begun(tmp_path, "raw")
        await written(guest, 96)
        with pytest.raises(MigrationFailed, match="shorter interval"):
            await rig.source.gather(4096)
        guest.disconnect()
        await taken(rig, "raw")

    run(work())


def test_a_source_cannot_have_the_target_keep_anything_it_likes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def work() -> None:
        rig, guest = await begun(tmp_path, "raw")
        monkeypatch.setattr(wire, "MAX_ASIDE", 40_000)
        await written(guest, 97)
        batch = await rig.source.gather(MIB)
        with pytest.raises(MigrationFailed, match="more at once"):
            await rig.source.deliver(batch)
        guest.disconnect()
        with pytest.raises(MigrationFailed):
            await rig.serving
        await rig.target.abort()
        await rig.source.abort()
        await rig.close()
        assert rig.images_left() == []

    run(work())


def test_a_full_target_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def work() -> None:
        rig, guest = await begun(tmp_path, "raw")
        await written(guest, 98)
        batch = await rig.source.gather()
        await rig.source.deliver(batch)

        def full(*_: object) -> int:
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr("hypervisor.devices.block.image.raw.os.pwritev", full)
            with pytest.raises(HostFailure, match="make room"):
                await rig.target.apply()
        guest.disconnect()
        rig.serving.cancel()
        await asyncio.gather(rig.serving, return_exceptions=True)
        await rig.target.abort()
        await rig.source.abort()
        await rig.close()
        assert rig.images_left() == []

    run(work())
