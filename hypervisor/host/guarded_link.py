"""A driver process's guest link, with the filter that keeps it from all but granted frames."""

from __future__ import annotations

import ctypes
import logging

from hypervisor.devices.link import ProcessLink
from hypervisor.devices.link_window import Window
from hypervisor.errors import HostFailure
from hypervisor.host import seccomp_guard

LOG = logging.getLogger(__name__)


def connect(sock: int, buffer: int, memory: int, memory_ro: int, *, required: bool) -> tuple[ProcessLink, str]:
    """Say HELLO, and give up the reach of the guest's memory. Call it before `sandbox.lock_down`, which must follow.

    :param required: refuse to go on without the filter.
    :returns: the link, and why its mappings are not guarded, "" when they are.
    :raises HostFailure: they are not, and that is required. :raises LinkClosed: the guest has ended.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    window = Window()
    listener, missing = -1, seccomp_guard.unavailable(libc)
    if not missing:
        try:
            code = seccomp_guard.program((memory, memory_ro), window.address)
            listener = seccomp_guard.install(libc, code, listen=True)
        except OSError as exc:
            missing = str(exc)
    if missing:
        missing = f"the driver's mappings are not guarded ({missing}): it sees all of its guest's memory"
        if required:
            raise HostFailure(f"{missing}; run on Linux 5.7 or later, or set sandbox=auto")
        LOG.warning("sandbox: %s", missing)
    link = ProcessLink(sock, buffer, memory, memory_ro, window=window, listener=listener)
    if listener >= 0:
        seccomp_guard.install(libc, seccomp_guard.no_descriptors_out())
    return link, missing
