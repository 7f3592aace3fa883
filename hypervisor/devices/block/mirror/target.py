"""The target's end of a mirror: new images are filled with what the source sends, and become the guest's disks."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import errno
import logging
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

from hypervisor.devices.block.disk import DiskHold, View
from hypervisor.devices.block.image.base import UNSUPPORTED, Action, ImageGone, Operation
from hypervisor.devices.block.mirror import wire
from hypervisor.devices.block.mirror.images import DiskAnswer, DiskOffer, DiskPlan, digest, remove
from hypervisor.devices.block.mirror.link import MirrorLink
from hypervisor.devices.block.mirror.wire import BadMessage, HelloDisk, Kind, Message
from hypervisor.devices.driver import Opened
from hypervisor.errors import HostFailure, MigrationFailed, MigrationRefused, ToolstackError

LOG = logging.getLogger(__name__)

FLUSH_EVERY = 64 << 20
"""Bytes after which they are brought to stable storage, so that the last flush is short."""
_ZEROES = bytes(1 << 20)


class Backend(Protocol):
    """Of disks; `hypervisor.devices.block.backend.BlockBackend`."""

    async def open(self, domain: str, domid: int, spec: Any) -> Opened: ...

    def hold(self, opened: Opened) -> DiskHold: ...


@dataclasses.dataclass(frozen=True, slots=True)
class Candidate:
    """A disk of the domain that the source may copy.

    :ivar spec: a `hypervisor.toolstack.devices.DiskSpec`, as the source has it.
    """

    offer: DiskOffer
    answer: DiskAnswer
    spec: Any


class MirrorTarget:
    """`serve` until the source is done; the disks are taken over by `take`. Or `abort`.

    Everything that goes wrong is a `ToolstackError`, told to the source as well.

    :param domain: its UUID. :param domid: what it will have here.
    :ivar paths: of the images that were made here; to be kept, and given to `images.remove` if this process dies.
    :ivar on_made: called when there is one more of them.
    """

    def __init__(self, backend: Backend, domain: str, domid: int, disks: Sequence[Candidate]) -> None:
        self.paths: list[str] = []
        self.on_made: Callable[[], None] = lambda: None
        self._backend = backend
        self._domain = domain
        self._domid = domid
        self._candidates = {disk.offer.id: disk for disk in disks}
        self._disks: list[_Disk] = []
        self._thread = ThreadPoolExecutor(1, "mirror")
        self._busy: asyncio.Future[Any] | None = None
        self._ended = False
        self._aside: list[Message] | None = None
        self._waiting = 0

    @property
    def keeps_aside(self) -> bool:
        """Its images are what `apply` made of them, however `serve` ended; what came since is of no account."""
        return self._aside is not None

    async def apply(self) -> None:
        """Write what was put aside (`wire.Kind.ASIDE`). :raises ToolstackError: the images are of no use then."""
        messages, self._aside, self._waiting = self._aside or [], [], 0
        try:
            for message in messages:
                await self._run(self._disks[message.disk].write, message)
        except ImageGone as exc:
            raise HostFailure(f"the storage daemon of an image has ended while it was written: {exc}") from exc

    async def serve(self, link: MirrorLink) -> None:
        """Do what the source says. :raises ToolstackError: it went wrong, and why; or the connection is over."""
        try:
            while True:
                message = wire.parse(await link.receive(), wire.FROM_SOURCE)
                await link.send(await self._answer(message))
        except BadMessage as exc:
            failure: ToolstackError = MigrationFailed(
                f"the source says what makes no sense ({exc}): are both of one release?"
            )
        except ImageGone as exc:
            failure = HostFailure(f"the storage daemon of an image that was being filled has ended ({exc}): try again")
        except ToolstackError as exc:
            failure = exc
        with contextlib.suppress(ToolstackError):
            await link.send(wire.note(Kind.FAILED, document=failure.to_json()))
        raise failure

    async def take(self) -> dict[str, tuple[Any, Opened]]:
        """Specs and disks by id, open for the domain, whose they are from now on. `serve` must have ended.

        :raises ToolstackError: one cannot be opened; nothing is left then.
        """
        try:
            found: dict[str, tuple[Any, Opened]] = {}
            for disk in self._disks:
                assert disk.opened is not None
                if self._aside is not None:
                    await self._run(disk.flush)
                disk.close_view()
                if disk.spec.readonly:
                    disk.opened.close()
                    disk.opened = await self._backend.open(self._domain, self._domid, disk.spec)
                found[disk.plan.id] = disk.spec, disk.opened
        except BaseException:
            await self.abort()
            raise
        self._disks = []
        self._ended = True
        self._thread.shutdown(wait=False)
        return found

    async def abort(self) -> None:
        """Close and remove all of it; harmless when repeated, and without effect after `take`. `serve` should have
        ended."""
        self._ended = True
        if self._busy is not None:
            await asyncio.wait([self._busy])
        disks, self._disks = self._disks, []
        for disk in disks:
            disk.close_view()
            if disk.opened is not None:
                disk.opened.close()
            if disk.made:
                remove(disk.plan.path)
        self._thread.shutdown(wait=False)

    # -- inside

    async def _run(self, work: Any, *args: Any) -> Any:
        """In the thread, to its end even if nobody waits for it any more."""
        if self._ended:
            raise MigrationFailed("the mirror of the disks was ended: try again")
        self._busy = asyncio.get_running_loop().run_in_executor(self._thread, work, *args)
        return await asyncio.shield(self._busy)

    async def _answer(self, message: Message) -> bytes:
        if message.kind is Kind.HELLO:
            await self._hello(wire.parse_hello(message.document))
            return wire.note(Kind.READY)
        if message.kind is Kind.ASIDE:
            self._aside = self._aside or []
        if message.kind in (Kind.SYNC, Kind.ASIDE):
            for disk in self._disks if self._aside is None else ():
                await self._run(disk.flush)
            return wire.note(Kind.SYNCED, message.number)
        if message.disk >= len(self._disks):
            raise BadMessage(f"disk {message.disk} of {len(self._disks)}")
        if self._aside is not None:
            self._put_aside(self._aside, message)
        else:
            await self._run(self._disks[message.disk].write, message)
        return wire.note(Kind.ACK, message.number)

    def _put_aside(self, aside: list[Message], message: Message) -> None:
        self._waiting += len(message.data) + wire.EXTENT.size * len(message.extents)
        if self._waiting > 2 * wire.MAX_ASIDE:
            raise BadMessage("more at once than may wait")
        self._disks[message.disk].check(message)
        aside.append(message)

    async def _hello(self, told: Sequence[HelloDisk]) -> None:
        """Make the images and open them as the domain's disks."""
        if self._disks:
            raise BadMessage("a second greeting")
        for one in told:
            candidate = self._candidates.get(one.id)
            if candidate is None:
                raise BadMessage(f"a disk {one.id[:20]!r} that the domain has not")
            await self._check(one, candidate)
            plan = DiskPlan.of(candidate.offer, candidate.answer, top=one.top)
            self._disks.append(_Disk(plan, dataclasses.replace(candidate.spec, path=plan.path)))
        for disk in self._disks:
            await self._run(disk.create)
            self.paths.append(disk.plan.path)
            self.on_made()
            # One that the guest can only read is filled first, and opened for it in `take`.
            spec = dataclasses.replace(disk.spec, readonly=False)
            disk.opened = await self._backend.open(self._domain, self._domid, spec)
            if self._ended:
                disk.opened.close()
                raise MigrationFailed("the mirror of the disks was ended: try again")
            if disk.opened.size_bytes != disk.plan.size:
                raise HostFailure(f"image {disk.plan.path} has another size than it was made with: try again")
            disk.view = await self._backend.hold(disk.opened).view(writable=True)

    async def _check(self, one: HelloDisk, disk: Candidate) -> None:
        offer, answer = disk.offer, disk.answer
        if one.size != offer.size:
            raise MigrationRefused(
                f"disk {offer.id} has {one.size} bytes now, and had {offer.size}: it was resized: try again"
            )
        if not answer.path or (one.top and not answer.top):
            raise MigrationRefused(answer.refusal or f"disk {offer.id}: its {answer.missing}: copy it there")
        files = [(file.path, file.format) for file in offer.files[1:]]
        if one.top and answer.compare and one.digest != await self._run(digest, files):
            names = ", ".join(name for name, _ in files)
            raise MigrationRefused(
                f"disk {offer.id}: the target's backing file is not the source's ({names}): copy it there, or let the "
                "disk be flattened"
            )


class _Disk:
    """One image that is being filled."""

    def __init__(self, plan: DiskPlan, spec: Any) -> None:
        self.plan = plan
        self.spec = spec
        self.made = False
        self.opened: Opened | None = None
        self.view: View | None = None
        self._unflushed = 0

    def create(self) -> None:
        """In the thread. :raises ToolstackError: nothing was made."""
        self.plan.create()
        self.made = True

    def close_view(self) -> None:
        view, self.view = self.view, None
        if view is not None:
            view.close()

    def check(self, message: Message) -> None:
        """:raises BadMessage: out of bounds."""
        for extent in message.extents:
            if extent.offset + extent.length > self.plan.size:
                raise BadMessage(f"an extent at {extent.offset} behind the end of disk {self.plan.id}")

    def write(self, message: Message) -> None:
        """In the thread. :raises BadMessage: out of bounds. :raises ToolstackError: it cannot be written."""
        self.check(message)
        operations: list[Operation] = []
        data, at = memoryview(message.data), 0
        for extent in message.extents:
            if extent.zero:
                operations.append(Operation(Action.ZERO, extent.offset, extent.length))
            else:
                piece = data[at : at + extent.length]
                operations.append(Operation(Action.WRITE, extent.offset, extent.length, [piece]))
                at += extent.length
        self._do(operations)
        self._unflushed += at
        if self._unflushed >= FLUSH_EVERY:
            self.flush()

    def flush(self) -> None:
        """In the thread. :raises ToolstackError: it cannot be done."""
        self._do([Operation(Action.FLUSH)])
        self._unflushed = 0

    def _do(self, operations: list[Operation]) -> None:
        assert self.view is not None
        self.view.image.run(operations)
        for operation in operations:
            if operation.action == Action.ZERO and operation.error in UNSUPPORTED:
                self._do(_zero_writes(operation))
            elif operation.error:
                full = operation.error in (errno.ENOSPC, errno.EDQUOT)
                cure = "make room there" if full else "look at its disk"
                why = f"{self.plan.path}: {os.strerror(operation.error)}"
                raise HostFailure(f"disk {self.plan.id} cannot be written on the target ({why}): {cure} and try again")


def _zero_writes(operation: Operation) -> list[Operation]:
    end = operation.offset + operation.length
    starts = range(operation.offset, end, len(_ZEROES))
    pieces = [memoryview(_ZEROES)[: end - start] for start in starts]
    return [Operation(Action.WRITE, start, len(p), [p]) for start, p in zip(starts, pieces, strict=True)]
