"""A domain's grant table as the guest sees it: the shared frames, the status frames and the version of their layout.

Entries are live memory of a guest that may be hostile: each is read once, and
only the two bits that are the hypervisor's are ever written (public/grant_table.h).
"""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Callable, Iterable
from typing import Any

from hypervisor import abi
from hypervisor.abi import errno
from hypervisor.errors import XenError
from hypervisor.memory.frames import FrameTable
from hypervisor.memory.physical import DomainMemory
from hypervisor.memory.xenarea import XenArea
from hypervisor.types import PAGE_SIZE

MAX_FRAMES = 64
"""Xen's default gnttab_max_frames."""
INITIAL_FRAMES = 1
USED = abi.GTF_reading | abi.GTF_writing

_V1 = struct.Struct("<HHI")
_V2 = struct.Struct("<HHHHQ")
_STATUS_PER_PAGE = PAGE_SIZE // 2
_V2_PER_PAGE = PAGE_SIZE // abi.SIZEOF_GRANT_ENTRY_V2


@dataclasses.dataclass(frozen=True, slots=True)
class Entry:
    """A copy of a shared entry.

    :ivar frame: machine frame that is granted; the grant's number in the other domain for a transitive one.
    :ivar start: for a sub-page grant its first byte, and `length` in bytes; 0 and 4096 otherwise.
    :ivar target: domain of a transitive grant.
    """

    flags: int
    domid: int
    frame: int
    start: int = 0
    length: int = PAGE_SIZE
    target: int = 0

    @property
    def kind(self) -> int:
        return self.flags & abi.GTF_type_mask


def status_frames_for(frames: int) -> int:
    """Number of status frames that go with so many version 2 frames."""
    return -(-frames * _V2_PER_PAGE // _STATUS_PER_PAGE)


class GrantTable:
    """Versions 1 and 2.

    :param wrote: told the index of each frame that is written here.
    :ivar frames: indexes of the shared frames, grown on demand up to `MAX_FRAMES`.
    :ivar status_frames: indexes of the status frames; none in version 1.
    """

    def __init__(
        self,
        memory: DomainMemory,
        area: XenArea,
        frames: FrameTable,
        wrote: Callable[[int], None] = lambda _index: None,
    ) -> None:
        self._memory = memory
        self._area = area
        self._table = frames
        self._wrote = wrote
        self.version = 1
        self.frames: list[int] = []
        self.status_frames: list[int] = []
        self._spare: list[int] = []
        self.grow(INITIAL_FRAMES)

    # -- size

    @property
    def entries(self) -> int:
        """Number of grant references there are."""
        size = abi.SIZEOF_GRANT_ENTRY_V1 if self.version == 1 else abi.SIZEOF_GRANT_ENTRY_V2
        return len(self.frames) * PAGE_SIZE // size

    def grow(self, count: int) -> None:
        """Have at least `count` frames, and the status frames for them. :raises XenError: EINVAL above the maximum."""
        if count > MAX_FRAMES:
            raise XenError(errno.EINVAL, f"{count} grant frames, at most {MAX_FRAMES}")
        while len(self.frames) < count:
            self.frames.append(self._area.take_shared())
        if self.version == 2:
            self._grow_status()

    def _grow_status(self) -> None:
        while len(self.status_frames) < status_frames_for(len(self.frames)):
            if self._spare:
                index = self._spare.pop()
                self._memory.clear_page(index)
                self._table.share(index, writable=True)
            else:
                index = self._area.take_shared()
            self.status_frames.append(index)

    def _drop_status(self) -> None:
        """:raises XenError: EBUSY, the guest maps one; all stay shared."""
        gone: list[int] = []
        for index in self.status_frames:
            if not self._table.unshare(index):
                for other in gone:
                    self._table.share(other, writable=True)
                raise XenError(errno.EBUSY, "a status frame is mapped")
            gone.append(index)
        self._spare += self.status_frames[::-1]
        self.status_frames = []

    # -- entries

    def _at(self, ref: int) -> int:
        """Byte offset of a shared entry."""
        if self.version == 1:
            page, slot = divmod(ref, PAGE_SIZE // abi.SIZEOF_GRANT_ENTRY_V1)
            return self.frames[page] * PAGE_SIZE + slot * abi.SIZEOF_GRANT_ENTRY_V1
        page, slot = divmod(ref, _V2_PER_PAGE)
        return self.frames[page] * PAGE_SIZE + slot * abi.SIZEOF_GRANT_ENTRY_V2

    def _status_at(self, ref: int) -> int:
        """Byte offset of the word with GTF_reading and GTF_writing."""
        if self.version == 1:
            return self._at(ref)
        page, slot = divmod(ref, _STATUS_PER_PAGE)
        return self.status_frames[page] * PAGE_SIZE + slot * 2

    def entry(self, ref: int) -> Entry:
        """A copy of entry `ref`, which is below `entries`."""
        at = self._at(ref)
        if self.version == 1:
            flags, domid, frame = _V1.unpack_from(self._memory.bytes, at)
            return Entry(flags, domid, frame)
        flags, domid, low, high, frame = _V2.unpack_from(self._memory.bytes, at)
        if flags & abi.GTF_type_mask == abi.GTF_transitive:
            return Entry(flags, domid, frame & 0xFFFF_FFFF, target=low)
        if flags & abi.GTF_sub_page:
            return Entry(flags, domid, frame, low, high)
        return Entry(flags, domid, frame)

    def mark(self, ref: int, *, readonly: bool) -> None:
        """Tell the guest that the grant is in use."""
        self._change(ref, 0, abi.GTF_reading if readonly else USED)

    def clear(self, ref: int, bits: int) -> None:
        """Take back GTF_reading, GTF_writing or both."""
        self._change(ref, bits, 0)

    def _change(self, ref: int, clear: int, add: int) -> None:
        # Both bits lie in the low byte: nothing else of the entry is written, whatever the guest does to it meanwhile.
        at = self._status_at(ref)
        self._memory.bytes[at] = self._memory.bytes[at] & ~clear | add
        self._wrote(at // PAGE_SIZE)

    def swap(self, a: int, b: int) -> None:
        """Exchange two entries, with their status."""
        size = abi.SIZEOF_GRANT_ENTRY_V1 if self.version == 1 else abi.SIZEOF_GRANT_ENTRY_V2
        self._swap_bytes(self._at(a), self._at(b), size)
        if self.version == 2:
            self._swap_bytes(self._status_at(a), self._status_at(b), 2)

    def _swap_bytes(self, a: int, b: int, size: int) -> None:
        data = self._memory.bytes
        data[a : a + size], data[b : b + size] = bytes(data[b : b + size]), bytes(data[a : a + size])
        self._wrote(a // PAGE_SIZE)
        self._wrote(b // PAGE_SIZE)

    # -- version

    def set_version(self, version: int, pinned: Iterable[int]) -> None:
        """Switch the layout. All entries but the first 8, which the tools use, are cleared.

        :param pinned: references that are in use.
        :raises XenError: EINVAL unknown version; EBUSY entries in use, or a mapped status frame; ERANGE version 1
            cannot express one of the first 8. Nothing changed then.
        """
        if version not in (1, 2):
            raise XenError(errno.EINVAL, f"no grant table version {version}")
        if version == self.version:
            return
        if any(ref >= abi.GNTTAB_NR_RESERVED_ENTRIES for ref in pinned):
            raise XenError(errno.EBUSY, "grants are in use")
        if version == 2:
            reserved = [self.entry(ref) for ref in range(abi.GNTTAB_NR_RESERVED_ENTRIES)]
        else:
            reserved = self._reserved_as_v1()
            self._drop_status()
        for index in self.frames:
            self._memory.clear_page(index)
            self._wrote(index)
        self.version = version
        if version == 2:
            self._grow_status()
        for ref, entry in enumerate(reserved):
            self._put(ref, entry)

    def _reserved_as_v1(self) -> list[Entry]:
        entries = [self.entry(ref) for ref in range(abi.GNTTAB_NR_RESERVED_ENTRIES)]
        result: list[Entry] = []
        for ref, entry in enumerate(entries):
            if entry.kind == abi.GTF_transitive or (entry.kind == abi.GTF_permit_access and entry.frame >> 32):
                raise XenError(errno.ERANGE, f"grant {ref} cannot be expressed in version 1")
            if entry.kind == abi.GTF_permit_access:
                status = self._memory.bytes[self._status_at(ref)] & USED
                result.append(Entry(entry.flags | status, entry.domid, entry.frame))
            else:
                result.append(Entry(0, 0, 0))
        return result

    def _put(self, ref: int, entry: Entry) -> None:
        at = self._at(ref)
        if self.version == 1:
            _V1.pack_into(self._memory.bytes, at, entry.flags, entry.domid, entry.frame)
        else:
            _V2.pack_into(self._memory.bytes, at, entry.flags & ~USED, entry.domid, 0, 0, entry.frame)
            self._memory.bytes[self._status_at(ref)] = entry.flags & USED

    # -- save and restore

    def save(self) -> dict[str, Any]:
        return {
            "version": self.version,
            "frames": list(self.frames),
            "status_frames": list(self.status_frames),
            "spare": list(self._spare),
        }

    def restore(self, data: dict[str, Any]) -> None:
        """:raises ValueError: the saved state contradicts itself."""
        version, frames, status = data["version"], list(data["frames"]), list(data["status_frames"])
        if version not in (1, 2) or not INITIAL_FRAMES <= len(frames) <= MAX_FRAMES:
            raise ValueError(f"grant table version {version} with {len(frames)} frames")
        if len(status) != (status_frames_for(len(frames)) if version == 2 else 0):
            raise ValueError(f"grant table version {version} with {len(status)} status frames")
        spare = list(data["spare"])
        if any(not self._memory.max_pages <= index < self._memory.frames for index in (*frames, *status, *spare)):
            raise ValueError("grant frames that are not the hypervisor's")
        self.version, self.frames, self.status_frames, self._spare = version, frames, status, spare
