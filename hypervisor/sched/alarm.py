"""A timer that interrupts the engine without waiting for Python.

A POSIX timer calls a C function (the engine's stop request) in a thread of
the C library, so a guest that computes is interrupted on time even when no
Python thread gets to run. It fires again every millisecond until it is set
anew: a stop request that falls between two runs of the engine is lost, the
next one is not.

A call that the C library has begun cannot be taken back: its thread may not have run yet when the timer is deleted.
So what the function works on is kept for a while after `Alarm.close`.
"""

from __future__ import annotations

import collections
import ctypes
import os
import time
from typing import Any

_CLOCK_MONOTONIC = 1
_SIGEV_THREAD = 2
_TIMER_ABSTIME = 1
_REPEAT_NS = 1_000_000
GRACE_S = 5.0
"""How long a call may take from its timer's expiry to its end, on a machine that has much to do."""

_retired: collections.deque[tuple[float, object]] = collections.deque()


class _SigEvent(ctypes.Structure):
    """struct sigevent of glibc on x86-64 (64 bytes)."""

    _fields_ = (
        ("value", ctypes.c_void_p),
        ("signo", ctypes.c_int),
        ("notify", ctypes.c_int),
        ("function", ctypes.c_void_p),
        ("attributes", ctypes.c_void_p),
        ("pad", ctypes.c_uint8 * 32),
    )


class _ITimerSpec(ctypes.Structure):
    _fields_ = (
        ("interval_s", ctypes.c_int64),
        ("interval_ns", ctypes.c_int64),
        ("value_s", ctypes.c_int64),
        ("value_ns", ctypes.c_int64),
    )


class Alarm:
    """:param target: C function, its argument, and what both live in (`hypervisor.engines.base.Engine.kick_target`)."""

    def __init__(self, target: tuple[int, int, object]) -> None:
        libc: Any = ctypes.PyDLL(None, use_errno=True)
        self._settime = libc.timer_settime
        self._settime.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p]
        self._delete = libc.timer_delete
        self._delete.argtypes = [ctypes.c_void_p]
        function, argument, self._keep = target
        event = _SigEvent(argument, 0, _SIGEV_THREAD, function, None)
        self._timer = ctypes.c_void_p()
        create = libc.timer_create
        create.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p]
        if create(_CLOCK_MONOTONIC, ctypes.byref(event), ctypes.byref(self._timer)) != 0:
            code = ctypes.get_errno()
            raise OSError(code, f"timer_create: {os.strerror(code)}")
        self._spec = _ITimerSpec()
        self._spec_at = ctypes.addressof(self._spec)
        self.at = 0

    def set(self, deadline: int) -> None:
        """Fire at CLOCK_MONOTONIC `deadline` (ns) and every millisecond after it; 0: never."""
        if deadline == self.at or not self._timer:
            return
        self.at = deadline
        spec = self._spec
        spec.value_s, spec.value_ns = divmod(deadline, 1_000_000_000)
        spec.interval_ns = _REPEAT_NS if deadline else 0
        self._settime(self._timer, _TIMER_ABSTIME, self._spec_at, None)

    def now(self) -> None:
        """Fire at once, and every millisecond until set anew. From any thread."""
        if not self._timer:
            return
        self.at = -1
        spec = _ITimerSpec(0, _REPEAT_NS, 0, 1)
        self._settime(self._timer, _TIMER_ABSTIME, ctypes.addressof(spec), None)

    def quiet(self) -> None:
        """Stop what repeats: the engine does not run, so there is nobody to interrupt. `set` starts it again."""
        if self.at:
            self.set(0)

    def close(self) -> None:
        """Set it off for good. Of the calls that have begun, some may still come."""
        if not self._timer:
            return
        self._delete(self._timer)
        self._timer = ctypes.c_void_p()
        now = time.monotonic()
        _retired.append((now + GRACE_S, self._keep))
        self._keep = None
        while _retired and _retired[0][0] < now:
            _retired.popleft()
