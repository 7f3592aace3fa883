"""sched_op, set_timer_op, vcpu_op."""

from __future__ import annotations

import struct

from hypervisor import abi, vcpu_context
from hypervisor.abi import errno
from hypervisor.cpu.state import Vcpu
from hypervisor.domain import Domain
from hypervisor.errors import XenError
from hypervisor.hypercalls.registry import hypercall

_U32 = struct.Struct("<I")
MAX_POLL_PORTS = 128
LONG_PAST = 1
MIN_PERIOD_NS = 1_000_000
MAX_PERIOD_NS = (1 << 62) - 1
FAR_FUTURE_NS, HUGE_TIMEOUT_NS = 1 << 50, 100_000_000
"""Linux has been seen to set timers wrapped negative or weeks ahead when it has none: Xen fires them after 100 ms."""


@hypercall(abi.HYPERVISOR_sched_op)
def sched_op(domain: Domain, command: int, argument: int, _3: int, _4: int, _5: int, _6: int) -> int:
    command &= 0xFFFF_FFFF
    if command == abi.SCHEDOP_yield:
        domain.give_way()
    elif command == abi.SCHEDOP_block:
        domain.block()
    elif command == abi.SCHEDOP_shutdown:
        (reason,) = _U32.unpack(domain.guest.read(argument, 4))
        if reason > abi.SHUTDOWN_MAX:
            raise XenError(errno.EINVAL, f"shutdown reason {reason}")
        domain.shut_down(reason)
    elif command == abi.SCHEDOP_shutdown_code:
        (reason,) = _U32.unpack(domain.guest.read(argument, 4))
        if domain.declared_code is None:
            domain.declared_code = reason & 0xFF
    elif command == abi.SCHEDOP_poll:
        _poll(domain, argument)
    elif command == abi.SCHEDOP_remote_shutdown:
        (dom,) = struct.unpack("<H", domain.guest.read(argument, 2))
        raise XenError(errno.EPERM if dom == domain.config.domid else errno.ESRCH, "remote shutdown")
    elif command == abi.SCHEDOP_watchdog:
        number, timeout = struct.unpack("<II", domain.guest.read(argument, 8))
        result = domain.watchdogs.set(number, timeout, domain.clock.now())
        if domain.watchdogs.next:
            domain.timer_changed(domain.watchdogs.next)
        return result
    else:
        raise XenError(errno.ENOSYS, f"sched_op {command}")
    return 0


def _poll(domain: Domain, argument: int) -> None:
    ports_at, count, timeout = struct.unpack("<QI4xQ", domain.guest.read(argument, 24))
    if count > MAX_POLL_PORTS:
        raise XenError(errno.EINVAL, f"poll of {count} ports")
    vcpu = domain.running
    if domain.traps.event_pending(vcpu):
        return
    ports = struct.unpack(f"<{count}I", domain.guest.read(ports_at, 4 * count))
    if any(domain.events.is_pending(port) for port in ports):
        return
    if timeout and timeout <= domain.clock.now():
        return
    vcpu.poll = ports
    vcpu.poll_deadline = timeout
    vcpu.blocked = True
    domain.leave()


@hypercall(abi.HYPERVISOR_set_timer_op)
def set_timer_op(domain: Domain, deadline: int, _2: int, _3: int, _4: int, _5: int, _6: int) -> int:
    now = domain.clock.now()
    if deadline >> 63 or deadline - now >= FAR_FUTURE_NS:
        deadline = now + HUGE_TIMEOUT_NS
    domain.set_timer(domain.running, deadline)
    return 0


@hypercall(abi.HYPERVISOR_vcpu_op)
def vcpu_op(domain: Domain, command: int, number: int, argument: int, _4: int, _5: int, _6: int) -> int:
    vcpu = domain.vcpu(number & 0xFFFF_FFFF)
    command &= 0xFFFF_FFFF
    if command == abi.VCPUOP_is_up:
        return int(vcpu.up)
    if command in (abi.VCPUOP_initialise, abi.VCPUOP_up, abi.VCPUOP_down):
        return _power(domain, vcpu, command, argument)
    if command == abi.VCPUOP_get_runstate_info:
        now = domain.clock.now()
        times = list(vcpu.runstate_times)
        times[vcpu.runstate] += max(0, now - vcpu.runstate_since)
        domain.guest.write(argument, struct.pack("<i4x5Q", vcpu.runstate, vcpu.runstate_since, *times))
    elif command == abi.VCPUOP_register_runstate_memory_area:
        domain.register_runstate_area(vcpu, domain.guest.read_u64(argument))
    elif command == abi.VCPUOP_register_vcpu_time_memory_area:
        domain.register_time_area(vcpu, domain.guest.read_u64(argument))
    elif command == abi.VCPUOP_register_vcpu_info:
        mfn, offset = struct.unpack("<QI", domain.guest.read(argument, 12))
        domain.register_vcpu_info(vcpu, mfn, offset)
    else:
        _timers(domain, vcpu, command, argument)
    return 0


def _power(domain: Domain, vcpu: Vcpu, command: int, argument: int) -> int:
    if command == abi.VCPUOP_initialise:
        given = vcpu_context.read_context(domain, argument)
        if vcpu.initialised:
            raise XenError(errno.EEXIST, f"vCPU {vcpu.id} has a context")
        vcpu_context.initialise(domain, vcpu, given)
        return 0
    if not vcpu.initialised:
        raise XenError(errno.EINVAL, f"vCPU {vcpu.id} has no context")
    domain.set_up(vcpu, command == abi.VCPUOP_up)
    return 0


def _timers(domain: Domain, vcpu: Vcpu, command: int, argument: int) -> None:
    mine = vcpu is domain.running
    if command == abi.VCPUOP_set_periodic_timer:
        (period,) = struct.unpack("<Q", domain.guest.read(argument, 8))
        if not MIN_PERIOD_NS <= period <= MAX_PERIOD_NS:
            raise XenError(errno.EINVAL, f"timer period of {period} ns")
        # Counted from the last tick; one that did not run ticks at once.
        last = vcpu.periodic_next - vcpu.periodic_ns if vcpu.periodic_next else 0
        vcpu.periodic_ns = period
        vcpu.periodic_next = max(1, domain.clock.now(), last + period)
        domain.timer_changed(vcpu.periodic_next)
    elif command == abi.VCPUOP_stop_periodic_timer:
        vcpu.periodic_ns = vcpu.periodic_next = 0
    elif command == abi.VCPUOP_set_singleshot_timer:
        if not mine:
            raise XenError(errno.EINVAL, "a one-shot timer is set by its own vCPU")
        # VCPU_SSHOTTMR_future (a deadline that has passed is an error) "can be ignored by the hypervisor", and Xen
        # 4.17.7 does: Linux before 4.7 set it without looking at the answer (public/vcpu.h).
        deadline, _flags = struct.unpack("<QI", domain.guest.read(argument, 12))
        domain.set_timer(vcpu, LONG_PAST if deadline >> 63 else max(LONG_PAST, deadline))
    elif command == abi.VCPUOP_stop_singleshot_timer:
        if not mine:
            raise XenError(errno.EINVAL, "a one-shot timer is stopped by its own vCPU")
        domain.set_timer(vcpu, 0)
    else:
        raise XenError(errno.ENOSYS, f"vcpu_op {command}")
