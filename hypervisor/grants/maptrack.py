"""Handles of a domain's mappings of grants (maptrack in xen/common/grant_table.c)."""

from __future__ import annotations

import collections
import dataclasses
from typing import Any

from hypervisor import abi
from hypervisor.grants.peer import GrantError

HANDLES_PER_FRAME = 256
MAX_FRAMES = 1024
"""Xen's default gnttab_max_maptrack_frames."""


@dataclasses.dataclass(slots=True)
class Mapping:
    """One mapping of a grant.

    :ivar mfn: the granted frame.
    :ivar flags: the GNTMAP_* it was made with; host_map and device_map go when that part is unmapped.
    """

    domid: int
    ref: int
    flags: int
    mfn: int


class Maptrack:
    """A domain's handles; at most `max_frames` * 256 at a time.

    Handles are used again in the order in which they became free, so that a stale one fails for long.
    """

    __slots__ = ("_free", "_limit", "_mappings", "_max")

    def __init__(self, max_frames: int = MAX_FRAMES) -> None:
        self._max = max_frames * HANDLES_PER_FRAME
        self._limit = 0
        self._free: collections.deque[int] = collections.deque()
        self._mappings: dict[int, Mapping] = {}

    def __len__(self) -> int:
        return len(self._mappings)

    def take(self) -> int:
        """A free handle; `give_back` it, or `set` its mapping. :raises GrantError: GNTST_no_space."""
        if not self._free:
            if self._limit >= self._max:
                raise GrantError(abi.GNTST_no_space, f"{self._limit} mappings of grants")
            self._free.extend(range(self._limit, self._limit + HANDLES_PER_FRAME))
            self._limit += HANDLES_PER_FRAME
        return self._free.popleft()

    def set(self, handle: int, mapping: Mapping) -> None:
        self._mappings[handle] = mapping

    def get(self, handle: int) -> Mapping:
        """:raises GrantError: GNTST_bad_handle."""
        mapping = self._mappings.get(handle)
        if mapping is None:
            raise GrantError(abi.GNTST_bad_handle, f"no mapping {handle:#x}")
        return mapping

    def give_back(self, handle: int) -> None:
        self._mappings.pop(handle, None)
        self._free.append(handle)

    def items(self) -> list[tuple[int, Mapping]]:
        """All mappings, by handle."""
        return sorted(self._mappings.items())

    # -- save and restore

    def save(self) -> dict[str, Any]:
        mappings = [[handle, m.domid, m.ref, m.flags, m.mfn] for handle, m in self.items()]
        return {"limit": self._limit, "mappings": mappings}

    def restore(self, data: dict[str, Any]) -> None:
        """:raises ValueError: the saved state contradicts itself."""
        limit = int(data["limit"])
        if not 0 <= limit <= self._max or limit % HANDLES_PER_FRAME:
            raise ValueError(f"maptrack limit {limit}")
        mappings = {int(handle): Mapping(int(d), int(r), int(f), int(m)) for handle, d, r, f, m in data["mappings"]}
        if any(not 0 <= handle < limit for handle in mappings) or len(mappings) != len(data["mappings"]):
            raise ValueError("maptrack handles out of range")
        self._limit = limit
        self._mappings = mappings
        self._free = collections.deque(handle for handle in range(limit) if handle not in mappings)
