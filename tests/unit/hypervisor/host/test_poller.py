"""The channel thread's poller: descriptors come and go, calls come from elsewhere, and nothing that fails stops it."""

from __future__ import annotations

import os
import threading

from hypervisor.host.handles import answer, ring
from hypervisor.host.poller import Poller


def bell() -> int:
    return os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)


def test_descriptors_are_watched_until_they_are_removed():
    poller, one, heard = Poller(), bell(), []
    poller.add(one, lambda: heard.append(answer(one)))
    ring(one)
    poller.run_once(1000)
    poller.run_once(0)
    assert heard == [True]
    poller.remove(one)
    poller.remove(one)
    ring(one)
    poller.run_once(0)
    assert heard == [True]
    os.close(one)


def test_a_callback_may_remove_another_that_is_ready_too():
    poller, bells, heard = Poller(), [bell(), bell()], []

    def first(mine: int, other: int) -> None:
        heard.append(mine)
        answer(bells[mine])
        poller.remove(bells[other])

    poller.add(bells[0], lambda: first(0, 1))
    poller.add(bells[1], lambda: first(1, 0))
    for one in bells:
        ring(one)
    poller.run_once(1000)
    assert len(heard) == 1
    for one in bells:
        os.close(one)


def test_calls_from_other_threads_wake_it_and_failures_are_survived(caplog):
    poller, seen = Poller(), []
    thread = threading.Thread(target=lambda: (poller.call(lambda: 1 / 0), poller.call(lambda: seen.append(1))))
    thread.start()
    thread.join()
    poller.run_once(1000)
    assert seen == [1] and "in the channel thread" in caplog.text
