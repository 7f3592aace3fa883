"""How a request's segments become memory of this process.

`MappedPages`: the front end uses the same grants again and again (feature-persistent), so each is mapped once and
kept, the least recently used going first when there are too many. `CopiedPages`: the domain process copies
between the guest's frames and the buffer that it shares with us, a batch in one call.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Protocol

from hypervisor.devices.block.ring import PAGE, SECTOR, SECTORS_A_PAGE, Segment
from hypervisor.devices.driver import Copy, GuestLink, LinkClosed, LinkError, Page


@dataclasses.dataclass(slots=True)
class Transfer:
    """The data of one request.

    :ivar to_guest: the guest reads from the disk.
    :ivar length: bytes. :ivar pieces: set by `Access.prepare`.
    :ivar failed: the grants are not what the guest said.
    """

    segments: Sequence[Segment]
    to_guest: bool
    length: int
    pieces: list[memoryview] = dataclasses.field(default_factory=list)
    failed: bool = False
    at: int = 0


class Access(Protocol):
    """One way to get at the guest's frames."""

    def room(self) -> int:
        """Pages that one batch may use; at least `ring.MAX_INDIRECT` + 1."""

    def page(self, ref: int) -> bytes | None:
        """A copy of a granted frame, None if it is none."""

    def prepare(self, transfers: Sequence[Transfer]) -> None:
        """Give each its `pieces`; those to be written to disk hold the guest's data then. :raises LinkClosed."""

    def finish(self, transfers: Sequence[Transfer]) -> None:
        """Bring what was read to the guest. :raises LinkClosed."""

    def close(self) -> None:
        """Give all mappings back. :raises LinkClosed."""


class MappedPages:
    """:param limit: mappings kept between batches, and used in one; see `room`."""

    def __init__(self, link: GuestLink, limit: int) -> None:
        self._link = link
        self._limit = limit
        self._pages: dict[int, Page] = {}  # the least recently used first
        self._whole: dict[int, memoryview] = {}

    def __len__(self) -> int:
        return len(self._pages)

    def room(self) -> int:
        return self._limit

    def set_limit(self, limit: int) -> None:
        self._limit = limit
        self._trim(limit)

    def page(self, ref: int) -> bytes | None:
        self._trim(self._limit - 1)
        if not self._map([ref]):
            return None
        return bytes(self._whole[ref])

    def prepare(self, transfers: Sequence[Transfer]) -> None:
        needed = dict.fromkeys(ref for transfer in transfers for ref, _, _ in transfer.segments)
        missing = [ref for ref in needed if ref not in self._pages]
        if missing:
            # What this batch uses must not be what makes room for it.
            self._touch(needed)
            self._trim(max(0, self._limit - len(missing)))
            if not self._map(missing):
                self._map_each(transfers)
        whole = self._whole
        for transfer in transfers:
            if transfer.failed:
                continue
            pieces = transfer.pieces
            for ref, first, last in transfer.segments:
                page = whole[ref]
                full = first == 0 and last == SECTORS_A_PAGE - 1
                pieces.append(page if full else page[first * SECTOR : (last + 1) * SECTOR])
        if len(self._pages) > self._limit // 2:
            self._touch(needed)

    def finish(self, transfers: Sequence[Transfer]) -> None:
        pass

    def close(self) -> None:
        self._trim(0)

    def _touch(self, refs: Iterable[int]) -> None:
        pages = self._pages
        for ref in refs:
            if (page := pages.pop(ref, None)) is not None:
                pages[ref] = page

    def _trim(self, count: int) -> None:
        if len(self._pages) <= count:
            return
        refs = list(self._pages)[: len(self._pages) - count]
        for ref in refs:
            self._whole.pop(ref)
        self._link.unmap([self._pages.pop(ref) for ref in refs])

    def _map(self, refs: Sequence[int]) -> bool:
        refs = [ref for ref in refs if ref not in self._pages]
        try:
            pages = self._link.map(refs) if refs else []
        except LinkClosed:
            raise
        except LinkError:
            return False
        for page in pages:
            self._pages[page.ref] = page
            self._whole[page.ref] = page.view
        return True

    def _map_each(self, transfers: Sequence[Transfer]) -> None:
        """Some grant is refused: only the requests that use it fail."""
        for transfer in transfers:
            transfer.failed = not self._map(list(dict.fromkeys(ref for ref, _, _ in transfer.segments)))


class CopiedPages:
    """Each transfer has its place in the link's buffer."""

    def __init__(self, link: GuestLink) -> None:
        self._link = link
        self._buffer = link.buffer

    def room(self) -> int:
        return len(self._buffer) // PAGE

    def page(self, ref: int) -> bytes | None:
        (status,) = self._link.copy([Copy(ref, 0, PAGE, 0, to_guest=False)])
        return None if status else bytes(self._buffer[:PAGE])

    def prepare(self, transfers: Sequence[Transfer]) -> None:
        at = 0
        for transfer in transfers:
            transfer.at = at
            transfer.pieces.append(self._buffer[at : at + transfer.length])
            at += transfer.length
        self._copy([transfer for transfer in transfers if not transfer.to_guest])

    def finish(self, transfers: Sequence[Transfer]) -> None:
        self._copy([transfer for transfer in transfers if transfer.to_guest])

    def close(self) -> None:
        pass

    def _copy(self, transfers: Sequence[Transfer]) -> None:
        copies: list[Copy] = []
        owners: list[Transfer] = []
        for transfer in transfers:
            at = transfer.at
            for ref, first, last in transfer.segments:
                length = (last - first + 1) * SECTOR
                copies.append(Copy(ref, first * SECTOR, length, at, transfer.to_guest))
                owners.append(transfer)
                at += length
        if not copies:
            return
        for status, owner in zip(self._link.copy(copies), owners, strict=True):
            if status:
                owner.failed = True
