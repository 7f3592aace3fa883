"""A process under a guest link's filter that does what a test says: ``python guarded_driver.py SOCK BUFFER MEMORY RO``.

It reads lines of Python from its standard input, evaluates them with what is below in scope, and writes the ``repr``
of each value or ``ERROR errno-name`` as a line.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import sys
import threading

from hypervisor.devices.driver import Copy, LinkError
from hypervisor.devices.link_window import PAGE, STRIDE, map_memory, unmap_memory, view_of
from hypervisor.host import guarded_link, sandbox, seccomp

libc = ctypes.CDLL(None, use_errno=True)
RO, RW, NONE = mmap.PROT_READ, mmap.PROT_READ | mmap.PROT_WRITE, 0
SHARED, PRIVATE, FIXED, ANONYMOUS = mmap.MAP_SHARED, mmap.MAP_PRIVATE, 0x10, mmap.MAP_ANONYMOUS


def call(number: int, *arguments: int) -> int:
    """A system call as it is. :raises OSError."""
    result = libc.syscall(ctypes.c_long(number), *(ctypes.c_long(argument) for argument in arguments))
    if result < 0:
        raise OSError(ctypes.get_errno(), "")
    return int(result)


def in_thread(function):
    """Its value, or the exception it raised, from another thread."""
    result = []

    def run():
        try:
            result.append(function())
        except BaseException as exc:
            result.append(exc)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if isinstance(result[0], BaseException):
        raise result[0]
    return result[0]


def say(*words: object) -> None:
    sys.stdout.write(" ".join(map(str, words)) + "\n")
    sys.stdout.flush()


def main() -> None:
    sock, buffer, memory, memory_ro = (int(word) for word in sys.argv[1:5])
    link, missing = guarded_link.connect(sock, buffer, memory, memory_ro, required=True)
    report = sandbox.lock_down(
        sandbox.restrict(max_file_size=sandbox.NO_LIMIT, max_open_files=256), required=True, profile=seccomp.DRIVER
    )
    window = link._window
    scope = {**globals(), "link": link, "memory": memory, "memory_ro": memory_ro, "window": window, "sock": sock}
    say("ready", repr(missing), report.seccomp)
    for line in sys.stdin:
        try:
            code = compile(line.strip(), "line", "eval")
        except SyntaxError:
            code = compile(line.strip(), "line", "exec")
        try:
            say(repr(eval(code, scope)))
        except LinkError as exc:
            say(f"LINK {exc.status}")
        except OSError as exc:
            say(f"ERROR {errno.errorcode.get(exc.errno or 0, exc)}")
    os._exit(0)


__all__ = ["FIXED", "NONE", "PAGE", "PRIVATE", "STRIDE", "Copy", "map_memory", "unmap_memory", "view_of"]

if __name__ == "__main__":
    main()
