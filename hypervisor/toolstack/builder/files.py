"""Read a file that an operator named: once, bounded, and never waiting."""

from __future__ import annotations

import os
import stat

from hypervisor.errors import ToolstackError


def read_file(path: str | os.PathLike[str], what: str, error: type[ToolstackError], limit: int) -> bytes:
    """The whole content of a regular file.

    :param what: how messages call it: "kernel", "ramdisk".
    :param error: what to raise when it is missing, unreadable, no regular file, empty or longer than `limit` bytes.
    """
    name = os.fspath(path)
    try:
        # O_NONBLOCK: opening a FIFO must not wait for a writer.
        fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        with open(fd, "rb") as file:
            info = os.fstat(fd)
            if not stat.S_ISREG(info.st_mode):
                raise error(f"{what} {name} is not a regular file: give the path of a {what} image")
            if info.st_size > limit:
                raise error(f"{what} {name} has {info.st_size >> 20} MiB: at most {limit >> 20} MiB are accepted")
            data = file.read(limit + 1)
    except (OSError, ValueError) as exc:
        reason = exc.strerror if isinstance(exc, OSError) else str(exc)
        raise error(f"{what} {name} cannot be read ({reason}): check the path and its permissions") from exc
    if not data or len(data) > limit:
        raise error(f"{what} {name} is {'empty' if not data else 'too large'}: copy or build it again")
    return data
