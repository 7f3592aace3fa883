"""The seccomp filters of domain, driver and mover processes: allow-lists in classic BPF.

Numbers are those of x86-64 (asm/unistd_64.h); a call by another architecture's
entry (32-bit, x32) ends the process, because its numbers mean something else.
"""

from __future__ import annotations

import ctypes
import dataclasses
import os
import platform
import struct
from collections.abc import Mapping

_AUDIT_ARCH_X86_64 = 0xC000_003E
_X32_BIT = 0x4000_0000
_SECCOMP_SET_MODE_FILTER = 1
_SECCOMP_GET_ACTION_AVAIL = 2
_FLAG_TSYNC = 1
_RET_ALLOW = 0x7FFF_0000
_RET_KILL_PROCESS = 0x8000_0000
_RET_ERRNO = 0x0005_0000
_SYS_SECCOMP = 317
_EPERM = 1
_ENOSYS = 38

# seccomp_data: nr at 0, arch at 4, instruction_pointer at 8, args[6] (64-bit, low word first) from 16.
_NR, _ARCH, _ARGS = 0, 4, 16
_LD, _JEQ, _JGE, _AND, _RET = 0x20, 0x15, 0x35, 0x54, 0x06

CLONE_THREAD = 0x0001_0000
_FIONBIO = 0x5421
_NOTIF_RECV, _NOTIF_SEND = 0xC050_2100, 0xC018_2101
_PR_SET_NAME = 15
_PR_SET_VMA = 0x5356_4D41
_SOL_SOCKET = 1
_FCNTL_FLAGS = (1, 2, 3, 4)  # F_GETFD, F_SETFD, F_GETFL, F_SETFL; not F_SETOWN, which sends signals
_F_DUPFD_CLOEXEC = 1030
_F_GET_SEALS = 1034

# fmt: off
ALLOWED = {
    "read": 0, "write": 1, "close": 3, "poll": 7, "lseek": 8, "mmap": 9, "mprotect": 10, "munmap": 11, "brk": 12,
    "rt_sigaction": 13, "rt_sigprocmask": 14, "rt_sigreturn": 15, "pread64": 17, "pwrite64": 18, "readv": 19,
    "writev": 20, "select": 23, "sched_yield": 24, "mremap": 25, "madvise": 28, "nanosleep": 35, "getitimer": 36,
    "alarm": 37, "setitimer": 38, "getpid": 39, "sendto": 44, "recvfrom": 45, "sendmsg": 46, "recvmsg": 47,
    "exit": 60, "fsync": 74, "fdatasync": 75, "gettimeofday": 96, "getrusage": 98, "times": 100,
    "getuid": 102, "getgid": 104, "geteuid": 107, "getegid": 108, "rt_sigpending": 127, "rt_sigtimedwait": 128,
    "sigaltstack": 131, "gettid": 186, "futex": 202, "sched_getaffinity": 204, "timer_create": 222,
    "timer_settime": 223, "timer_gettime": 224, "timer_getoverrun": 225, "timer_delete": 226, "clock_gettime": 228,
    "clock_getres": 229, "clock_nanosleep": 230, "exit_group": 231, "epoll_wait": 232, "epoll_ctl": 233,
    "pselect6": 270, "ppoll": 271, "set_robust_list": 273, "epoll_pwait": 281, "fallocate": 285,
    "timerfd_settime": 286, "timerfd_gettime": 287, "accept4": 288, "eventfd2": 290, "preadv": 295, "pwritev": 296,
    "getrandom": 318, "membarrier": 324, "rseq": 334, "epoll_pwait2": 441,
}
# fmt: on

# fmt: off
DRIVER_CALLS = {
    "fstat": 5, "msync": 26, "newfstatat": 262, "sync_file_range": 277, "recvmmsg": 299, "sendmmsg": 307,
    "preadv2": 327, "pwritev2": 328,
}
# fmt: on
"""What a driver process needs beyond `ALLOWED`: positioned and vectored I/O on files and sockets it was given."""

MOVER_CALLS = {"preadv2": 327, "pwritev2": 328}
"""What a mover process needs beyond `ALLOWED`: Python's preadv and pwritev."""

_CLONE, _CLONE3, _TGKILL, _IOCTL, _PRCTL, _GETSOCKOPT, _FCNTL = 56, 435, 234, 16, 157, 55, 72
_RESTART_SYSCALL = 219


@dataclasses.dataclass(frozen=True, slots=True)
class Profile:
    """What a kind of process may do beyond `ALLOWED`.

    :ivar calls: further system calls. :ivar fcntls: commands of fcntl. :ivar ioctls: requests on any descriptor.
    :ivar ioctls_of: requests on one descriptor, by its number.
    """

    calls: tuple[int, ...] = ()
    fcntls: tuple[int, ...] = _FCNTL_FLAGS
    ioctls: tuple[int, ...] = (_FIONBIO,)
    ioctls_of: Mapping[int, tuple[int, ...]] = dataclasses.field(default_factory=dict)


DOMAIN = Profile(fcntls=(*_FCNTL_FLAGS, _F_GET_SEALS), ioctls=(_FIONBIO, _NOTIF_RECV, _NOTIF_SEND))
# Python's mmap keeps a duplicate of its file's descriptor.
DRIVER = Profile(calls=tuple(DRIVER_CALLS.values()), fcntls=(*_FCNTL_FLAGS, _F_DUPFD_CLOEXEC))
MOVER = Profile(calls=tuple(MOVER_CALLS.values()))


class Program(ctypes.Structure):
    __slots__ = ()
    _fields_ = (("len", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def instruction(code: int, k: int, jt: int = 0, jf: int = 0) -> bytes:
    """One of classic BPF (linux/filter.h)."""
    return struct.pack("HBBI", code, jt, jf, k & 0xFFFF_FFFF)


def arg_word(index: int) -> int:
    """Where the low word of a system call's argument lies in seccomp_data; the high one is 4 further."""
    return _ARGS + 8 * index


def _guarded(nr: int, argument: int, values: tuple[int, ...]) -> bytes:
    """Allow call `nr` if the low word of an argument is one of `values`, else EPERM."""
    body = instruction(_LD, arg_word(argument))
    for index, value in enumerate(values):
        body += instruction(_JEQ, value, len(values) - index, 0)
    body += instruction(_RET, _RET_ERRNO | _EPERM) + instruction(_RET, _RET_ALLOW)
    return instruction(_JEQ, nr, 0, len(body) // 8) + body


def _ioctl(profile: Profile) -> bytes:
    """Allow ioctl with the requests of a profile, some on one descriptor only."""
    body = b""
    for fd, requests in profile.ioctls_of.items():
        allow = instruction(_LD, arg_word(1))
        for index, request in enumerate(requests):
            allow += instruction(_JEQ, request, len(requests) - index, 0)
        allow += instruction(_RET, _RET_ERRNO | _EPERM) + instruction(_RET, _RET_ALLOW)
        body += instruction(_LD, arg_word(0)) + instruction(_JEQ, fd, 0, len(allow) // 8) + allow
    body += instruction(_LD, arg_word(1))
    for index, request in enumerate(profile.ioctls):
        body += instruction(_JEQ, request, len(profile.ioctls) - index, 0)
    body += instruction(_RET, _RET_ERRNO | _EPERM) + instruction(_RET, _RET_ALLOW)
    return instruction(_JEQ, _IOCTL, 0, len(body) // 8) + body


def program(pid: int, profile: Profile = DOMAIN) -> bytes:
    """The filter for process `pid`.

    ``clone3`` answers ENOSYS, since its flags lie in memory where a filter cannot look: libc then uses
    ``clone``, which passes only for threads. A signal may go only to this process (abort).
    """
    code = instruction(_LD, _ARCH) + instruction(_JEQ, _AUDIT_ARCH_X86_64, 1, 0) + instruction(_RET, _RET_KILL_PROCESS)
    code += instruction(_LD, _NR) + instruction(_JGE, _X32_BIT, 0, 1) + instruction(_RET, _RET_KILL_PROCESS)
    calls = {*ALLOWED.values(), *profile.calls}
    for number in (*sorted(calls), _RESTART_SYSCALL):
        code += instruction(_JEQ, number, 0, 1) + instruction(_RET, _RET_ALLOW)
    code += instruction(_JEQ, _CLONE3, 0, 1) + instruction(_RET, _RET_ERRNO | _ENOSYS)
    thread = instruction(_LD, arg_word(0)) + instruction(_AND, CLONE_THREAD) + instruction(_JEQ, CLONE_THREAD, 1, 0)
    thread += instruction(_RET, _RET_ERRNO | _EPERM) + instruction(_RET, _RET_ALLOW)
    code += instruction(_JEQ, _CLONE, 0, len(thread) // 8) + thread
    code += _guarded(_TGKILL, 0, (pid,))
    code += _guarded(_FCNTL, 1, profile.fcntls)
    code += _ioctl(profile)
    code += _guarded(_PRCTL, 0, (_PR_SET_NAME, _PR_SET_VMA))
    code += _guarded(_GETSOCKOPT, 1, (_SOL_SOCKET,))
    return code + instruction(_RET, _RET_ERRNO | _EPERM)


def unavailable(libc: ctypes.CDLL) -> str:
    """Why no filter can be set here; "" when it can."""
    if platform.machine() != "x86_64":
        return f"no filter for {platform.machine()}"
    action = struct.pack("I", _RET_ERRNO)
    if libc.syscall(_SYS_SECCOMP, _SECCOMP_GET_ACTION_AVAIL, 0, action) != 0:
        return f"the kernel has no seccomp filters ({os.strerror(ctypes.get_errno())})"
    return ""


def install(libc: ctypes.CDLL, profile: Profile = DOMAIN) -> str:
    """Set the filter on every thread of this process; returns why that failed, "" on success."""
    reason = unavailable(libc)
    if reason:
        return reason
    code = program(os.getpid(), profile)
    prog = Program(len(code) // 8, code)
    result = libc.syscall(_SYS_SECCOMP, _SECCOMP_SET_MODE_FILTER, _FLAG_TSYNC, ctypes.byref(prog))
    if result == 0:
        return ""
    if result > 0:
        return f"thread {result} could not be put under the filter"
    return os.strerror(ctypes.get_errno())
