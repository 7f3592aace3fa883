"""Guests move live between two domain processes, by movers over TLS; no host process is there to make it easy."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "guests"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))

import build
import move_rig
from authority import Authority
from move_rig import Place, Said, move, request_for, store_for

from hypervisor.host.zygote_client import ZygoteClient

pytestmark = pytest.mark.skipif(build.available() is not None, reason=str(build.available()))
MOVES = 4


@pytest.mark.parametrize("zstd", [False, True], ids=["plain", "zstd"])
def test_a_guest_moves_again_and_again(tmp_path: Path, zstd: bool) -> None:
    async def test() -> None:
        ca = Authority(tmp_path)
        tls = ca.host("source"), ca.host("target")
        zygote = ZygoteClient(move_rig.PV_RUNTIME)
        await zygote.start()
        said = Said()
        request = request_for(str(build.build_guest("onward")), cmdline="count=500")
        place = await Place.make(zygote, tmp_path / "0", request, said)
        try:
            server = store_for(request, place.boot)
            place.attach(server)
            await place.process.request("unpause")
            for number in range(MOVES):
                ticks = said.text.count("tick")
                await said.until(lambda text, ticks=ticks: text.count("tick") > ticks + 1)
                place, times = await move(
                    place, zygote, tmp_path / str(number + 1), tls, server, early=bool(number % 2), zstd=zstd
                )
                assert times["last pages"] < place.pages // 2
            async with asyncio.timeout(move_rig.DEADLINE):
                await place.ended.wait()
            assert place.reason == "poweroff"
            await said.until(lambda text: "passed, 0 failed" in text)
            assert "FAIL" not in said.text and said.text.count("onward: tick 250\n".strip()) == 1
        finally:
            await place.end()
            await zygote.stop()

    asyncio.run(test())
