"""One ring of a disk: take requests, check them, do them, answer.

A batch is what lies in the ring, as far as pages and limits allow. It is done whole and then answered in order;
so between two batches nothing is in flight, and ``rsp_prod`` is all there is to know.
"""

from __future__ import annotations

import dataclasses
import errno
import logging
from collections.abc import Callable
from typing import Protocol

from hypervisor.devices.block.grants import Access, Transfer
from hypervisor.devices.block.image.base import UNSUPPORTED, Action, Image, ImageGone, Operation
from hypervisor.devices.block.journal import Journal
from hypervisor.devices.block.limits import Throttle
from hypervisor.devices.block.ring import (
    EOPNOTSUPP,
    ERROR,
    MAX_INDIRECT,
    MAX_SEGMENTS,
    OKAY,
    SECTOR,
    SECTORS_A_PAGE,
    SEGMENTS_A_PAGE,
    BlkRing,
    Op,
    Request,
    decode_segments,
)
from hypervisor.devices.driver import EventPort

LOG = logging.getLogger(__name__)

ROUNDS = 4
"""Batches in a row before other disks have their turn."""


@dataclasses.dataclass(slots=True)
class Counters:
    """As in `hypervisor.toolstack.devices.DeviceInfo.stats`."""

    read_bytes: int = 0
    write_bytes: int = 0
    read_requests: int = 0
    write_requests: int = 0
    flushes: int = 0
    discards: int = 0
    errors: int = 0


class DiskView(Protocol):
    """What a queue needs to know of its disk.

    :ivar image: None: it is away, and everything waits.
    :ivar sectors: of 512 bytes.
    :ivar lost: of what was written and not flushed something may be gone: the next flush fails.
    """

    image: Image | None
    sectors: int
    readonly: bool
    discard: bool
    throttle: Throttle
    counters: Counters

    lost: bool

    def image_gone(self, why: str) -> None: ...

    def flush_failed(self) -> None: ...

    def failed(self, what: str, error: int) -> None: ...


@dataclasses.dataclass(slots=True)
class Work:
    """A request on its way.

    :ivar status: BLKIF_RSP_*, final once it is not OKAY.
    """

    request: Request
    status: int = OKAY
    transfer: Transfer | None = None
    operations: list[Operation] = dataclasses.field(default_factory=list)


class Queue:
    """:param later: calls a function in so many seconds, and soon with 0.0; returns what cancels it."""

    def __init__(
        self,
        ring: BlkRing,
        event: EventPort,
        access: Access,
        journal: Journal,
        disk: DiskView,
        later: Callable[[float, Callable[[], None]], Callable[[], None]],
    ) -> None:
        self.ring = ring
        self.event = event
        self._access = access
        self._journal = journal
        self._disk = disk
        self._later = later
        self._cancel: Callable[[], None] | None = None
        self._due: Callable[[], None] = self.service

    def on_due(self, callback: Callable[[], None]) -> None:
        """What is called instead of `service` when it is time to go on."""
        self._due = callback

    def recover(self) -> None:
        """Finish what the driver before this one was about to answer."""
        self._journal.recover(self.ring)
        # It may have died between a response and the event for it.
        self.event.notify()

    def service(self) -> None:
        """Do what is there. :raises DeviceBroken: the ring cannot be followed. :raises LinkClosed. :raises OSError."""
        self.stop()
        for _ in range(ROUNDS):
            if self._disk.image is None:
                return
            if (delay := self._disk.throttle.delay()) > 0:
                self._go_on_in(delay)
                return
            count = self.ring.pending()
            if not count:
                if not self.ring.final_check():
                    return
                continue
            works = self._take(count)
            if not self._execute(works):
                return
            self._respond(works)
        self._go_on_in(0.0)

    def stop(self) -> None:
        """Cancel what was to come by itself."""
        if self._cancel is not None:
            self._cancel()
            self._cancel = None

    def close(self, *, in_order: bool) -> None:
        """:param in_order: the front end has ended the connection."""
        self.stop()
        if in_order:
            self._journal.clear()
        self.ring.close()

    def _go_on_in(self, seconds: float) -> None:
        self._cancel = self._later(seconds, self._due)

    # -- taking

    def _take(self, count: int) -> list[Work]:
        works: list[Work] = []
        room = self._access.room() - MAX_INDIRECT
        throttle = self._disk.throttle
        for ahead in range(count):
            work = self._work(self.ring.request(ahead))
            works.append(work)
            if work.transfer is not None:
                room -= len(work.transfer.segments)
            if throttle.limited:
                # A request of no data takes a little of the host's time as well.
                throttle.take(work.transfer.length if work.transfer is not None else SECTOR)
                if throttle.delay() > 0:
                    break
            if room <= 0:
                break
        return works

    def _work(self, request: Request) -> Work:
        """Check a request against the protocol and the disk's borders."""
        kind, work = request.kind, Work(request)
        if kind == Op.DISCARD and request.operation == Op.DISCARD:
            self._discard(work)
        elif kind in (Op.READ, Op.WRITE) or (kind == Op.FLUSH and request.operation == Op.FLUSH):
            self._data(work)
        else:
            work.status = EOPNOTSUPP
        return work

    def _discard(self, work: Work) -> None:
        request, disk = work.request, self._disk
        if not disk.discard or disk.readonly:
            work.status = EOPNOTSUPP
        elif request.count == 0 or request.sector + request.count > disk.sectors:
            work.status = ERROR
        else:
            work.operations.append(Operation(Action.DISCARD, request.sector * SECTOR, request.count * SECTOR))

    def _data(self, work: Work) -> None:
        request, disk = work.request, self._disk
        if request.operation == Op.INDIRECT and not self._fetch_segments(request):
            work.status = ERROR
            return
        kind, segments = request.kind, request.segments
        if request.declared > MAX_SEGMENTS or not (segments or kind == Op.FLUSH):
            work.status = ERROR
            return
        sectors = 0
        for _, first, last in segments:
            if not first <= last < SECTORS_A_PAGE:
                work.status = ERROR
                return
            sectors += last - first + 1
        if (segments and request.sector + sectors > disk.sectors) or (kind != Op.READ and disk.readonly):
            work.status = ERROR
            return
        if kind == Op.FLUSH:
            work.operations.append(Operation(Action.FLUSH))
        if segments:
            action = Action.READ if kind == Op.READ else Action.WRITE
            length = sectors * SECTOR
            work.transfer = Transfer(segments, kind == Op.READ, length)
            work.operations.append(Operation(action, request.sector * SECTOR, length))
            if kind == Op.FLUSH:
                # A flush with data is a write with REQ_PREFLUSH and REQ_FUA.
                work.operations.append(Operation(Action.FLUSH))

    def _fetch_segments(self, request: Request) -> bool:
        count = request.indirect
        if not 1 <= count <= MAX_INDIRECT:
            return False
        for ref in request.references[: -(-count // SEGMENTS_A_PAGE)]:
            page = self._access.page(ref)
            if page is None:
                return False
            request.segments += decode_segments(page, min(SEGMENTS_A_PAGE, count - len(request.segments)))
        return True

    # -- doing

    def _execute(self, works: list[Work]) -> bool:
        """False: the image has gone, and all of it must be done again."""
        image = self._disk.image
        assert image is not None
        moving = [work for work in works if work.transfer is not None]
        transfers = [work.transfer for work in moving if work.transfer is not None]
        if transfers:
            self._access.prepare(transfers)
        operations: list[Operation] = []
        for work in works:
            if work.transfer is not None:
                if work.transfer.failed:
                    work.status = ERROR
                    continue
                for operation in work.operations:
                    operation.pieces = work.transfer.pieces if operation.length else ()
            operations += work.operations
        try:
            if operations:
                image.run(operations)
        except ImageGone as exc:
            self._disk.image_gone(str(exc))
            return False
        self._note_flushes(operations)
        reads = [t for t in transfers if t.to_guest and not t.failed]
        if reads:
            self._access.finish(reads)
        for work in works:
            self._count(work)
        return True

    def _note_flushes(self, operations: list[Operation]) -> None:
        disk = self._disk
        for operation in operations:
            if disk.lost and operation.action == Action.FLUSH and not operation.error:
                operation.error = errno.EIO
                disk.flush_failed()

    def _count(self, work: Work) -> None:
        counters, kind = self._disk.counters, work.request.kind
        for operation in work.operations:
            if operation.error and work.status == OKAY:
                work.status = self._failed(operation)
        if work.status == OKAY and work.transfer is not None and work.transfer.failed:
            work.status = ERROR
        if work.status != OKAY:
            counters.errors += 1
            return
        if kind == Op.DISCARD:
            counters.discards += 1
        if kind == Op.FLUSH:
            counters.flushes += 1
        if work.transfer is not None:
            if work.transfer.to_guest:
                counters.read_requests += 1
                counters.read_bytes += work.transfer.length
            else:
                counters.write_requests += 1
                counters.write_bytes += work.transfer.length

    def _failed(self, operation: Operation) -> int:
        if operation.action == Action.DISCARD and operation.error in UNSUPPORTED:
            return EOPNOTSUPP
        name = errno.errorcode.get(operation.error, str(operation.error))
        self._disk.failed(f"{operation.action.name.lower()} at {operation.offset}: {name}", operation.error)
        return ERROR

    def _respond(self, works: list[Work]) -> None:
        responses = [(work.request.id, work.request.kind, work.status) for work in works]
        self._journal.write(self.ring.done, responses)
        if self.ring.respond(responses):
            self.event.notify()
