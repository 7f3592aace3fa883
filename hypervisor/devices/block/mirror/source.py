"""The source's end of a mirror: disks are copied while they are written, in rounds that get shorter, and a last one."""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import logging
import os
import time
from collections.abc import Callable, Sequence

from hypervisor.devices.block.mirror import wire
from hypervisor.devices.block.mirror.copied import CopiedDisk, Ready, SourceDisk
from hypervisor.devices.block.mirror.link import MirrorLink
from hypervisor.devices.block.mirror.wire import BadMessage, Kind
from hypervisor.devices.rate import Bucket
from hypervisor.errors import MigrationFailed, ToolstackError, from_json
from hypervisor.waiting import within

LOG = logging.getLogger(__name__)

WINDOW = 8
"""Messages on their way that the target has not written yet."""
SILENCE = 60.0
"""Seconds in which the target must have written, or flushed, something."""
GREETING = 1800.0
"""Seconds in which it must have made its images, and looked at its backing files if need be."""
BURST_SECONDS = 0.1


@dataclasses.dataclass(frozen=True, slots=True)
class Round:
    """What a round has sent. :ivar bytes: of data. :ivar seconds: until it was on the target's stable storage."""

    bytes: int
    seconds: float


class Batch:
    """Messages that were read and are not sent yet. :ivar bytes: of data."""

    def __init__(self) -> None:
        self.messages: list[Ready] = []
        self.bytes = 0

    def add(self, message: Ready) -> None:
        self.messages.append(message)
        self.bytes += message[2]

    def close(self) -> None:
        """Harmless when repeated."""
        while self.messages:
            os.close(self.messages.pop()[1])


class MirrorSource:
    """`begin`, `round` as often as it helps, `finish` when the guest is paused and its drivers have let go; or `abort`.

    One call at a time, except `abort`, `progress` and `limit`. Everything that goes wrong is a `ToolstackError`; the
    disks themselves are never touched.

    :param rate: bytes a second that `begin` and `round` may send, 0 for no limit.
    """

    def __init__(self, disks: Sequence[SourceDisk], link: MirrorLink, *, rate: int = 0) -> None:
        self._link = link
        self._disks = [CopiedDisk(disk, index) for index, disk in enumerate(disks)]
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

    # -- of a disk that is to be as it was when an epoch of its guest was taken

    async def aside(self) -> None:
        """After `begin` and as many `round` as help: the target keeps what comes until it is told to apply it."""
        await self._note(Kind.ASIDE, "say that it keeps apart what comes")

    async def gather(self, most: int = wire.MAX_ASIDE) -> Batch:
        """What was written since the last time, as it is now; nobody writes until this is done. `deliver` it.

        :param most: bytes. :raises MigrationFailed: it is more. :raises HostUnavailable: it cannot be read now.
        """
        batch = Batch()
        try:
            for disk in self._disks:
                await disk.collect(still=True)
            for disk in self._disks:
                while (message := await self._next(disk, still=True)) is not None:
                    batch.add(message)
                    if batch.bytes > most:
                        raise MigrationFailed(
                            f"the guest writes more than {most >> 20} MiB to its disks from one epoch to the next: "
                            "give a shorter interval, or more bandwidth"
                        )
        except BaseException:
            batch.close()
            raise
        return batch

    async def deliver(self, batch: Batch) -> None:
        """Until the target has all of it. :raises ToolstackError."""
        try:
            for number, fd, size in batch.messages:
                await self._until(lambda: len(self._flying) < WINDOW, "take what was written")
                self._flying.append(number)
                await self._link.send(fd)
                self._bytes += size
        finally:
            batch.close()
        await self._note(Kind.SYNC, "take what was written")

    async def _note(self, kind: Kind, what: str) -> None:
        self._number += 1
        number = self._number
        await self._link.send(wire.note(kind, number))
        await self._until(lambda: self._synced >= number, what)

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
        await self._note(Kind.SYNC, "flush its disks")
        return Round(self._bytes - before, time.monotonic() - started)

    async def _copy(self, disk: CopiedDisk, *, last: bool) -> None:
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

    def _next(self, disk: CopiedDisk, *, still: bool = False) -> asyncio.Task[Ready | None]:
        self._number += 1
        return asyncio.get_running_loop().create_task(disk.message(self._number, still=still))

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


def _drop(upcoming: asyncio.Task[Ready | None]) -> None:
    if not upcoming.cancelled() and upcoming.exception() is None and (message := upcoming.result()) is not None:
        os.close(message[1])
