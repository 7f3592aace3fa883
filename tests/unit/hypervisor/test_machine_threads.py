"""What other threads may do to a running machine, without a lost wake-up."""

from __future__ import annotations

import collections
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import harness
import pytest
from harness import DEADLINE, GuestRun, running

pytestmark = pytest.mark.skipif(harness.build.available() is not None, reason=str(harness.build.available()))

ROUNDS = 300


@pytest.fixture
def runs() -> Iterator[list[GuestRun]]:
    yield from harness.guest_runs()


KINDS = pytest.mark.parametrize(
    "name", ["hello", "spin", "yields"], ids=["a blocked guest", "a spinning guest", "a yielding guest"]
)


@KINDS
@pytest.mark.parametrize("public", [False, True], ids=["direct", "public"])
def test_each_post_is_taken(runs: list[GuestRun], name: str, public: bool) -> None:
    """One after the other, each from a moment that the machine did not choose."""
    guest = running(runs, name, public=public)
    guest.wait_text("ready" if name == "hello" else "spinning")
    taken = [guest.call(lambda n=n: n) for n in range(ROUNDS)]
    assert taken == list(range(ROUNDS))


class Interrupted(collections.deque[Any]):
    """The machine's posts; at the chosen look at them another thread posts just after they were seen to be none."""

    looks_left = -1
    interrupt: Callable[[], None] = staticmethod(lambda: None)

    def __bool__(self) -> bool:
        some = len(self) > 0
        self.looks_left -= 1
        if self.looks_left == 0:
            thread = threading.Thread(target=self.interrupt)
            thread.start()
            # To its end, but for the look that is made under the lock that a post takes last.
            thread.join(0.2)
        return some


@KINDS
def test_a_post_at_any_moment_of_the_loop_is_taken(runs: list[GuestRun], name: str) -> None:
    guest = running(runs, name)
    guest.wait_text("ready" if name == "hello" else "spinning")
    posts = Interrupted()
    guest.call(lambda: setattr(guest.machine, "_posts", posts))
    for look in range(1, 13):
        taken = threading.Event()
        posts.interrupt = lambda done=taken: guest.machine.post(done.set)
        posts.looks_left = look
        for _ in range(look):
            guest.call(lambda: None)  # the loop goes round, and looks
        assert taken.wait(DEADLINE), f"the post after look {look} was lost"


def test_a_guest_that_only_yields_leaves_the_cpu_to_others(runs: list[GuestRun]) -> None:
    guest = running(runs, "yields")
    guest.wait_text("spinning")
    times: list[tuple[float, float]] = []  # of the clock, of this thread's CPU, at each nap
    done = threading.Event()
    nap = guest.machine._nap

    def counted(now: int) -> None:
        times.append((time.monotonic(), time.thread_time()))
        if len(times) == 500:
            done.set()
        nap(now)

    guest.call(lambda: setattr(guest.machine, "_nap", counted))  # a post: the yields are counted anew
    assert done.wait(DEADLINE)
    (start, used), (end, used_then) = times[250], times[499]
    assert used_then - used < 0.5 * (end - start)


def test_notify_round_trips(runs: list[GuestRun]) -> None:
    """A line typed, the event, the guest's echo and its event back: each needs the one before."""
    guest = running(runs, "hello")
    guest.wait_text("hello: ready")
    for number in range(100):
        guest.type(f"line {number}\n")
        guest.wait_text(f"echo: line {number}\n")
    assert guest.ended is None


def test_many_threads_post_at_once(runs: list[GuestRun]) -> None:
    guest = running(runs, "spin")
    guest.wait_text("spinning")
    taken: list[int] = []
    done = threading.Event()

    def take(number: int) -> None:
        taken.append(number)
        if len(taken) == 4 * 200:
            done.set()

    def poster(first: int) -> None:
        for number in range(first, first + 200):
            guest.machine.post(lambda: take(number))  # noqa: B023  read at once is not needed: only counted

    threads = [threading.Thread(target=poster, args=(n * 200,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE)
    assert done.wait(DEADLINE), f"{len(taken)} of 800 taken"


def test_pause_and_unpause_from_another_thread_never_hang(runs: list[GuestRun]) -> None:
    guest = running(runs, "hello")
    guest.wait_text("hello: ready")
    for number in range(50):
        guest.machine.pause()
        guest.type(f"while paused {number}\n")
        assert guest.call(guest.machine.stats)["paused"]
        guest.machine.unpause()
        guest.wait_text(f"echo: while paused {number}\n")


def test_stats_are_sane_while_they_change(runs: list[GuestRun]) -> None:
    guest = running(runs, "spin")
    guest.wait_text("spinning")
    last = 0
    for _ in range(2000):
        used = guest.machine.stats()["cpu_time_ns"]
        assert last - 50_000_000 <= used < last + 60_000_000_000
        last = max(last, used)
    assert guest.machine.stats()["memory_pages"] == 2048 and guest.machine.stats()["vcpus"] == 1


@pytest.mark.parametrize("name", ["hello", "spin", "idle"])
def test_stop_ends_any_guest(runs: list[GuestRun], name: str) -> None:
    guest = running(runs, name)
    guest.wait(lambda: ":" in guest.text, "first output")
    guest.machine.stop()
    assert guest.wait_end().detail == "stopped by the host"


def test_stop_ends_a_guest_that_never_started(runs: list[GuestRun]) -> None:
    guest = GuestRun("hello")
    runs.append(guest)
    guest.machine.stop()
    assert guest.wait_end().detail == "stopped by the host"
    assert guest.text == ""


def test_a_bug_in_a_post_ends_this_domain_with_a_clear_word(runs: list[GuestRun]) -> None:
    guest = running(runs, "spin")
    guest.wait_text("spinning")

    def broken() -> None:
        raise ZeroDivisionError("on purpose")

    guest.machine.post(broken)
    assert guest.wait_end().detail == "hypervisor bug: ZeroDivisionError: on purpose"


@pytest.mark.parametrize("attempt", range(4))
def test_no_hypercall_is_lost_to_a_stop_request(runs: list[GuestRun], attempt: int) -> None:
    """The alarm's thread stops the engine at any instruction, also between a `syscall` and what handles it.

    It needs no interpreter lock, so it hits the guest while it runs. An engine that loses such calls does so in most
    attempts.
    """
    guest = running(runs, "hypercalls")
    while guest.ended is None:
        taken = threading.Event()
        guest.machine.post(taken.set)
        taken.wait(0.01)
    assert guest.failures() == [] and "hypercalls: OK" in guest.text, guest.text[-2000:]
