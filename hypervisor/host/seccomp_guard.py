"""The seccomp filter that guards a guest's memory in a process that may see parts of it only, and its supervisor's end.

The process holds descriptors of the whole memory, yet the only thing it can do with them is to ask: each mmap of them,
and each munmap inside its window (`hypervisor.devices.link_window`), stops in the kernel until the supervisor, which
holds the filter's listener, has looked at the registers and lets it go on. A stopped thread's registers cannot be
changed, and no argument of these calls lies in memory: so what was looked at is what is done
(SECCOMP_USER_NOTIF_FLAG_CONTINUE, seccomp_unotify(2)).

Sources: linux/seccomp.h, seccomp(2), seccomp_unotify(2).
"""

from __future__ import annotations

import ctypes
import dataclasses
import errno
import fcntl
import os
import platform
import struct

from hypervisor.devices.link_window import BYTES
from hypervisor.host import seccomp
from hypervisor.host.seccomp import arg_word, instruction

MMAP, MUNMAP = 9, 11
_MREMAP = 25
_SENDMSG, _SENDMMSG = 46, 307
_ON_DESCRIPTORS = (0, 1, 16, 17, 18, 19, 20, 32, 33, 40, 72, 77, 275, 276, 278, 285, 292, 295, 296, 326, 327, 328)
"""read write ioctl pread64 pwrite64 readv writev dup dup2 sendfile fcntl ftruncate splice tee vmsplice fallocate dup3
preadv pwritev copy_file_range preadv2 pwritev2: calls whose first argument is a descriptor that gives or takes data."""
_ON_SECOND = (40,)  # sendfile reads its second argument

_ALLOW, _EPERM, _NOTIFY, _KILL = 0x7FFF_0000, 0x0005_0001, 0x7FC0_0000, 0x8000_0000
_LD, _JEQ, _AND, _RET = 0x20, 0x15, 0x54, 0x06
_ARCH_X86_64 = 0xC000_003E

_SYS_SECCOMP, _SET_MODE_FILTER, _GET_ACTION_AVAIL = 317, 1, 2
_TSYNC, _NEW_LISTENER, _TSYNC_ESRCH = 1, 8, 16
_PR_SET_NO_NEW_PRIVS = 38

NOTIF_RECV, NOTIF_SEND = 0xC050_2100, 0xC018_2101
_NOTIF = struct.Struct("<QIIiIQ6Q")  # id, tid, flags, number, architecture, instruction pointer, arguments
_RESPONSE = struct.Struct("<QqiI")  # id, value, error, flags
_CONTINUE = 1


@dataclasses.dataclass(frozen=True, slots=True)
class Call:
    """A stopped system call. :ivar thread: 0 if it is in a PID namespace that the supervisor does not see."""

    id: int
    thread: int
    number: int
    arguments: tuple[int, ...]


def _load(index: int, high: int = 0) -> bytes:
    return instruction(_LD, arg_word(index) + 4 * high)


def _ret(action: int) -> bytes:
    return instruction(_RET, action)


def _on(number: int, body: bytes) -> bytes:
    """`body`, which ends with a return, for one system call; the number is in the accumulator."""
    return instruction(_JEQ, number, 0, len(body) // 8) + body


def _if_memory(index: int, fds: tuple[int, int], action: int) -> bytes:
    """Return `action` if an argument is one of the descriptors: the kernel looks at 32 bits of it, and so does this."""
    return _load(index) + instruction(_JEQ, fds[0], 1, 0) + instruction(_JEQ, fds[1], 0, 1) + _ret(action)


def _if_window(address: int, action: int) -> bytes:
    """Return `action` if argument 0 is an address in the window."""
    return (
        _load(0, 1)
        + instruction(_JEQ, address >> 32, 0, 4)
        + _load(0)
        + instruction(_AND, ~(BYTES - 1) & 0xFFFF_FFFF)
        + instruction(_JEQ, address & 0xFFFF_FFFF, 0, 1)
        + _ret(action)
    )


def program(fds: tuple[int, int], window: int) -> bytes:
    """:param fds: of the guest's memory, low and below 2**31. :param window: address, a multiple of `BYTES`."""
    code = instruction(_LD, 4) + instruction(_JEQ, _ARCH_X86_64, 1, 0) + _ret(_KILL) + instruction(_LD, 0)
    code += _on(MMAP, _if_memory(4, fds, _NOTIFY) + _ret(_ALLOW))
    code += _on(MUNMAP, _if_window(window, _NOTIFY) + _ret(_ALLOW))
    # Neither a move out of the window nor one that leaves a copy (MREMAP_FIXED, MREMAP_DONTUNMAP).
    plain = _load(3) + instruction(_AND, 0xFFFF_FFFE) + instruction(_JEQ, 0, 1, 0) + _ret(_EPERM)
    code += _on(_MREMAP, plain + _if_window(window, _EPERM) + _ret(_ALLOW))
    for number in _ON_DESCRIPTORS:
        second = _if_memory(1, fds, _EPERM) if number in _ON_SECOND else b""
        code += _on(number, _if_memory(0, fds, _EPERM) + second + _ret(_ALLOW))
    return code + _ret(_ALLOW)


def no_descriptors_out() -> bytes:
    """The filter that comes after: nothing that could carry a descriptor to another process and back."""
    code = instruction(_LD, 0)
    for number in (_SENDMSG, _SENDMMSG):
        code += instruction(_JEQ, number, 0, 1) + _ret(_EPERM)
    return code + _ret(_ALLOW)


def unavailable(libc: ctypes.CDLL) -> str:
    """Why mappings cannot be guarded here; "" when they can."""
    if platform.machine() != "x86_64":
        return f"no filter for {platform.machine()}"
    action = struct.pack("I", _NOTIFY)
    if libc.syscall(_SYS_SECCOMP, _GET_ACTION_AVAIL, 0, action) != 0:
        return f"the kernel has no seccomp user notification ({os.strerror(ctypes.get_errno())})"
    return ""


def install(libc: ctypes.CDLL, code: bytes, *, listen: bool = False) -> int:
    """Set a filter for all threads of this process. :returns: its listener, or 0. :raises OSError."""
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "no_new_privs")
    program_of = seccomp.Program(len(code) // 8, code)
    flags = _TSYNC | _TSYNC_ESRCH | (_NEW_LISTENER if listen else 0)
    result = int(libc.syscall(_SYS_SECCOMP, _SET_MODE_FILTER, flags, ctypes.byref(program_of)))
    if result < 0:
        code_of = ctypes.get_errno()
        raise OSError(code_of, f"seccomp: {os.strerror(code_of)}")
    return result


# -- the supervisor


def receive(listener: int) -> Call | None:
    """A call that waits; None when its thread was killed meanwhile. :raises OSError: the listener is none."""
    buffer = bytearray(_NOTIF.size)
    try:
        fcntl.ioctl(listener, NOTIF_RECV, buffer)
    except OSError as exc:
        if exc.errno in (errno.ENOENT, errno.EINTR, errno.EAGAIN):
            return None
        raise
    number, thread, _, call, _, _, *arguments = _NOTIF.unpack(buffer)
    return Call(number, thread, call, tuple(arguments))


def go_on(listener: int, call: Call) -> None:
    """Let the kernel do what was asked."""
    _respond(listener, _RESPONSE.pack(call.id, 0, 0, _CONTINUE))


def finish(listener: int, call: Call, error: int) -> None:
    """Let the call return without being done: with 0, or -1 and errno `error`."""
    _respond(listener, _RESPONSE.pack(call.id, 0, -error, 0))


def _respond(listener: int, response: bytes) -> None:
    try:
        fcntl.ioctl(listener, NOTIF_SEND, bytearray(response))
    except OSError as exc:
        if exc.errno not in (errno.ENOENT, errno.EINPROGRESS):  # the thread is gone
            raise
