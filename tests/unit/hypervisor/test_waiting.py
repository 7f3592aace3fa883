"""Waiting within a time."""

from __future__ import annotations

import asyncio
import contextlib

import pytest

from hypervisor.waiting import within


def test_what_it_gives() -> None:
    async def test() -> None:
        assert await within(asyncio.sleep(0, "it"), 10) == "it"
        with pytest.raises(KeyError):
            await within(_fails(), 10)

    asyncio.run(test())


def test_it_ends_in_time_and_waits_for_what_it_cancels() -> None:
    ended: list[str] = []

    async def tidy() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            ended.append("tidied")

    async def test() -> None:
        with pytest.raises(TimeoutError):
            await within(tidy(), 0.001)
        assert ended == ["tidied"]
        task = asyncio.ensure_future(within(tidy(), 10))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert ended == ["tidied", "tidied"]

    asyncio.run(test())


def test_a_cancellation_in_the_same_moment_is_not_lost() -> None:
    async def test() -> None:
        for fails in (False, True):
            future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            task = asyncio.ensure_future(within(future, 10))
            await asyncio.sleep(0)
            if fails:
                future.set_exception(KeyError())
            else:
                future.set_result(None)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    asyncio.run(test())


def test_a_task_that_was_cancelled_before_can_wait() -> None:
    async def lives_on() -> str:
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.Event().wait()
        with pytest.raises(TimeoutError):
            await within(asyncio.Event().wait(), 0.001)
        return "in time"

    async def test() -> None:
        task = asyncio.ensure_future(lives_on())
        await asyncio.sleep(0)
        task.cancel()
        assert await task == "in time"

    asyncio.run(test())


async def _fails() -> None:
    raise KeyError
