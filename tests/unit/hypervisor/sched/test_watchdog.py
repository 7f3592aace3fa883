"""A guest's watchdogs, and which of a domain's timers are due when."""

from __future__ import annotations

import json

import pytest
from pv_rig import FIRST_FREE, E, Rig, call, code_of, put

from hypervisor import abi
from hypervisor.sched.timers import Timers
from hypervisor.sched.watchdog import Watchdogs

ARG = FIRST_FREE * 4096
S = 1_000_000_000


def test_two_watchdogs() -> None:
    dogs = Watchdogs()
    assert dogs.next == 0 and not dogs.over(1 << 62)
    assert [dogs.set(0, 10, 5), dogs.set(0, 20, 5)] == [1, 2]
    assert code_of(dogs.set, 0, 5, 5) == E.ENOSPC and dogs.next == 10 * S + 5
    assert dogs.set(1, 30, 5) == 0 and dogs.next == 20 * S + 5, "set anew"
    assert not dogs.over(20 * S) and dogs.over(20 * S + 5)
    assert dogs.set(2, 0, 5) == 0 and dogs.next == 30 * S + 5, "stopped"
    assert code_of(dogs.set, 2, 7, 5) == E.EINVAL, "not in use any more"
    assert dogs.set(0, 1, 5) == 2, "free again"


@pytest.mark.parametrize("number", [1, 2, 3, 0xFFFF_FFFF])
@pytest.mark.parametrize("timeout", [0, 1])
def test_watchdogs_that_are_not_in_use(number: int, timeout: int) -> None:
    assert code_of(Watchdogs().set, number, timeout, 5) == E.EINVAL


def test_one_taken_with_no_time_is_over_at_once() -> None:
    dogs = Watchdogs()
    assert dogs.set(0, 0, 0) == 1 and dogs.over(1)


def test_watchdogs_are_saved() -> None:
    dogs, copy = Watchdogs(), Watchdogs()
    dogs.set(0, 3, 0)
    dogs.set(0, 0xFFFF_FFFF, 9)
    dogs.set(1, 0, 0)
    copy.restore(json.loads(json.dumps(dogs.save())))
    assert copy.save() == dogs.save() and copy.next == 0xFFFF_FFFF * S + 9
    for bad in ([], [None], [1, -1], [1, "2"], [None, 1 << 64]):
        with pytest.raises(ValueError, match="watchdogs"):
            copy.restore(bad)


@pytest.mark.parametrize(
    ("number", "timeout", "result"), [(0, 5, 1), (1, 5, -E.EINVAL), (3, 0, -E.EINVAL), (0, 0xFFFF_FFFF, 1)]
)
def test_the_hypercall(number: int, timeout: int, result: int) -> None:
    rig = Rig().boot()
    changes: list[int] = []
    rig.domain.timer_changed = changes.append
    put(rig, "<2I", number, timeout)
    assert call(rig, abi.HYPERVISOR_sched_op, abi.SCHEDOP_watchdog, ARG) == result
    assert bool(changes) == (result > 0) == bool(rig.domain.watchdogs.next)
    assert changes == [rig.domain.watchdogs.next] * len(changes)
    assert call(rig, abi.HYPERVISOR_sched_op, abi.SCHEDOP_watchdog, 1 << 40) == -E.EFAULT


def timers(rig: Rig, barks: list[str] | None = None) -> Timers:
    domain = rig.domain
    said = [] if barks is None else barks
    return Timers(domain.vcpus, domain.events, domain.watchdogs, lambda: said.append("over"))


def test_a_watchdog_ends_it() -> None:
    rig, barks = Rig().boot(), []
    due = timers(rig, barks)
    rig.domain.watchdogs.set(0, 1, 5)
    assert due.next() == S + 5
    due.fire(S)
    assert not barks
    due.fire(S + 5)
    assert barks == ["over"]


def test_the_periodic_timer_is_for_vcpus_that_run_and_listen() -> None:
    rig = Rig().boot()
    due, vcpu = timers(rig), rig.domain.vcpus[0]
    period = vcpu.periodic_ns
    assert period == 10_000_000 and due.next() == 0, "nobody listens"
    port = rig.domain.events.bind_virq(abi.VIRQ_TIMER, 0, 1)
    assert due.next() == period
    vcpu.blocked = True
    assert due.next() == 0, "it wakes nobody"
    due.fire(5 * period)
    assert not rig.domain.events.is_pending(port)
    vcpu.blocked = False
    due.fire(5 * period)
    assert rig.domain.events.is_pending(port) and due.next() == 6 * period, "what it missed is one tick"
    vcpu.up = False
    assert due.next() == 0


def test_the_earliest_of_all() -> None:
    rig = Rig(vcpus=2).boot()
    due, (first, second) = timers(rig), rig.domain.vcpus
    rig.domain.watchdogs.set(0, 9, 0)
    assert due.next() == 9 * S
    first.state.deadline = 8 * S
    assert due.next() == 8 * S
    first.blocked, first.poll, first.poll_deadline = True, (1,), 7 * S
    assert due.next() == 7 * S
    second.state.deadline = 6 * S
    assert due.next() == 7 * S, "a vCPU that is down has no timers"
    second.up = True
    assert due.next() == 6 * S
    due.fire(6 * S)
    assert second.state.deadline == 0 and due.next() == 7 * S
