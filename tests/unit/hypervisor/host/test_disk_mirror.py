"""Disks over the connection of two real movers, and what a host says of its disks."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import sys
from collections.abc import AsyncIterator, Coroutine
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "support"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "devices" / "block"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "devices" / "block" / "mirror"))

from authority import Authority
from mirror_rig import FORMATS, Guest, Rig, content
from mover_rig import Memory, pair, zygote

from hypervisor.devices.block.mirror.source import WINDOW
from hypervisor.errors import MigrationFailed
from hypervisor.host.disk_mirror import KIND, BlobLink
from hypervisor.host.mover.client import CLOSED, Mover

MIB = 1 << 20
needs_openssl = pytest.mark.skipif(
    shutil.which("openssl") is None, reason="openssl is not installed: it makes certificates"
)


def run(work: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(asyncio.wait_for(work, 90))


async def hand_over(mover: Mover, link: BlobLink) -> None:
    """As a migration does with what it receives."""
    while True:
        kind, data = await mover.receive(60)
        if kind == CLOSED:
            link.over(MigrationFailed(f"the connection to the other host is over: {mover.why}: try again"))
            return
        assert kind == KIND
        link.heard(data)


@contextlib.asynccontextmanager
async def joined(rig: Rig, folder: Path) -> AsyncIterator[tuple[Mover, Mover]]:
    """The rig's two ends, by movers."""
    authority = Authority(folder)
    memory, into = Memory(16), Memory(16)
    async with zygote() as client, pair(client, authority.host("a"), authority.host("b"), memory, into) as (one, other):
        rig.near, rig.far = BlobLink(one.blob), BlobLink(other.blob)  # type: ignore[assignment]
        loop = asyncio.get_running_loop()
        tasks = [loop.create_task(hand_over(mover, link)) for mover, link in ((one, rig.near), (other, rig.far))]  # type: ignore[arg-type]
        try:
            yield one, other
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


async def writing(guest: Guest) -> None:
    while True:
        guest.something()
        guest.loop.run()
        await asyncio.sleep(0.002)


@needs_openssl
@pytest.mark.parametrize("kind", FORMATS)
def test_a_disk_goes_over_a_movers_connection(tmp_path: Path, kind: str) -> None:
    async def work() -> None:
        rig = Rig(tmp_path)
        path = rig.image("disk", kind, 48 * MIB)
        guest = await rig.attach(path, kind)
        for number in range(40):
            guest.write(number * 2000, number + 1, 11)
            await guest.settle()
        async with joined(rig, tmp_path):
            await rig.begin()
            load = asyncio.get_running_loop().create_task(writing(guest))
            for _ in range(3):
                await rig.source.round()
            load.cancel()
            await asyncio.gather(load, return_exceptions=True)
            await guest.settle()
            guest.disconnect()
            await rig.source.finish()
            for opened in (await rig.end()).values():
                opened.close()
        await rig.close()
        assert content(rig.homes[1] / "images" / "disk", kind) == content(path, kind)

    run(work())


@needs_openssl
def test_a_mover_that_dies_ends_the_mirror_on_both_sides(tmp_path: Path) -> None:
    async def work() -> None:
        rig = Rig(tmp_path)
        path = rig.image("disk.img", "raw", 16 * MIB)
        path.write_bytes(os.urandom(16 * MIB))
        guest = await rig.attach(path, "raw")
        async with joined(rig, tmp_path) as (near, _):
            await rig.begin(rate=4 * MIB)
            copying = asyncio.get_running_loop().create_task(rig.source.round())
            while not rig.source.progress()[0]:
                await asyncio.sleep(0.01)
            await near.close()
            with pytest.raises(MigrationFailed, match="is over"):
                await copying
            with pytest.raises(MigrationFailed, match="is over"):
                await rig.serving
            await rig.source.abort()
            await rig.target.abort()
        guest.write(0, 42)
        await guest.settle()
        await rig.close()
        assert not rig.images_left()

    run(work())


def test_who_sends_more_than_it_may_is_not_listened_to() -> None:
    async def work() -> None:
        async def blob(_kind: str, _data: bytes | int) -> None: ...

        link = BlobLink(blob)
        for number in range(4 * WINDOW):
            link.heard(bytes([number]))
        taken = 0
        with pytest.raises(MigrationFailed, match="sends more of its disks than it may"):
            while True:
                assert await link.receive() == bytes([taken])
                taken += 1
        assert WINDOW < taken < 4 * WINDOW
        with pytest.raises(MigrationFailed, match="sends more"):
            await link.send(b"x")

    run(work())


def test_what_waits_is_told_of_the_end() -> None:
    async def work() -> None:
        async def blob(_kind: str, _data: bytes | int) -> None: ...

        link = BlobLink(blob)
        waiting = asyncio.get_running_loop().create_task(link.receive())
        await asyncio.sleep(0)
        link.over(MigrationFailed("over"))
        with pytest.raises(MigrationFailed):
            await waiting

    run(work())
