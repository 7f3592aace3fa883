"""A domain's grant table: the frames it shares with the guest, and its version.

Mapping, copying and transferring by grants come with the device back ends;
until then those operations do not exist here and the guest gets ENOSYS.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hypervisor import abi
from hypervisor.abi import errno
from hypervisor.errors import XenError
from hypervisor.memory.physical import DomainMemory
from hypervisor.memory.xenarea import XenArea

MAX_FRAMES = 32
INITIAL_FRAMES = 1


class GrantTable:
    """Version 1 only for now.

    :ivar frames: indexes of the shared frames, grown on demand up to `MAX_FRAMES`.
    """

    def __init__(self, memory: DomainMemory, area: XenArea) -> None:
        self._memory = memory
        self._area = area
        self.version = 1
        self.frames: list[int] = [area.take_shared() for _ in range(INITIAL_FRAMES)]

    def grow(self, count: int) -> None:
        """Have at least `count` frames. :raises XenError: EINVAL above the maximum."""
        if count > MAX_FRAMES:
            raise XenError(errno.EINVAL, f"{count} grant frames, at most {MAX_FRAMES}")
        while len(self.frames) < count:
            self.frames.append(self._area.take_shared())

    def frame(self, number: int) -> int:
        """Index of shared frame `number`, made if need be (XENMAPSPACE_grant_table)."""
        if number >= MAX_FRAMES:
            raise XenError(errno.EINVAL, f"grant frame {number}, at most {MAX_FRAMES}")
        self.grow(number + 1)
        return self.frames[number]

    def set_version(self, version: int) -> None:
        """:raises XenError: EINVAL for an unknown version, ENOSYS for version 2."""
        if version not in (1, 2):
            raise XenError(errno.EINVAL, f"no grant table version {version}")
        if version == 2:
            raise XenError(errno.ENOSYS, "grant table version 2 is not offered")
        self.version = version

    def save(self) -> dict[str, Any]:
        return {"version": self.version, "frames": list(self.frames)}

    def restore(self, data: dict[str, Any]) -> None:
        self.version = data["version"]
        self.frames = list(data["frames"])


def status_of(action: Callable[[], None]) -> int:
    """GNTST_* of an operation that reports its failures in its argument."""
    try:
        action()
    except XenError as exc:
        return abi.GNTST_bad_domain if exc.errno == errno.ESRCH else abi.GNTST_general_error
    return abi.GNTST_okay
