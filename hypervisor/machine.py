"""A running PV machine: the engine, the domain, the only run loop.

Threads: `Machine.run` and everything a trap handler does happen in one
thread; what others may ask of it is in `hypervisor.posting`.
"""

from __future__ import annotations

import collections
import dataclasses
import logging
import mmap
import threading
import time
from collections.abc import Callable
from typing import Any

from hypervisor import abi, native
from hypervisor.cpu import time as guest_time
from hypervisor.cpu.failsafe import reload_segments
from hypervisor.cpu.state import Vcpu
from hypervisor.cpu.traps32 import ModeHandler, Traps32
from hypervisor.domain import Domain, MachineConfig
from hypervisor.domain32 import Domain32
from hypervisor.ending import REASONS, Shutdown
from hypervisor.engines import unicorn as unicorn_engine
from hypervisor.engines.base import EngineError
from hypervisor.engines.tsc import measure_khz
from hypervisor.errors import GuestFault, HypervisorBug
from hypervisor.evtchn.core import ChannelState
from hypervisor.evtchn.hostside import HostRouter
from hypervisor.hypercalls.compat import Dispatcher32
from hypervisor.hypercalls.dispatch import Dispatcher
from hypervisor.posting import Posting
from hypervisor.sched.alarm import Alarm
from hypervisor.sched.cap import Cap
from hypervisor.sched.quiet import QuietDomain
from hypervisor.sched.spins import Spins
from hypervisor.sched.timers import Timers
from hypervisor.sched.vcpus import VcpuQueue
from hypervisor.toolstack.api import ShutdownReason
from hypervisor.toolstack.builder.state import BootState
from hypervisor.trapping import Trapping

LOG = logging.getLogger(__name__)

_EVENTS_MASKED = abi.VCPU_INFO_EVTCHN_UPCALL_MASK
_LONGEST_WAIT_S = 3600.0
"""A guest may ask for a timer in centuries, more than a wait can take; it is looked at again then."""

_EAGER_YIELDS, _NAP_S, _LONGEST_NAP_S = 8, 50e-6, 1e-3
"""A vCPU that yields for ever while no other can run (GRUB does, for its disk) leaves the CPU to whom it waits for:
after so many yields it naps, twice as long after each 32 more."""


class Machine(Trapping, Posting):
    """One PV domain with its engine.

    :param memory: maps the domain's whole extent (`hypervisor.memory.layout.total_frames` pages).
    :param notify_host: called in the run loop's thread when the guest signals a port of the host side.
    :param engine: a fresh engine; None: one is made.
    :param use_private: False makes the engine use its public path only.
    :param fast_path: of `native.MODES`: ``auto``: plain traps natively where that can be, ``off``: never, ``on``: or no
        machine.
    :ivar on_suspend: called in the run loop when the guest has suspended itself; then the machine waits for `resume` or
        `stop`. None: a suspension ends the run.
    :raises native.Unavailable: `fast_path` is ``on``, and cannot be.
    """

    def __init__(
        self,
        config: MachineConfig,
        memory: mmap.mmap,
        *,
        notify_host: Callable[[int], None],
        engine: Any = None,
        use_private: bool = True,
        fast_path: str = "auto",
    ) -> None:
        if not config.tsc_khz:
            config = dataclasses.replace(config, tsc_khz=measure_khz())
        self.config = config
        self.engine: Any = engine or unicorn_engine.create(use_private=use_private)
        kind = Domain32 if config.bits == 32 else Domain
        self.domain = kind(config, memory, self.engine, HostRouter(notify_host), self._wake)
        self.domain.leave = self._leave
        self.domain.timer_changed = self._due_at
        self.domain.give_way = self._give_way
        self.domain.vcpus_changed = self._woken
        self._timers = Timers(self.domain.vcpus, self.domain.events, self.domain.watchdogs, self._watchdog_over)
        self._queue = VcpuQueue(config.max_vcpus)
        self._spins = Spins(config.max_vcpus)
        self._cap = Cap()
        self._shared = config.max_vcpus > 1
        self._yields = 0  # in a row
        self._quiet = QuietDomain(self.engine.drop_translations)
        self.engine.map_memory(
            self.domain.memory.base_mpa, self.domain.memory.frames * 4096, self.domain.memory.address
        )
        self._traps = self.domain.traps
        self._native: native.FastPath | None = None
        self._dispatcher: Dispatcher | Dispatcher32
        if isinstance(self._traps, Traps32):
            self._dispatcher = Dispatcher32(self.domain)
            self.engine.set_handler(ModeHandler(self._traps, self))
        else:
            self._dispatcher = Dispatcher(self.domain)
            self._go_native(fast_path)
        self._alarm = Alarm(self.engine.kick_target())
        self._posts: collections.deque[Callable[[], None]] = collections.deque()
        self._condition = threading.Condition()
        self._paused = True
        self._stopped: Shutdown | None = None
        self._suspended = False
        self.on_suspend: Callable[[], None] | None = None
        self._leaving = False
        self._cpu_time_ns = 0
        self._entered_ns = 0
        self._exits = 0

    def _go_native(self, mode: str) -> None:
        """Set the engine's handler, with the native fast path before it."""
        domain, traps = self.domain, self._traps
        code, why = native.library() if mode != "off" else (None, "it is off")
        fast = native.FastPath(domain.tables, *domain.area.windows()) if code is not None else None
        if self.engine.set_handler(self, fast):
            self._native = traps.native = fast
            traps.set_vcpu(traps.vcpu)
        elif mode == "on":
            raise native.Unavailable(why if fast is None else "the engine is on its public path")

    @property
    def shared_info_mfn(self) -> int:
        return self.domain.memory.mfn(self.domain.area.shared_info)

    # -- start of day

    def start(self, boot: BootState) -> None:
        """Load the first vCPU after the builder filled memory. :raises XenError: the initial tables do not validate."""
        domain = self.domain
        domain.load_first_vcpu(boot)
        vcpu = domain.vcpus[0]
        vcpu.up = vcpu.initialised = True
        vcpu.state.kernel_mode = 1
        for port in (boot.store_port, boot.console_port):
            domain.events.open_host(port)
        domain.clock.update_wallclock(domain.memory, domain.area.shared_info)
        domain.clock.update_vcpu(domain.memory, vcpu)

    def came_from_elsewhere(self, cpu_time_ns: int) -> None:
        """The domain was restored with what it was on another host.

        What the host side signalled there in the last moment may be lost: it is signalled once more here.
        """
        self._cpu_time_ns = cpu_time_ns
        for port, channel in enumerate(self.domain.events.channels):
            if channel.state is ChannelState.INTERDOMAIN and channel.peer == 0:
                self.domain.events.pend(port)

    # -- the run loop

    def run(self) -> Shutdown:
        """Run the guest until it ends or `stop` is called. Never raises for what a guest does."""
        while True:
            try:
                ended = self._step()
            except GuestFault as exc:
                LOG.warning("the guest crashed: %s", exc)
                ended = Shutdown(ShutdownReason.CRASH, str(exc))
            except EngineError as exc:
                LOG.error("the engine gave up: %s", exc)
                ended = Shutdown(ShutdownReason.CRASH, f"engine: {exc}")
            except Exception as exc:
                LOG.exception("hypervisor bug; this domain ends")
                ended = Shutdown(ShutdownReason.CRASH, f"hypervisor bug: {type(exc).__name__}: {exc}")
            except BaseException:
                # The engine may go with this machine: its alarm must not go on without it.
                self._alarm.close()
                raise
            if ended:
                self._alarm.close()
                if ended.reason is not ShutdownReason.SUSPEND:
                    self.domain.grants.release()
                return ended

    def _step(self) -> Shutdown | None:
        domain = self.domain
        self._take_posts()
        if self._stopped:
            return self._stopped
        now = domain.clock.now()
        if not self._suspended:
            self._timers.fire(now)
        if domain.shutdown_code is not None:
            if domain.shutdown_code == abi.SHUTDOWN_suspend and self.on_suspend is not None:
                self._rest(self.on_suspend)
                return None
            return Shutdown(REASONS.get(domain.shutdown_code, ShutdownReason.CRASH))
        capped = self._cap.wait_until(now)
        vcpu = None if self._paused or capped else self._choose(now)
        if vcpu is None:
            self._idle(now, capped)
            return None
        if vcpu is not domain.running:
            self._yields = 0
            self._switch(vcpu, now)
        elif self._yields > _EAGER_YIELDS:
            self._nap(now)
        if vcpu.runstate != guest_time.RUNSTATE_RUNNING:
            guest_time.account(vcpu, now, guest_time.RUNSTATE_RUNNING)
            domain.publish_runstate(vcpu)
        domain.refresh_time(vcpu, now)
        if self._shared:
            # While others wait for the engine nothing that a vCPU spins for can happen.
            watched = not self._spins.unwatched_until(vcpu.id, now)
            self.engine.watch_pauses(watched and self._queue.slice_end != 0)
        self._traps.deliver_event()
        domain.preempt = False
        self._leaving = False
        if self._native is not None:
            self._native.leaving(False)
        self._set_alarm(now)
        # Announced before the last look at the posts: whoever posts after that look sees that a kick is needed.
        self._entered_ns = started = time.monotonic_ns()
        if self._posts:
            self._entered_ns = 0
            return None
        self.engine.run()
        self._exits += 1
        self._entered_ns = 0
        ran = time.monotonic_ns() - started
        self._cpu_time_ns += ran
        self._cap.ran(ran)
        if vcpu.blocked and vcpu.up:
            guest_time.account(vcpu, domain.clock.now(), guest_time.RUNSTATE_BLOCKED)
        return None

    # -- which vCPU

    def _choose(self, now: int) -> Vcpu | None:
        """The vCPU to run next; None when all wait. Sets the end of its time slice."""
        vcpus, running = self.domain.vcpus, self.domain.running
        if not self._shared:
            return vcpus[0] if self._can_run(0, now) else None
        hold = running.state.kernel_mode and self.domain.memory.bytes[running.state.vcpu_info + _EVENTS_MASKED]
        number = self._queue.pick(now, lambda n: self._can_run(n, now), hold=bool(hold))
        if number is None:
            return None
        if not any(v.id != number and v.up and not v.blocked for v in vcpus):
            self._queue.slice_end = 0
        return vcpus[number]

    def _can_run(self, number: int, now: int) -> bool:
        vcpu = self.domain.vcpus[number]
        return vcpu.up and not (vcpu.blocked and not self._unblock(vcpu, now))

    def _unblock(self, vcpu: Vcpu, now: int) -> bool:
        """Whether a blocked vCPU may run on."""
        over = vcpu.poll is not None and vcpu.poll_deadline and vcpu.poll_deadline <= now
        if over or self._traps.event_pending(vcpu):
            self._unblocked(vcpu, now)
        return not vcpu.blocked

    def _unblocked(self, vcpu: Vcpu, now: int) -> None:
        vcpu.blocked = False
        vcpu.poll = None
        guest_time.account(vcpu, now, guest_time.RUNSTATE_RUNNABLE)

    def _switch(self, vcpu: Vcpu, now: int) -> None:
        """Put another vCPU on the engine."""
        domain = self.domain
        before = domain.running
        if before.runstate == guest_time.RUNSTATE_RUNNING:
            guest_time.account(before, now, guest_time.RUNSTATE_RUNNABLE)
        # Guests look at it: who waits for a lock sleeps when its holder does not run (vcpu_is_preempted).
        domain.publish_runstate(before)
        before.cpu = self.engine.save_cpu()
        if vcpu.cpu is None:
            raise HypervisorBug(f"vCPU {vcpu.id} has no register state")
        self.engine.restore_cpu(vcpu.cpu)
        vcpu.cpu = None
        domain.running = vcpu
        self._traps.set_vcpu(vcpu)
        reload_segments(self._traps)

    def _woken(self, vcpu: Vcpu) -> None:
        """A vCPU can run again: let it soon, at once if the one that has the engine waits for it."""
        if self._shared:
            now = self.domain.clock.now()
            self._queue.woken(vcpu.id, now)
            self._due_at(self._queue.slice_end)
            self.engine.watch_pauses(not self._spins.unwatched_until(self.domain.running.id, now))

    def _idle(self, now: int, capped: int) -> None:
        """Wait for a post or the next deadline; the guest costs nothing meanwhile.

        :param capped: until when the domain has used up its CPU time, or 0.
        """
        # A watchdog does not wait for a paused domain.
        deadline = self._timers.next() if not self._paused else self.domain.watchdogs.next
        if capped and not self._paused:
            deadline = min(deadline, capped) if deadline else capped
            running = self.domain.running
            if running.runstate == guest_time.RUNSTATE_RUNNING:
                guest_time.account(running, now, guest_time.RUNSTATE_RUNNABLE)
        with self._condition:
            if self._posts:
                return
            self._alarm.quiet()
            self._yields = 0
            self._quiet.look(now, self._cpu_time_ns)
            timeout = max(0, deadline - self.domain.clock.now()) / 1e9 if deadline else _LONGEST_WAIT_S
            self._condition.wait(min(timeout, _LONGEST_WAIT_S))

    def _rest(self, told: Callable[[], None]) -> None:
        """The guest is suspended: wait for what becomes of it."""
        if not self._suspended:
            self._suspended = True
            self._stand_still(True)
            told()
        with self._condition:
            if not self._posts:
                self._alarm.quiet()
                self._condition.wait(_LONGEST_WAIT_S)

    def _nap(self, now: int) -> None:
        """Let other processes have the CPU for a moment; a post or a timer ends it."""
        seconds = min(_LONGEST_NAP_S, _NAP_S * (1 << min(self._yields >> 5, 8)))
        if deadline := self._timers.next():
            seconds = min(seconds, max(0, deadline - now) / 1e9)
        with self._condition:
            if not self._posts:
                self._condition.wait(seconds)

    def _take_posts(self) -> None:
        posts = self._posts
        if posts:
            self._yields = 0
        while posts:
            posts.popleft()()

    def _set_alarm(self, now: int) -> None:
        deadline = self._timers.next()
        spins = self._spins.unwatched_until(self.domain.running.id, now)
        for end in (self._queue.slice_end, self._cap.run_until(now), spins):
            if end and (not deadline or end < deadline):
                deadline = end
        self._alarm.set(deadline + self.domain.clock.base if deadline else 0)
        if self._posts:
            self._alarm.now()

    def _due_at(self, deadline: int) -> None:
        """Something new is due at system time `deadline` (ns). What was taken away may still ring, once."""
        at, alarm = deadline + self.domain.clock.base, self._alarm
        if not alarm.at or at < alarm.at:
            alarm.set(at)
            if self._posts:
                alarm.now()

    def _watchdog_over(self) -> None:
        LOG.warning("a watchdog of the guest is over")
        self.domain.shut_down(abi.SHUTDOWN_watchdog)

    def _wake(self, number: int, port: int) -> None:
        """An event became deliverable on a vCPU, or a port that may be polled went pending."""
        for vcpu in self.domain.vcpus:
            if vcpu.blocked and vcpu.poll is not None and port in vcpu.poll:
                self._end_wait(vcpu)
        vcpu = self.domain.vcpus[number]
        if vcpu.blocked and self._traps.event_pending(vcpu):
            self._end_wait(vcpu)

    def _end_wait(self, vcpu: Vcpu) -> None:
        self._unblocked(vcpu, self.domain.clock.now())
        self._woken(vcpu)

    def _give_way(self) -> None:
        """The running vCPU lets all others run before it."""
        self._queue.yielded(self.domain.running.id)
        self._yields += 1
        self._leave()

    def _leave(self) -> None:
        self._leaving = True
        if self._native is not None:
            self._native.leaving(True)
        self.engine.stop()

    def spinning(self) -> None:
        self._spins.gave_way(self.domain.running.id)
        self._give_way()
