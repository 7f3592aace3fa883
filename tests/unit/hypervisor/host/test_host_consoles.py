"""The hub that one console's rings come to and go from."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hypervisor.host.consoles import ConsoleHub


class Ring:
    """A guest that takes all that is typed."""

    ended = False

    def __init__(self) -> None:
        self.typed = b""

    def attach(self, output: Callable[[], None], space: Callable[[], None], history: int) -> Ring:
        return self

    def send(self, data: bytes) -> int:
        self.typed += data
        return len(data)

    def take(self) -> bytes:
        return b""


@pytest.mark.parametrize("end", ["connect", "unhold", "close"])
def test_what_is_typed_while_the_ring_is_away_for_a_moment_waits(tmp_path: Path, end: str) -> None:
    async def test() -> bytes:
        hub = ConsoleHub(tmp_path, 1000)
        ring: Any = Ring()
        hub.connect(ring)
        await hub.typed(b"a")
        hub.hold()
        hub.disconnect()
        typing = asyncio.ensure_future(hub.typed(b"b"))
        for _ in range(5):
            await asyncio.sleep(0)
        assert not typing.done()
        {"connect": lambda: hub.connect(ring), "unhold": hub.unhold, "close": hub.close}[end]()
        async with asyncio.timeout(10):
            await typing
        return bytes(ring.typed)

    assert asyncio.run(test()) == (b"ab" if end == "connect" else b"a")


def test_what_is_typed_when_there_is_no_guest_is_lost(tmp_path: Path) -> None:
    async def test() -> None:
        hub = ConsoleHub(tmp_path, 1000)
        async with asyncio.timeout(10):
            await hub.typed(b"x")

    asyncio.run(test())
