"""Waiting for something no longer than so many seconds, in a task that others may cancel."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

_T = TypeVar("_T")


async def within(awaitable: Awaitable[_T], seconds: float) -> _T:
    """What `awaitable` gives. Its own end is waited for, also after it was cancelled.

    Used instead of asyncio.wait_for, which loses a cancellation that comes in the same moment as what it waits for
    (before Python 3.12: whoever cancelled the task then waits for ever), and instead of asyncio.timeout, which takes
    its own end for a cancellation in a task that was cancelled before (in 3.11.2, Debian 12's).

    :raises TimeoutError: it took longer, and was cancelled.
    """
    future = asyncio.ensure_future(awaitable)
    try:
        await asyncio.wait([future], timeout=seconds)
    except asyncio.CancelledError:
        await _cancelled(future)
        raise
    if not future.done():
        await _cancelled(future)
        raise TimeoutError
    return future.result()


async def _cancelled(future: asyncio.Future[_T]) -> None:
    future.cancel()
    await asyncio.wait([future])
    if not future.cancelled():
        future.exception()  # seen: nobody else asks for it
