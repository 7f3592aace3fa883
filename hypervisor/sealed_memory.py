"""Memory that processes share, in a file without a name."""

from __future__ import annotations

import fcntl
import os


def sealed_memory(name: str, size: int) -> int:
    """A new one of `size` bytes, sparse: it costs what is written. Whoever else holds it cannot cut it off under our
    mapping, for its size is sealed (memfd_create(2), fcntl(2)).

    :param name: told by /proc/PID/maps. :returns: its descriptor, which is the caller's. :raises OSError.
    """
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, size)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    except BaseException:
        os.close(fd)
        raise
    return fd
