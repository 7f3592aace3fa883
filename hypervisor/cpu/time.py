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

REFRESH_NS = 10_000_000
"""Age from which the time record of vCPUs is taken anew."""
_CLOSE_NS = 2_000
_TRIES = 8
_LONGEST_NS = 1_000_000_000
_RECORD = struct.Struct("<QQIbB")

RUNSTATE_RUNNING, RUNSTATE_RUNNABLE, RUNSTATE_BLOCKED, RUNSTATE_OFFLINE = range(4)


class Clock:
    """Nanoseconds since the domain was created, and how its TSC turns into them.

    All vCPUs get the same (TSC, system time) pair: the record says that times compare between them
    (XEN_PVCLOCK_TSC_STABLE_BIT), and a guest takes that at its word.

    :param base: CLOCK_MONOTONIC nanoseconds that are system time 0.
    """

    __slots__ = ("_body", "_close", "_read_tsc", "_taken", "_told", "base", "scale", "wall_offset_ns")

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
        self._close = scale.khz * _CLOSE_NS // 1_000_000
        self._body = b""
        self._taken = 0
        self._told: set[int] = set()

    def now(self) -> int:
        return time.monotonic_ns() - self.base

    def save(self) -> dict[str, int]:
        return {"now": self.now(), "wall_offset_ns": self.wall_offset_ns}

    def restore(self, data: dict[str, int]) -> None:
        """System time goes on where it was, on this host's clocks."""
        self.base = time.monotonic_ns() - int(data["now"])
        self.wall_offset_ns = int(data["wall_offset_ns"])
        self._body = b""
        self._told.clear()

    def due(self, vcpu: Vcpu, now: int) -> bool:
        """Whether the vCPU's record is out of date at system time `now`."""
        if not self._body or now - self._taken >= REFRESH_NS:
            self._take(now)
        return vcpu.id not in self._told

    def _take(self, now: int) -> None:
        """A new pair. The two clocks are read one after the other, and this process may lose its CPU in between.

        Such a pair would be ahead by that time and let the guest's clock go back with the next one.
        """
        best, tsc, system = 1 << 64, 0, 0
        for _ in range(_TRIES):
            before = self._read_tsc()
            nanoseconds = time.monotonic_ns()
            gap = self._read_tsc() - before
            if gap < best:
                best, tsc, system = gap, before + gap // 2, nanoseconds - self.base
            if gap <= self._close:
                break
        else:
            if self._body and now - self._taken < _LONGEST_NS:
                return  # the old one is better
        self._body = _RECORD.pack(tsc, system, self.scale.mul, self.scale.shift, _TSC_STABLE)
        self._taken = system
        self._told.clear()

    def update_vcpu(self, memory: DomainMemory, vcpu: Vcpu) -> None:
        """Publish the (TSC, system time) pair in force; the version is odd while it changes."""
        self.due(vcpu, self.now())
        self._told.add(vcpu.id)
        info = vcpu.state.vcpu_info
        at = (info + _VERSION) >> 2
        version = memory.dwords[at] | 1
        memory.dwords[at] = version
        memory.bytes[info + _BODY : info + _BODY + _RECORD.size] = self._body
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
