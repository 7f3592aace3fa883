"""The order of vCPUs on the engine."""

from __future__ import annotations

from hypervisor.sched.vcpus import BOOST_LIMIT, HOLD_NS, HOLDS, SLICE_NS, WOKEN_NS, VcpuQueue

ALL = range(32)


def picks(queue: VcpuQueue, count: int, runnable: set[int]) -> list[int | None]:
    """Who runs in the next slices, all of them used up."""
    return [queue.pick(queue.slice_end, runnable.__contains__) for _ in range(count)]


def test_a_turn_lasts_a_slice() -> None:
    queue = VcpuQueue(2)
    assert [queue.pick(now, ALL.__contains__) for now in (0, 1, SLICE_NS - 1, SLICE_NS)] == [0, 0, 0, 1]
    assert queue.slice_end == 2 * SLICE_NS


def test_who_waits_loses_the_rest_of_its_turn() -> None:
    queue = VcpuQueue(3)
    assert [queue.pick(0, ALL.__contains__), queue.pick(1, {1, 2}.__contains__)] == [0, 1]
    assert picks(queue, 3, {0, 1, 2}) == [2, 0, 1]


def test_a_woken_vcpu_waits_a_little_and_who_it_interrupts_has_the_rest_of_its_turn() -> None:
    queue = VcpuQueue(3)
    assert queue.pick(0, ALL.__contains__) == 0
    queue.woken(2, 100)
    assert queue.slice_end == 100 + WOKEN_NS and queue.pick(101, ALL.__contains__) == 0
    now = queue.slice_end
    assert queue.pick(now, ALL.__contains__) == 2 and queue.slice_end == now + SLICE_NS
    assert queue.pick(now + 5, {0, 1}.__contains__) == 0, "it waits again"
    assert queue.slice_end == now + 5 + SLICE_NS - 100 - WOKEN_NS
    assert queue.pick(queue.slice_end, ALL.__contains__) == 1


def test_who_takes_no_events_is_let_go_on_for_a_while() -> None:
    queue = VcpuQueue(2)
    queue.pick(0, ALL.__contains__)
    ran = []
    for _ in range(HOLDS + 2):
        ran.append(queue.pick(queue.slice_end, ALL.__contains__, hold=True))
    assert ran == [0] * HOLDS + [1, 1] and queue.slice_end == 2 * SLICE_NS + HOLD_NS + HOLD_NS // HOLDS
    assert queue.pick(queue.slice_end, ALL.__contains__) == 0, "it is out of there"


def test_waking_again_and_again_lengthens_nothing() -> None:
    queue = VcpuQueue(4)
    queue.pick(0, ALL.__contains__)
    ends = []
    for now in range(0, WOKEN_NS, 1000):
        queue.woken(3, now)
        ends.append(queue.slice_end)
    assert set(ends) == {WOKEN_NS}
    queue.pick(WOKEN_NS, ALL.__contains__)
    queue.slice_end = 0  # nobody else could run
    queue.woken(2, 50 * SLICE_NS)
    assert queue.slice_end == 50 * SLICE_NS + WOKEN_NS


def test_one_that_wakes_others_for_ever_gets_no_more_than_its_turn() -> None:
    queue, ran, now = VcpuQueue(3), [0, 0, 0], 0
    for _ in range(200):
        number = queue.pick(now, ALL.__contains__)
        assert number is not None
        if number == 0:
            queue.woken(1, now)
        ran[number] += queue.slice_end - now
        now = queue.slice_end
    assert ran[0] <= ran[2] + SLICE_NS and ran[2] >= now // 10


def test_runnable_vcpus_take_turns() -> None:
    assert picks(VcpuQueue(4), 6, {0, 2, 3}) == [0, 2, 3, 0, 2, 3]


def test_nobody_runs_when_all_wait() -> None:
    assert VcpuQueue(3).pick(0, lambda _number: False) is None


def test_a_woken_vcpu_runs_next_and_keeps_its_turn() -> None:
    queue = VcpuQueue(4)
    assert picks(queue, 1, {0, 1, 2, 3}) == [0]
    queue.woken(3, queue.slice_end)
    assert picks(queue, 4, {0, 1, 2, 3}) == [3, 1, 2, 3]


def test_one_that_gives_way_runs_after_all_others() -> None:
    queue = VcpuQueue(3)
    queue.woken(0, queue.slice_end)
    assert queue.pick(queue.slice_end, lambda _number: True) == 0, "out of turn"
    queue.yielded(0)
    assert picks(queue, 4, {0, 1, 2}) == [1, 2, 0, 1]


def test_two_that_wake_each_other_do_not_starve_a_third() -> None:
    queue = VcpuQueue(3)
    seen = []
    for turn in range(4 * BOOST_LIMIT):
        queue.woken(turn % 2, queue.slice_end)
        seen.append(queue.pick(queue.slice_end, lambda _number: True))
    assert seen.count(2) >= 1


def test_a_wake_up_of_one_that_waits_again_is_forgotten() -> None:
    queue = VcpuQueue(2)
    queue.woken(1, 0)
    assert queue.pick(0, {0}.__contains__) == 0


def test_saved_order_goes_on() -> None:
    queue = VcpuQueue(4)
    picks(queue, 2, {0, 1, 2, 3})
    queue.woken(0, queue.slice_end)
    other = VcpuQueue.restore(queue.save())
    assert picks(other, 6, {0, 1, 2, 3}) == picks(queue, 6, {0, 1, 2, 3})
