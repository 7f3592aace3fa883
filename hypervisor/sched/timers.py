"""What of a domain is due when: one-shot and periodic timers, polls, watchdogs.

A vCPU's periodic timer runs only while the vCPU does not wait, as in Xen (sched_context_switch stops it): it wakes
nobody, so a guest that never stops it costs nothing while it is idle. A guest that does not listen costs nothing at
all.
"""

from __future__ import annotations

from collections.abc import Callable

from hypervisor import abi
from hypervisor.cpu.state import Vcpu
from hypervisor.evtchn.core import EventChannels
from hypervisor.sched.watchdog import Watchdogs

_NEVER = 1 << 64


class Timers:
    """Of one domain. Times are system time in nanoseconds, 0: never.

    :param bark: called when a watchdog is over.
    """

    __slots__ = ("_bark", "_events", "_vcpus", "_watchdogs")

    def __init__(
        self, vcpus: list[Vcpu], events: EventChannels, watchdogs: Watchdogs, bark: Callable[[], None]
    ) -> None:
        self._vcpus = vcpus
        self._events = events
        self._watchdogs = watchdogs
        self._bark = bark

    def next(self) -> int:
        """When the earliest of them is due."""
        best = self._watchdogs.next or _NEVER
        for vcpu in self._vcpus:
            if not vcpu.up:
                continue
            if 0 < (deadline := vcpu.state.deadline) < best:
                best = deadline
            if vcpu.blocked:
                if vcpu.poll is not None and 0 < vcpu.poll_deadline < best:
                    best = vcpu.poll_deadline
            elif 0 < vcpu.periodic_next < best and self._listens(vcpu):
                best = vcpu.periodic_next
        return best if best != _NEVER else 0

    def _listens(self, vcpu: Vcpu) -> bool:
        return (vcpu.id, abi.VIRQ_TIMER) in self._events.virqs

    def fire(self, now: int) -> None:
        """Raise the events of what is due, let a watchdog bark; polls end where vCPUs are chosen."""
        events = self._events
        for vcpu in self._vcpus:
            if 0 < vcpu.state.deadline <= now:
                vcpu.state.deadline = 0
                events.raise_virq(abi.VIRQ_TIMER, vcpu.id)
            if 0 < vcpu.periodic_next <= now and vcpu.up and not vcpu.blocked and self._listens(vcpu):
                vcpu.periodic_next = now + vcpu.periodic_ns
                events.raise_virq(abi.VIRQ_TIMER, vcpu.id)
        if self._watchdogs.over(now):
            self._bark()
