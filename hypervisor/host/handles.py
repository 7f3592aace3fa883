"""The descriptors that a domain is made of: its memory and its doorbells.

They belong to host and domain process alike and outlive either: whoever is left
passes them on. A doorbell is an eventfd, so a signal given while the other side is
away stays in the kernel until that side is back.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import mmap
import os
from collections.abc import Sequence

from hypervisor.host.channel import close_all
from hypervisor.host.runtime import HOST_PORTS
from hypervisor.sealed_memory import sealed_memory
from hypervisor.types import PAGE_SIZE


@dataclasses.dataclass(slots=True)
class Handles:
    """:ivar memory: sealed memfd of the domain's whole extent.
    :ivar to_host: doorbell by event channel port, rung by the guest; `to_guest` the other way.
    """

    memory: int
    to_host: dict[int, int]
    to_guest: dict[int, int]

    COUNT = 1 + 2 * len(HOST_PORTS)

    @classmethod
    def create(cls, name: str, frames: int) -> Handles:
        """Nothing is allocated yet: the memfd is sparse. Its size is sealed, so no mapping of it can be cut off."""
        fds: list[int] = []
        try:
            fds.append(sealed_memory(name, frames * PAGE_SIZE))
            for _ in range(2 * len(HOST_PORTS)):
                fds.append(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
        except BaseException:
            close_all(fds)
            raise
        return cls.unpack(fds)

    @classmethod
    def unpack(cls, fds: Sequence[int]) -> Handles:
        """:raises ValueError: not as many as `pack` gives."""
        if len(fds) != cls.COUNT:
            raise ValueError(f"{len(fds)} descriptors instead of {cls.COUNT}")
        half = 1 + len(HOST_PORTS)
        return cls(
            fds[0], dict(zip(HOST_PORTS, fds[1:half], strict=True)), dict(zip(HOST_PORTS, fds[half:], strict=True))
        )

    def pack(self) -> list[int]:
        return [self.memory, *(self.to_host[p] for p in HOST_PORTS), *(self.to_guest[p] for p in HOST_PORTS)]

    def map_page(self, frame: int) -> mmap.mmap:
        """One shared page. :raises ValueError: the frame lies outside the extent or the memory is not sealed."""
        size = os.fstat(self.memory).st_size
        seals = fcntl.fcntl(self.memory, fcntl.F_GET_SEALS)
        if not seals & fcntl.F_SEAL_SHRINK or not 0 <= frame * PAGE_SIZE < size:
            raise ValueError(f"frame {frame} of a memory of {size} bytes cannot be mapped")
        return mmap.mmap(self.memory, PAGE_SIZE, offset=frame * PAGE_SIZE)

    def resident_bytes(self) -> int:
        return os.fstat(self.memory).st_blocks * 512

    def close(self) -> None:
        close_all(self.pack())


def ring(doorbell: int) -> None:
    with contextlib.suppress(BlockingIOError):  # the counter is full: it rings already
        os.eventfd_write(doorbell, 1)


def answer(doorbell: int) -> bool:
    """Reset a doorbell; whether it had rung."""
    try:
        return os.eventfd_read(doorbell) > 0
    except BlockingIOError:
        return False
