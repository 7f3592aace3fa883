"""One disk that a mirror copies: its reader in a thread of its own, its record of what is written."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from hypervisor.devices.block.disk import DiskHold, View
from hypervisor.devices.block.image.base import ImageGone
from hypervisor.devices.block.mirror.reading import DiskReader
from hypervisor.devices.block.written import Written
from hypervisor.errors import HostFailure, HostUnavailable, MigrationFailed, ToolstackError

LOG = logging.getLogger(__name__)

REPLACED_WITHIN, TRY_EVERY = 60.0, 0.05
"""How long a driver or daemon that died is waited for."""
ATTEMPTS = 5
"""So many daemons in a row may end before they have told what their image holds."""

Ask = Callable[[str, Sequence[int]], Awaitable[dict[str, Any] | None]]
"""Asks the disk's driver process: op and descriptors. None: the disk has none and needs none. It raises
`HostUnavailable` while a driver that ended is being replaced."""

Ready = tuple[int, int, int]
"""A message: its number, the file of memory that holds it, bytes of data."""
_T = TypeVar("_T")


@dataclasses.dataclass(slots=True)
class SourceDisk:
    """A disk to be copied.

    :ivar id: as in its spec. :ivar readonly: nobody writes to it. :ivar top: the target has its backing files.
    :ivar digest: gives `images.digest` of these, in a thread; None: the target knows that they are the same.
    """

    id: str
    hold: DiskHold
    ask: Ask
    readonly: bool = False
    top: bool = False
    digest: Callable[[], str] | None = None


class CopiedDisk:
    """:param index: of the disk in messages."""

    def __init__(self, source: SourceDisk, index: int) -> None:
        self.source = source
        self._written = Written.create(source.hold.size)
        self._reader = DiskReader(source.id, index, source.hold.size, self._written.cluster, top=source.top)
        self._view: View | None = None
        self._thread = ThreadPoolExecutor(1, f"mirror-{source.id}")
        self._ended = False

    def left(self) -> int:
        recorded = 0 if self._ended else self._written.recorded() * self._written.cluster
        return self._reader.left() + recorded

    async def run(self, work: Callable[[], _T]) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    async def begin(self) -> None:
        if not self.source.readonly:
            self.source.hold.record = self._written
            await self._take()
        await self._survey()

    async def collect(self, *, still: bool = False) -> None:
        """What was written since the last time is to be sent.

        :param still: its driver does nothing, and a new one is not made. :raises HostUnavailable: it is not all there.
        """
        if self.source.readonly:
            return
        if still and self.source.hold.behind():
            raise HostUnavailable(f"the storage daemon of disk {self.source.id} has ended: begin anew")
        bits = await self._take(still=still)
        if bits is None:
            LOG.warning("disk %s: what was written is not known, all of it is looked at again", self.source.id)
            await self._survey()
        else:
            self._reader.add(bits)

    async def message(self, number: int, *, still: bool = False) -> Ready | None:
        """:raises ToolstackError."""
        while True:
            view = await self._open()
            try:
                found = await self.run(functools.partial(self._reader.message, view, number))
                return None if found is None else (number, *found)
            except ImageGone as exc:
                if still:
                    raise HostUnavailable(f"the storage daemon of disk {self.source.id} has ended: begin anew") from exc
                # With its daemon went what was not flushed: the disk may be older now than what was sent.
                LOG.warning("disk %s: %s; reading all of it again", self.source.id, exc)
                self._drop_view()
                await self._survey()

    async def end(self) -> None:
        """Harmless when repeated."""
        if self._ended:
            return
        self._ended = True
        if self.source.hold.record is self._written:
            self.source.hold.record = None
            try:
                await self.source.ask("track", [])
            except ToolstackError as exc:
                LOG.info("disk %s: %s; the next driver records nothing", self.source.id, exc)
        view, self._view = self._view, None
        # In the thread, behind what it is doing still.
        self._thread.submit(_close, view, self._written)
        self._thread.shutdown(wait=False)

    async def _take(self, *, still: bool = False) -> bytes | None:
        """Clusters that were written; None: nobody knows. :raises HostUnavailable: its driver was not replaced."""
        deadline = time.monotonic() + REPLACED_WITHIN
        while True:
            try:
                answer = await self.source.ask("written", [self._written.fd])
            except HostUnavailable as exc:
                if still:  # it was killed: what it had under way is recorded, has no response, and is done again
                    self._written.move()
                    return self._written.collect()
                if time.monotonic() > deadline:
                    raise HostUnavailable(f"disk {self.source.id} is not served: {exc.message}") from exc
                await asyncio.sleep(TRY_EVERY)
                continue
            if answer is None and still:  # it was not served, nor is it now
                self._written.move()
                return self._written.collect()
            if answer is None:
                return self._written.peek()
            if "broken" in answer:
                raise HostFailure(f"disk {self.source.id} cannot be mirrored: {answer['broken']}")
            bits = self._written.collect()
            return bits if answer.get("known") is True else None

    async def _survey(self) -> None:
        """:raises ToolstackError: it cannot be read."""
        for attempt in range(ATTEMPTS):
            view = await self._open()
            try:
                await self.run(functools.partial(self._reader.everything, view))
                return
            except ImageGone as exc:
                LOG.warning("disk %s: %s", self.source.id, exc)
                self._drop_view()
                if attempt + 1 == ATTEMPTS:
                    raise MigrationFailed(f"disk {self.source.id} cannot be read: {exc}: look at its image") from exc

    async def _open(self) -> View:
        deadline = time.monotonic() + REPLACED_WITHIN
        while self._view is None:
            if self._ended:
                raise MigrationFailed("the mirror of the disks was ended: try again")
            try:
                self._view = await self.source.hold.view(writable=False, top=self.source.top)
            except HostFailure as exc:
                if time.monotonic() > deadline:
                    raise MigrationFailed(f"disk {self.source.id} cannot be read: {exc.message}") from exc
                await asyncio.sleep(TRY_EVERY)
        return self._view

    def _drop_view(self) -> None:
        view, self._view = self._view, None
        if view is not None:
            view.close()


def _close(view: View | None, written: Written) -> None:
    if view is not None:
        view.close()
    written.close()
