"""Two mover processes, real TLS, the loopback interface."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
from collections.abc import Awaitable, Callable, Iterator

import mover_rig
import pytest
from mover_rig import Authority, Memory, bitmap, pair

from hypervisor.errors import MigrationFailed
from hypervisor.host.mover import CLOSED, TlsFiles
from hypervisor.host.zygote_client import ZygoteClient
from hypervisor.types import PAGE_SIZE

PAGES = 600
ROUND_TRIP = 20.0


@dataclasses.dataclass
class Place:
    """What the tests of this file share."""

    loop: asyncio.Runner
    zygote: ZygoteClient
    ca: Authority
    source: TlsFiles
    target: TlsFiles

    def run(self, test: Callable[[], Awaitable[None]]) -> None:
        async def bounded() -> None:
            async with asyncio.timeout(60):
                await test()

        self.loop.run(bounded())


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    ca = Authority(tmp_path_factory.mktemp("ca"))
    source, target = ca.host("source"), ca.host("target")
    with asyncio.Runner() as runner:
        stack = contextlib.AsyncExitStack()
        zygote = runner.run(stack.enter_async_context(mover_rig.zygote()))
        yield Place(runner, zygote, ca, source, target)
        runner.run(stack.aclose())


def test_pages_and_blobs_arrive(place: Place) -> None:
    async def test() -> None:
        memory, into = Memory(PAGES), Memory(PAGES)
        contents = {number: os.urandom(PAGE_SIZE) for number in range(0, PAGES, 3)}
        for number, content in contents.items():
            memory.write(number, content)
        into.write(1, b"left from before")
        async with pair(place.zygote, place.source, place.target, memory, into) as (sender, receiver):
            sent = await sender.pages(bitmap(PAGES, range(PAGES)))
            assert sent.pages == PAGES and sent.zero == PAGES - len(contents)
            assert sent.bytes > len(contents) * PAGE_SIZE and sent.seconds > 0
            assert into.all() == memory.all()
            memory.write(7, b"new")
            memory.write(8, b"not sent")
            last = await sender.pages(bitmap(PAGES, [7]), last=True)
            assert (last.pages, last.zero) == (1, 0)
            await sender.blob("state", b"x" * 3_000_000)
            assert await receiver.receive(ROUND_TRIP) == ("state", b"x" * 3_000_000)
            assert into.read(7) == memory.read(7) and into.read(8) != memory.read(8)
            await receiver.blob("complete", b"")
            assert await sender.receive(ROUND_TRIP) == ("complete", b"")

    place.run(test)


def test_the_end_is_told_to_the_other_side(place: Place) -> None:
    async def test() -> None:
        memory, into = Memory(8), Memory(8)
        async with pair(place.zygote, place.source, place.target, memory, into) as (sender, receiver):
            await sender.close()
            assert await receiver.receive(ROUND_TRIP) == (CLOSED, b"")
            assert await receiver.receive(ROUND_TRIP) == (CLOSED, b"")
            with pytest.raises(MigrationFailed):
                await receiver.blob("late", b"")
            with pytest.raises(MigrationFailed):
                await sender.pages(bitmap(8, []))

    place.run(test)
