"""The filter, run by a small interpreter of classic BPF over made-up system calls."""

from __future__ import annotations

import dataclasses
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hypervisor.host import seccomp

PID = 4242
X86_64, I386 = 0xC000003E, 0x40000003
ALLOW, KILL, EPERM, ENOSYS = 0x7FFF0000, 0x80000000, 0x00050001, 0x00050026
PROGRAM = seccomp.program(PID)


def verdict(number: int, *args: int, arch: int = X86_64, program: bytes = PROGRAM) -> int:
    data = struct.pack("<IIQ6Q", number & 0xFFFFFFFF, arch, 0, *(a & (1 << 64) - 1 for a in (args + (0,) * 6)[:6]))
    accumulator = at = 0
    for _ in range(10_000):
        code, jt, jf, k = struct.unpack_from("<HBBI", program, at * 8)
        at += 1
        if code == 0x20:
            (accumulator,) = struct.unpack_from("<I", data, k)
        elif code == 0x54:
            accumulator &= k
        elif code == 0x15:
            at += jt if accumulator == k else jf
        elif code == 0x35:
            at += jt if accumulator >= k else jf
        elif code == 0x06:
            return k
        else:
            pytest.fail(f"instruction {code:#x}")
    pytest.fail("it does not end")


def test_it_fits_the_kernel() -> None:
    assert len(PROGRAM) % 8 == 0
    assert len(PROGRAM) // 8 <= 4096  # BPF_MAXINSNS


@pytest.mark.parametrize("name", sorted(seccomp.ALLOWED))
def test_what_engine_and_python_need_is_allowed(name: str) -> None:
    assert verdict(seccomp.ALLOWED[name]) == ALLOW


FORBIDDEN = {
    "open": 2, "openat": 257, "openat2": 437, "creat": 85, "unlink": 87, "rename": 82, "socket": 41, "connect": 42,
    "bind": 49, "listen": 50, "socketpair": 53, "execve": 59, "execveat": 322, "fork": 57, "vfork": 58, "kill": 62,
    "tkill": 200, "ptrace": 101, "process_vm_readv": 310, "process_vm_writev": 311, "pidfd_open": 434,
    "pidfd_getfd": 438, "pidfd_send_signal": 424, "mount": 165, "bpf": 321, "io_uring_setup": 425, "userfaultfd": 323,
    "keyctl": 250,
    "setuid": 105, "chmod": 90, "stat": 4, "readlink": 89, "memfd_create": 319, "dup": 32, "rt_sigqueueinfo": 129,
    "rt_tgsigqueueinfo": 297, "seccomp": 317, "unshare": 272, "setns": 308, "perf_event_open": 298, "reboot": 169,
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(FORBIDDEN))
def test_what_reaches_out_is_refused(name: str) -> None:
    assert verdict(FORBIDDEN[name]) == EPERM


@pytest.mark.parametrize(
    ("number", "args", "expected"),
    [
        (56, (0x10000 | 0x100, 0), ALLOW),  # clone of a thread
        (56, (17,), EPERM),  # clone of a process
        (435, (), ENOSYS),  # clone3: libc falls back to clone
        (234, (PID, 1, 6), ALLOW),  # tgkill: abort
        (234, (PID + 1, 1, 6), EPERM),
        (16, (3, 0x5421), ALLOW),  # FIONBIO
        (16, (3, 0x5401), EPERM),
        (157, (15,), ALLOW),  # PR_SET_NAME
        (157, (4,), EPERM),
        (72, (3, 4), ALLOW),  # F_SETFL
        (72, (3, 8), EPERM),  # F_SETOWN
        (72, (3, 0), EPERM),  # F_DUPFD
        (55, (3, 1), ALLOW),  # getsockopt SOL_SOCKET
        (55, (3, 6), EPERM),
        (0x40000000, (), KILL),  # x32
        (0x40000001, (), KILL),
    ],
)
def test_arguments_decide(number: int, args: tuple[int, ...], expected: int) -> None:
    assert verdict(number, *args) == expected


@given(st.integers(0, 0xFFFFFFFF))
def test_another_architecture_ends_the_process(number: int) -> None:
    assert verdict(number, arch=I386) == KILL


GUARDED = {56, 435, 234, 16, 157, 72, 55, 219}


@given(st.integers(0, 600))
def test_nothing_else_is_allowed(number: int) -> None:
    if number not in GUARDED:
        assert verdict(number) == (ALLOW if number in seccomp.ALLOWED.values() else EPERM)


def test_requests_of_one_descriptor_are_for_that_one() -> None:
    profile = dataclasses.replace(seccomp.DOMAIN, ioctls_of={7: (0xC020AA00, 0xC018AA06), 9: (0xC0606610,)})
    program = seccomp.program(PID, profile)
    for fd, request in ((7, 0xC020AA00), (7, 0xC018AA06), (9, 0xC0606610), (3, 0x5421)):
        assert verdict(16, fd, request, program=program) == ALLOW
    for fd, request in ((9, 0xC020AA00), (7, 0xC0606610), (3, 0xC0606610), (7, 0xC020AA03), (7, 0x5421)):
        assert verdict(16, fd, request, program=program) == EPERM


def test_each_kind_of_process_has_its_own() -> None:
    driver, mover = seccomp.program(PID, seccomp.DRIVER), seccomp.program(PID, seccomp.MOVER)
    assert verdict(16, 3, 0xC0502100) == ALLOW and verdict(16, 3, 0xC0502100, program=mover) == EPERM
    assert verdict(307, program=driver) == ALLOW and verdict(307, program=mover) == EPERM
    for number in seccomp.MOVER_CALLS.values():
        assert verdict(number, program=mover) == ALLOW and verdict(number) == EPERM
    assert verdict(72, 3, 1030, program=driver) == ALLOW and verdict(72, 3, 1030, program=mover) == EPERM
