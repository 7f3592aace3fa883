"""Frames that two domain processes share, and nothing else of their memories.

For each direction of a peer link the host process makes two memfds, one for frames that the neighbour may write and
one that it can only read (its descriptor of that is open for reading only). A granted frame is *moved* there: its
contents are copied to a slot, and the slot is mapped over the frame's place in the granter's memory, where engine and
Python find it at the address it always had. When the last use is over it is moved back. So a neighbour that was taken
over by its guest reaches frames while they are granted to it, and afterwards old copies only.
"""

from __future__ import annotations

import dataclasses
import mmap
import os

from hypervisor import abi
from hypervisor.devices.link_window import map_memory, unmap_memory, view_of
from hypervisor.grants.peer import GrantError
from hypervisor.host.peer_limits import SLOTS
from hypervisor.memory.physical import DomainMemory
from hypervisor.types import PAGE_SIZE

MAX_SHARED = 8192
"""Frames that a domain shares with all its neighbours: each costs its process two memory areas, of some 65000."""
_READ, _WRITE = mmap.PROT_READ, mmap.PROT_WRITE
_SHARED_FIXED = mmap.MAP_SHARED | 0x10
_RESERVED = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000


@dataclasses.dataclass(slots=True)
class Place:
    """Where a frame is shared."""

    slot: int
    writable: bool


class Exports:
    """Frames of this domain that one neighbour uses. For the run loop's thread: the guest must not run meanwhile.

    :param own: the domain's memfd. :param writable, readable: the shared ones, both open for writing; owned from here.
    :param everywhere: frames shared with any neighbour, by index: a frame can be in one place only.
    """

    def __init__(self, memory: DomainMemory, own: int, writable: int, readable: int, everywhere: set[int]) -> None:
        self._memory = memory
        self._own = own
        self._fds = {True: writable, False: readable}
        self._free = {kind: list(range(SLOTS))[::-1] for kind in (True, False)}
        self._places: dict[int, Place] = {}
        self._everywhere = everywhere

    def share(self, index: int, *, writable: bool) -> Place:
        """Where the frame is from now on; it moves when it was shared for reading only.

        :raises GrantError: GNTST_general_error, it is shared with another neighbour; GNTST_no_space.
        """
        place = self._places.get(index)
        if place is not None and (place.writable or not writable):
            return place
        if place is None and index in self._everywhere:
            raise GrantError(abi.GNTST_general_error, f"frame {index} is shared with another domain already")
        if not self._free[writable] or len(self._everywhere) >= MAX_SHARED:
            raise GrantError(abi.GNTST_no_space, f"{len(self._everywhere)} frames are shared")
        new = Place(self._free[writable].pop(), writable)
        try:
            self._memory.share(index)  # it comes back to the memfd
            self._move(index, self._fds[writable], new.slot)
        except OSError as exc:
            self._free[writable].append(new.slot)
            raise GrantError(abi.GNTST_no_space, f"frame {index} cannot be shared: {exc}") from exc
        if place is not None:
            self._free[False].append(place.slot)
        self._places[index] = new
        self._everywhere.add(index)
        return new

    def unshare(self, index: int) -> None:
        """:raises OSError: the process has no mapping left; then it stays where it is."""
        place = self._places.get(index)
        if place is not None:
            self._move(index, self._own, index)
            del self._places[index]
            self._everywhere.discard(index)
            self._free[place.writable].append(place.slot)

    def _move(self, index: int, fd: int, page: int) -> None:
        self._copy(index, fd, page)
        at = self._memory.address + index * PAGE_SIZE
        map_memory(PAGE_SIZE, _READ | _WRITE, _SHARED_FIXED, fd, page * PAGE_SIZE, at)

    def _copy(self, index: int, fd: int, page: int) -> None:
        # Not by pwrite: the limit to files (RLIMIT_FSIZE) is one to memfds, too.
        at = map_memory(PAGE_SIZE, _READ | _WRITE, mmap.MAP_SHARED, fd, page * PAGE_SIZE)
        view_of(at, PAGE_SIZE)[:] = self._memory.page(index)
        unmap_memory(at, PAGE_SIZE)

    def refresh(self) -> None:
        """Bring the domain's memfd up to date, for who reads that."""
        for index in self._places:
            self._copy(index, self._own, index)

    def close(self) -> None:
        for index in list(self._places):
            self.unshare(index)
        for fd in self._fds.values():
            os.close(fd)


class Imports:
    """Frames of one neighbour at their machine addresses: a region for its whole extent, empty but for them.

    :param frames: of the extent. :param writable, readable: owned from here.
    :ivar address: of the region in this process.
    """

    def __init__(self, frames: int, writable: int, readable: int) -> None:
        self._fds = {True: writable, False: readable}
        self._size = frames * PAGE_SIZE
        self.address = map_memory(self._size, 0, _RESERVED, -1)

    def map(self, index: int, place: Place) -> None:
        """:raises OSError."""
        prot = _READ | _WRITE if place.writable else _READ
        at = self.address + index * PAGE_SIZE
        map_memory(PAGE_SIZE, prot, _SHARED_FIXED, self._fds[place.writable], place.slot * PAGE_SIZE, at)

    def unmap(self, index: int) -> None:
        map_memory(PAGE_SIZE, 0, _RESERVED | 0x10, -1, 0, self.address + index * PAGE_SIZE)

    def page(self, index: int) -> memoryview:
        """A frame that is mapped."""
        return view_of(self.address + index * PAGE_SIZE, PAGE_SIZE)

    def close(self) -> None:
        unmap_memory(self.address, self._size)
        for fd in self._fds.values():
            os.close(fd)
