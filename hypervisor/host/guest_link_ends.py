"""A guest link's descriptors, made by the host process. It needs to know neither grants nor events."""

from __future__ import annotations

import dataclasses
import fcntl
import os
import socket

from hypervisor.host.channel import close_all
from hypervisor.sealed_memory import sealed_memory

BUFFER_BYTES = 4 << 20


@dataclasses.dataclass(slots=True)
class LinkEnds:
    """The descriptors of a new link, made by the host process; see `hypervisor.devices.link`."""

    for_domain: list[int]
    for_driver: list[int]

    @classmethod
    def create(cls, memory: int, buffer_bytes: int = BUFFER_BYTES) -> LinkEnds:
        """:param memory: the guest's memfd, which stays the caller's. :raises OSError."""
        fds: list[int] = []
        try:
            near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            fds += [near.detach(), far.detach()]
            buffer = sealed_memory("guest-link", buffer_bytes)
            fds.append(buffer)
            fds.append(fcntl.fcntl(buffer, fcntl.F_DUPFD_CLOEXEC, 0))
            fds.append(fcntl.fcntl(memory, fcntl.F_DUPFD_CLOEXEC, 0))
            # A description of its own: what is mapped by it can never be made writable.
            fds.append(os.open(f"/proc/self/fd/{memory}", os.O_RDONLY | os.O_CLOEXEC))
        except BaseException:
            close_all(fds)
            raise
        domain, driver, near_buffer, far_buffer, near_memory, readonly = fds
        return cls([domain, near_buffer], [driver, far_buffer, near_memory, readonly])

    def close(self) -> None:
        close_all([*self.for_domain, *self.for_driver])
