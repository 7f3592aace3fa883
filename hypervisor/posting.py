"""What other threads may ask of a running machine: each hands a function to its run loop.

The run loop takes it between two guest instructions.
"""

from __future__ import annotations

import collections
import threading
import time
from collections.abc import Callable
from typing import Any

from hypervisor.cpu import time as guest_time
from hypervisor.domain import Domain
from hypervisor.ending import Shutdown
from hypervisor.engines import x86
from hypervisor.native import FastPath
from hypervisor.sched.alarm import Alarm
from hypervisor.sched.cap import Cap
from hypervisor.toolstack.api import ShutdownReason


class Posting:
    """The half of a machine that belongs to nobody's thread."""

    domain: Domain
    engine: Any
    _alarm: Alarm
    _cap: Cap
    _condition: threading.Condition
    _cpu_time_ns: int
    _dispatcher: Any
    _entered_ns: int
    _exits: int
    _native: FastPath | None
    _paused: bool
    _posts: collections.deque[Callable[[], None]]
    _stopped: Shutdown | None
    _suspended: bool

    def post(self, function: Callable[[], None]) -> None:
        """Have `function` called in the run loop soon."""
        self._posts.append(function)
        self.domain.preempt = True
        with self._condition:
            self._condition.notify()
            # Under the lock: an idle machine must not find its alarm set off behind its back.
            if self._entered_ns:
                self._alarm.now()

    def pause(self) -> None:
        self.post(lambda: self._set_paused(True))

    def unpause(self) -> None:
        self.post(lambda: self._set_paused(False))

    def _set_paused(self, paused: bool) -> None:
        self._paused = paused
        if not self._suspended:
            self._stand_still(paused)

    def resume(self) -> None:
        """Let a guest that has suspended itself go on where it is: to it the suspension was cancelled."""
        self.post(self._resume)

    def _resume(self) -> None:
        if self._suspended:
            self._suspended = False
            self.domain.shutdown_code = None
            # What SCHEDOP_shutdown returns when nothing came of it (public/sched.h).
            self.engine.regs.gpr[x86.RAX] = 1
            self._stand_still(self._paused)

    def _stand_still(self, paused: bool) -> None:
        now = self.domain.clock.now()
        for vcpu in self.domain.vcpus:
            if paused and vcpu.runstate in (guest_time.RUNSTATE_RUNNING, guest_time.RUNSTATE_RUNNABLE):
                guest_time.account(vcpu, now, guest_time.RUNSTATE_OFFLINE)
            elif not paused and vcpu.up and vcpu.runstate == guest_time.RUNSTATE_OFFLINE:
                guest_time.account(vcpu, now, guest_time.RUNSTATE_RUNNABLE)

    def set_cap(self, percent: int) -> None:
        """Let it run for no more than so much of one CPU's time; 0, and 100 or more: without limit."""
        self.post(lambda: self._cap.set(percent, self.domain.clock.now()))

    def limit_memory(self, pages: int) -> None:
        """Let it have no more RAM than that; what it has now it keeps."""
        self.domain.reservation.limit = pages

    def stop(self) -> None:
        """End the run loop; what the guest was doing is lost."""
        self.post(self._stop)

    def _stop(self) -> None:
        self._stopped = Shutdown(ShutdownReason.POWEROFF, "stopped by the host")

    def notify(self, port: int) -> None:
        """The host side signals the guest's `port`."""
        self.post(lambda: self.domain.events.pend(port))

    def stats(self) -> dict[str, Any]:
        """``cpu_time_ns`` ns of guest running, ``vcpus``, ``exits``, ``paused``, ``memory_pages``, ``hypercalls``;
        ``native`` traps that compiled code handled.
        """
        entered = self._entered_ns  # read once: the run loop clears it
        running = time.monotonic_ns() - entered if entered else 0
        return {
            "cpu_time_ns": self._cpu_time_ns + running,
            "vcpus": sum(1 for vcpu in self.domain.vcpus if vcpu.up),
            "exits": self._exits,
            "paused": self._paused,
            "memory_pages": self.domain.frames.pages(),
            "hypercalls": sum(self._dispatcher.counts.values()),
            "engine": self.engine.name,
            "native": sum(self._native.counts().values()) if self._native is not None else 0,
        }
