"""What systemd's service manager wants to hear (sd_notify(3)): datagrams to the socket in ``NOTIFY_SOCKET``.

Without that variable, as in a terminal, nothing is sent. Nothing here ever fails a daemon.
"""

from __future__ import annotations

import logging
import os
import socket
import time

LOG = logging.getLogger(__name__)


def notify(*lines: str) -> bool:
    """Send assignments as ``READY=1`` or ``STATUS=text``; whether somebody took them."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return False
    if address.startswith("@"):
        address = "\0" + address[1:]
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
            sender.settimeout(1)
            sender.connect(address)
            sender.send("\n".join(lines).encode())
    except OSError as exc:
        LOG.warning("the service manager cannot be told (%s): %s", exc.strerror or exc, lines[0])
        return False
    return True


def ready(status: str) -> None:
    notify("READY=1", f"STATUS={status}")


def status(text: str) -> None:
    notify(f"STATUS={text}")


def reloading() -> None:
    """Followed by `ready` when it is done."""
    notify("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}", "STATUS=reading the configuration")


def stopping(seconds: float, status: str) -> None:
    """:param seconds: how long it may take."""
    notify("STOPPING=1", f"EXTEND_TIMEOUT_USEC={int(seconds * 1e6)}", f"STATUS={status}")


def alive() -> None:
    """See `watchdog_seconds`."""
    notify("WATCHDOG=1")


def watchdog_seconds() -> float:
    """How often the service manager wants to hear that all is well; 0 for never."""
    pid = os.environ.get("WATCHDOG_PID")
    if pid and pid != str(os.getpid()):
        return 0.0
    try:
        return max(0.0, int(os.environ.get("WATCHDOG_USEC", "0")) / 1e6)
    except ValueError:
        return 0.0
