"""The order of vCPUs on the engine."""

from __future__ import annotations

from hypervisor.sched.vcpus import BOOST_LIMIT, VcpuQueue


def picks(queue: VcpuQueue, count: int, runnable: set[int]) -> list[int | None]:
    return [queue.pick(runnable.__contains__) for _ in range(count)]


def test_runnable_vcpus_take_turns() -> None:
    assert picks(VcpuQueue(4), 6, {0, 2, 3}) == [0, 2, 3, 0, 2, 3]


def test_nobody_runs_when_all_wait() -> None:
    assert VcpuQueue(3).pick(lambda _number: False) is None


def test_a_woken_vcpu_runs_next_and_keeps_its_turn() -> None:
    queue = VcpuQueue(4)
    assert picks(queue, 1, {0, 1, 2, 3}) == [0]
    queue.woken(3)
    assert picks(queue, 4, {0, 1, 2, 3}) == [3, 1, 2, 3]


def test_one_that_gives_way_runs_after_all_others() -> None:
    queue = VcpuQueue(3)
    queue.woken(0)
    assert queue.pick(lambda _number: True) == 0, "out of turn"
    queue.yielded(0)
    assert picks(queue, 4, {0, 1, 2}) == [1, 2, 0, 1]


def test_two_that_wake_each_other_do_not_starve_a_third() -> None:
    queue = VcpuQueue(3)
    seen = []
    for turn in range(4 * BOOST_LIMIT):
        queue.woken(turn % 2)
        seen.append(queue.pick(lambda _number: True))
    assert seen.count(2) >= 1


def test_a_wake_up_of_one_that_waits_again_is_forgotten() -> None:
    queue = VcpuQueue(2)
    queue.woken(1)
    assert queue.pick({0}.__contains__) == 0


def test_saved_order_goes_on() -> None:
    queue = VcpuQueue(4)
    picks(queue, 2, {0, 1, 2, 3})
    queue.woken(0)
    other = VcpuQueue.restore(queue.save())
    assert picks(other, 6, {0, 1, 2, 3}) == picks(queue, 6, {0, 1, 2, 3})
