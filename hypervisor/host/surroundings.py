"""What a process forked by the zygote makes its own before anything else."""

from __future__ import annotations

import ctypes
import faulthandler
import logging
import os
import signal
import sys

_PR_SET_NAME = 15


def own_surroundings(name: str, log_fd: int, log_level: int) -> None:
    """Own session, own log, default signals. :param name: for people; the kernel keeps 15 bytes."""
    os.setsid()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    os.dup2(null, 0)
    os.dup2(log_fd, 1)
    os.dup2(log_fd, 2)
    os.close(null)
    logging.raiseExceptions = False  # a full log (RLIMIT_FSIZE) is no reason to stop a guest
    logging.basicConfig(
        level=log_level, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s", force=True
    )
    faulthandler.enable(2)
    ctypes.CDLL(None).prctl(_PR_SET_NAME, name.encode()[:15], 0, 0, 0)
