"""The last moments of a device that the guest has closed and the host is about to take away.

Linux's block front end stops its queues before it says that it has closed, with requests in them that it has not sent
yet. It starts them again at the next event from the back end, whatever that is about (drivers/block/xen-blkfront.c,
blkfront_closing and blkif_interrupt). Without one its removal waits for these requests for ever, and with it every
other change of a device: there is one thread for all (xenwatch). So events are sent, and requests served, until no
more come.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping

QUIET_ROUNDS = 3
PAUSE = 0.25
"""Seconds between two rounds: a guest on a busy machine has to get its turn."""
MOST = 5.0
"""Seconds for all; a front end that always has one request more is cut off."""


async def until_quiet(ask: Callable[[], Awaitable[Mapping[str, int] | None]]) -> None:
    """:param ask: sends events, serves what comes, and tells what was counted up to now; None: nothing can come."""
    loop = asyncio.get_running_loop()
    end = loop.time() + MOST
    before, quiet = await ask(), 0
    while before is not None and quiet < QUIET_ROUNDS and loop.time() < end:
        await asyncio.sleep(PAUSE)
        now = await ask()
        quiet = quiet + 1 if now == before else 0
        before = now
