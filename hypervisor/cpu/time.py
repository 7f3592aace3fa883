"""Guest time: system time, the wall clock, and vcpu_time_info (public/xen.h)."""

from __future__ import annotations

import struct
import time
from collections.abc import Callable

from hypervisor import abi
from hypervisor.cpu.state import Vcpu
from hypervisor.engines.tsc import TscScale
from hypervisor.memory.physical import DomainMemory

_TIME = abi.VCPU_INFO_TIME
_VERSION = _TIME + abi.VCPU_TIME_INFO_VERSION
_BODY = _TIME + abi.VCPU_TIME_INFO_TSC_TIMESTAMP
_TSC_STABLE = 1  # XEN_PVCLOCK_TSC_STABLE_BIT

RUNSTATE_RUNNING, RUNSTATE_RUNNABLE, RUNSTATE_BLOCKED, RUNSTATE_OFFLINE = range(4)


class Clock:
    """Nanoseconds since the domain was created, and how its TSC turns into them.

    :param base: CLOCK_MONOTONIC nanoseconds that are system time 0.
    """

    __slots__ = ("_read_tsc", "base", "scale", "wall_offset_ns")

    WALLCLOCK = (
        abi.SHARED_INFO_WC_VERSION,
        abi.SHARED_INFO_WC_SEC,
        abi.SHARED_INFO_WC_NSEC,
        abi.SHARED_INFO_WC_SEC_HI,
    )

    def __init__(self, scale: TscScale, read_tsc: Callable[[], int], base: int | None = None) -> None:
        self.scale = scale
        self._read_tsc = read_tsc
        self.base = time.monotonic_ns() if base is None else base
        self.wall_offset_ns = 0

    def now(self) -> int:
        return time.monotonic_ns() - self.base

    def update_vcpu(self, memory: DomainMemory, vcpu: Vcpu) -> None:
        """Publish the current (TSC, system time) pair; the version is odd while it changes."""
        info = vcpu.state.vcpu_info
        at = (info + _VERSION) >> 2
        version = memory.dwords[at] | 1
        memory.dwords[at] = version
        tsc = self._read_tsc()
        now = time.monotonic_ns() - self.base
        struct.pack_into("<QQIbB", memory.bytes, info + _BODY, tsc, now, self.scale.mul, self.scale.shift, _TSC_STABLE)
        memory.dwords[at] = (version + 1) & 0xFFFF_FFFF

    def update_wallclock(self, memory: DomainMemory, shared_info: int) -> None:
        """Publish the time of day at system time 0 (seconds, nanoseconds) in shared_info.

        :param shared_info: frame index.
        """
        boot = time.time_ns() + self.wall_offset_ns - self.now()
        seconds, nanoseconds = divmod(boot, 1_000_000_000)
        at = shared_info * 4096
        version, low, nano, high = ((at + field) >> 2 for field in self.WALLCLOCK)
        number = memory.dwords[version] | 1
        memory.dwords[version] = number
        memory.dwords[low] = seconds & 0xFFFF_FFFF
        memory.dwords[nano] = nanoseconds
        memory.dwords[high] = seconds >> 32
        memory.dwords[version] = (number + 1) & 0xFFFF_FFFF


def account(vcpu: Vcpu, now: int, new_state: int) -> None:
    """Close the current runstate at `now` (ns) and enter `new_state`."""
    vcpu.runstate_times[vcpu.runstate] += max(0, now - vcpu.runstate_since)
    vcpu.runstate = new_state
    vcpu.runstate_since = now
