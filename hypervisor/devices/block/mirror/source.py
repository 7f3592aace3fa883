"""The source's end of a mirror: disks are copied while they are written, in rounds that get shorter, and a last one."""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import functools
import logging
import os
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from hypervisor.devices.block.disk import DiskHold, View
from hypervisor.devices.block.image.base import ImageGone
from hypervisor.devices.block.mirror import wire
from hypervisor.devices.block.mirror.link import MirrorLink
from hypervisor.devices.block.mirror.reading import DiskReader
from hypervisor.devices.block.mirror.wire import BadMessage, Kind
from hypervisor.devices.block.written import Written
from hypervisor.devices.rate import Bucket
from hypervisor.errors import HostFailure, HostUnavailable, MigrationFailed, ToolstackError, from_json
from hypervisor.waiting import within

LOG = logging.getLogger(__name__)

WINDOW = 8
"""Messages on their way that the target has not written yet."""
SILENCE = 60.0
"""Seconds in which the target must have written, or flushed, something."""
GREETING = 1800.0
"""Seconds in which it must have made its images, and looked at its backing files if need be."""
REPLACED_WITHIN, TRY_EVERY = 60.0, 0.05
"""How long a driver or daemon that died is waited for."""
ATTEMPTS = 5
"""So many daemons in a row may end before they have told what their image holds."""
BURST_SECONDS = 0.1

Ask = Callable[[str, Sequence[int]], Awaitable[dict[str, Any] | None]]
"""Asks the disk's driver process: op and descriptors. None: the disk has none and needs none. It raises
`HostUnavailable` while a driver that ended is being replaced."""

_Ready = tuple[int, int, int]
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


@dataclasses.dataclass(frozen=True, slots=True)
class Round:
    """What a round has sent. :ivar bytes: of data. :ivar seconds: until it was on the target's stable storage."""

    bytes: int
    seconds: float


class MirrorSource:
    """`begin`, `round` as often as it helps, `finish` when the guest is paused and its drivers have let go; or `abort`.

    One call at a time, except `abort`, `progress` and `limit`. Everything that goes wrong is a `ToolstackError`; the
    disks themselves are never touched.

    :param rate: bytes a second that `begin` and `round` may send, 0 for no limit.
    """

    def __init__(self, disks: Sequence[SourceDisk], link: MirrorLink, *, rate: int = 0) -> None:
        self._link = link
        self._disks = [_Disk(disk, index) for index, disk in enumerate(disks)]
        self._bucket: Bucket | None = None
        self._listener: asyncio.Task[None] | None = None
        self._news = asyncio.Event()
        self._failure: ToolstackError | None = None
        self._ready = False
        self._number = self._synced = 0
        self._flying: collections.deque[int] = collections.deque()
        self._bytes = 0
        self.limit(rate)

    @property
    def disks(self) -> list[str]:
        """Ids of those that are copied."""
        return [disk.source.id for disk in self._disks]

    def limit(self, rate: int) -> None:
        """From now on no faster than that; 0: as fast as it goes."""
        self._bucket = Bucket(rate, rate * BURST_SECONDS, time.monotonic) if rate > 0 else None

    def progress(self) -> tuple[int, int]:
        """Bytes that were sent, and bytes still to be sent, as far as is known now."""
        return self._bytes, sum(disk.left() for disk in self._disks)

    async def begin(self) -> None:
        """Agree with the target and find out what there is to copy; from now on writes are recorded."""
        self._listener = asyncio.get_running_loop().create_task(self._listen())
        told = []
        for disk in self._disks:
            source = disk.source
            digest = await disk.run(source.digest) if source.digest is not None else ""
            told.append(wire.HelloDisk(source.id, source.hold.size, source.top, digest))
        await self._link.send(wire.hello(told))
        await self._until(lambda: self._ready, "make its images", GREETING)
        for disk in self._disks:
            await disk.begin()

    async def round(self) -> Round:
        """Send what is still to be sent: the first time all, then what was written meanwhile."""
        return await self._round(last=False)

    async def finish(self) -> Round:
        """Send the rest, without a limit of bandwidth; then the target's disks are what the source's are.

        The guest must be paused and its drivers have let go of the disks before.
        """
        done = await self._round(last=True)
        await self._end()
        return done

    async def abort(self) -> None:
        """Leave it; harmless when repeated, and after `finish`. The target finds the end of the connection."""
        self._failed(MigrationFailed("the mirror of the disks was ended: try again"))
        await self._end()

    # -- inside

    async def _round(self, *, last: bool) -> Round:
        started, before = time.monotonic(), self._bytes
        for disk in self._disks:
            await disk.collect()
        for disk in self._disks:
            await self._copy(disk, last=last)
        self._number += 1
        number = self._number
        await self._link.send(wire.note(Kind.SYNC, number))
        await self._until(lambda: self._synced >= number, "flush its disks")
        return Round(self._bytes - before, time.monotonic() - started)

    async def _copy(self, disk: _Disk, *, last: bool) -> None:
        """One message is read while the one before is sent."""
        upcoming = self._next(disk)
        try:
            while (message := await upcoming) is not None:
                number, fd, size = message
                try:
                    upcoming = self._next(disk)
                    if not last:
                        await self._pause(size)
                    await self._until(lambda: len(self._flying) < WINDOW, "write")
                    self._flying.append(number)
                    await self._link.send(fd)
                finally:
                    os.close(fd)
                self._bytes += size
        except BaseException:
            # It is lost, and so is the mirror.
            upcoming.add_done_callback(_drop)
            raise

    def _next(self, disk: _Disk) -> asyncio.Task[_Ready | None]:
        self._number += 1
        return asyncio.get_running_loop().create_task(disk.message(self._number))

    async def _pause(self, size: int) -> None:
        if self._bucket is not None:
            self._bucket.take(size)
            while self._bucket is not None and (delay := self._bucket.delay()) > 0 and self._failure is None:
                await asyncio.sleep(min(delay, 1.0))

    async def _until(self, ready: Callable[[], bool], what: str, seconds: float = SILENCE) -> None:
        """:raises ToolstackError: it failed, or the target does nothing any more."""
        while not ready():
            if self._failure is not None:
                raise self._failure
            self._news.clear()
            try:
                await within(self._news.wait(), seconds)
            except TimeoutError:
                raise MigrationFailed(f"the target did not {what} within {seconds:g} s: look at its disks") from None
        if self._failure is not None:
            raise self._failure

    async def _listen(self) -> None:
        try:
            while True:
                message = wire.parse(await self._link.receive(), wire.FROM_TARGET)
                if message.kind is Kind.FAILED:
                    self._failed(from_json(message.document))
                    return
                self._heard(message)
                self._news.set()
        except BadMessage as exc:
            self._failed(MigrationFailed(f"the target says what makes no sense ({exc}): are both of one release?"))
        except ToolstackError as exc:
            self._failed(exc)

    def _heard(self, message: wire.Message) -> None:
        """:raises BadMessage: it answers what was not asked."""
        if message.number > self._number:
            raise BadMessage(f"an answer to message {message.number} of {self._number}")
        if message.kind is Kind.READY:
            self._ready = True
        elif message.kind is Kind.ACK:
            while self._flying and self._flying[0] <= message.number:
                self._flying.popleft()
        elif message.kind is Kind.SYNCED:
            self._synced = message.number

    def _failed(self, failure: ToolstackError) -> None:
        if self._failure is None:
            self._failure = failure
        self._news.set()

    async def _end(self) -> None:
        listener, self._listener = self._listener, None
        if listener is not None:
            listener.cancel()
            await asyncio.gather(listener, return_exceptions=True)
        for disk in self._disks:
            await disk.end()


class _Disk:
    """One disk under way: its reader in a thread of its own, its record of what is written."""

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

    async def collect(self) -> None:
        """What was written since the last time is to be sent."""
        if self.source.readonly:
            return
        bits = await self._take()
        if bits is None:
            LOG.warning("disk %s: what was written is not known, all of it is looked at again", self.source.id)
            await self._survey()
        else:
            self._reader.add(bits)

    async def message(self, number: int) -> _Ready | None:
        """:raises ToolstackError."""
        while True:
            view = await self._open()
            try:
                found = await self.run(functools.partial(self._reader.message, view, number))
                return None if found is None else (number, *found)
            except ImageGone as exc:
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

    async def _take(self) -> bytes | None:
        """Clusters that were written; None: nobody knows. :raises HostUnavailable: its driver was not replaced."""
        deadline = time.monotonic() + REPLACED_WITHIN
        while True:
            try:
                answer = await self.source.ask("written", [self._written.fd])
            except HostUnavailable as exc:
                if time.monotonic() > deadline:
                    raise HostUnavailable(f"disk {self.source.id} is not served: {exc.message}") from exc
                await asyncio.sleep(TRY_EVERY)
                continue
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


def _drop(upcoming: asyncio.Task[_Ready | None]) -> None:
    if not upcoming.cancelled() and upcoming.exception() is None and (message := upcoming.result()) is not None:
        os.close(message[1])
