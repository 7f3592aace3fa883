"""The time stamp counter that translated guest code sees.

Unicorn executes RDTSC as the host's own. The guest turns TSC ticks into
nanoseconds with the multiplier in vcpu_time_info, so the counter's frequency
is measured against CLOCK_MONOTONIC once per process tree.
"""

from __future__ import annotations

import ctypes
import dataclasses
import mmap
import time
from collections.abc import Callable

_RDTSC = bytes.fromhex("0f31 48c1e220 4809d0 c3")  # rdtsc; shl rdx,32; or rax,rdx; ret


def _compile() -> Callable[[], int]:
    page = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    page.write(_RDTSC)
    function = ctypes.PYFUNCTYPE(ctypes.c_uint64)(ctypes.addressof(ctypes.c_char.from_buffer(page)))
    function._page = page  # type: ignore[attr-defined]  # keeps the code alive
    return function


read_tsc: Callable[[], int] = _compile()


@dataclasses.dataclass(frozen=True, slots=True)
class TscScale:
    """How vcpu_time_info turns ticks into nanoseconds: ``((ticks << shift) * mul) >> 32`` (public/xen.h).

    :ivar khz: ticks per millisecond.
    :ivar mul: 32-bit fraction.
    :ivar shift: -31..31.
    """

    khz: int
    mul: int
    shift: int

    @classmethod
    def from_khz(cls, khz: int) -> TscScale:
        hz = khz * 1000
        shift = 0
        while hz > 2_000_000_000:
            hz >>= 1
            shift -= 1
        while hz <= 1_000_000_000:
            hz <<= 1
            shift += 1
        return cls(khz, min((1_000_000_000 << 32) // hz, 0xFFFF_FFFF), shift)


def measure_khz(seconds: float = 0.05) -> int:
    """The counter's frequency in kHz, measured over `seconds`."""
    best_first = min((_pair() for _ in range(5)), key=lambda p: p[2])
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        time.sleep(max(0.0, deadline - time.monotonic()))
    best_last = min((_pair() for _ in range(5)), key=lambda p: p[2])
    ticks = best_last[0] - best_first[0]
    nanoseconds = best_last[1] - best_first[1]
    return max(1, round(ticks * 1_000_000 / nanoseconds))


def _pair() -> tuple[int, int, int]:
    """(tsc, ns, uncertainty in ticks)"""
    before = read_tsc()
    now = time.monotonic_ns()
    after = read_tsc()
    return (before + after) // 2, now, after - before
