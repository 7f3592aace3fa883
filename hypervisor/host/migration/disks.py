"""A domain's local disks on the way with it: mirrored while it runs, the last blocks while it stands still."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from hypervisor.devices.block.mirror import images
from hypervisor.devices.block.mirror.source import Batch, MirrorSource
from hypervisor.devices.block.mirror.target import MirrorTarget
from hypervisor.devices.driver import Backend, Opened
from hypervisor.errors import MigrationFailed, ToolstackError
from hypervisor.host import disk_mirror
from hypervisor.host.device import Device
from hypervisor.host.disk_mirror import KIND, BlobLink
from hypervisor.host.mover import CLOSED
from hypervisor.host.mover.client import Mover
from hypervisor.host.records import DomainRecord
from hypervisor.host.settings import HostSettings
from hypervisor.toolstack.api import DomainSpec, MigrationOptions, MigrationTicket
from hypervisor.waiting import within

ANSWERS = "disks"
LITTLE = 1 << 20
"""Bytes that need no round of their own."""
GOOD_ROUND = 0.7
"""A round that leaves more than this share of what the one before left has brought nothing."""
PATIENCE = 2
TELL_EVERY = 0.25
_LONG = 1e8


class Talk:
    """What a mover receives, without what belongs to disks: that goes to `link`."""

    def __init__(self, mover: Mover) -> None:
        self.link = BlobLink(mover.blob)
        self._mover = mover
        self._rest: asyncio.Queue[tuple[str, bytes]] = asyncio.Queue()
        self._task = asyncio.get_running_loop().create_task(self._listen())

    async def receive(self, timeout: float) -> tuple[str, bytes]:
        """As `Mover.receive`. :raises TimeoutError."""
        if self._task.done() and self._rest.empty():
            return CLOSED, b""
        return await within(self._rest.get(), timeout)

    @property
    def why(self) -> str:
        return self._mover.why

    @property
    def error(self) -> ToolstackError | None:
        return self._mover.error

    async def close(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        self.link.over(MigrationFailed("the connection to the other host was closed by this one"))

    async def _listen(self) -> None:
        kind = ""
        while kind != CLOSED:
            kind, data = await self._mover.receive(_LONG)
            if kind == KIND:
                self.link.heard(data)
            else:
                self._rest.put_nowait((kind, data))
        why = self._mover.error
        self.link.over(why or MigrationFailed(f"the connection to the other host was lost ({self._mover.why})"))


class OutgoingDisks:
    """The source's half. :param tell: called with bytes that were sent since the last call, and bytes left.

    :ivar left: bytes still to be sent, as far as is known.
    """

    def __init__(
        self, mirror: MirrorSource | None, options: MigrationOptions, tell: Callable[[int, int], None]
    ) -> None:
        self._mirror = mirror
        self._options = options
        self._tell = tell
        self._told = 0

    @classmethod
    async def of(
        cls,
        disks: Sequence[Device],
        ticket: MigrationTicket,
        options: MigrationOptions,
        link: BlobLink,
        tell: Callable[[int, int], None],
    ) -> OutgoingDisks:
        """:raises MigrationRefused: a disk cannot go as it is wanted."""
        mine = disk_mirror.movable(disks)
        offers = await disk_mirror.offers(mine)
        return cls(disk_mirror.source(mine, offers, ticket.detail.get(ANSWERS, []), options, link), options, tell)

    @property
    def copied(self) -> frozenset[str]:
        """Disks that the target gets copies of, as in `DomainRecord.devices`."""
        return frozenset(f"disk/{ident}" for ident in self._mirror.disks) if self._mirror is not None else frozenset()

    @property
    def left(self) -> int:
        return self._mirror.progress()[1] if self._mirror is not None else 0

    async def copy(self) -> None:
        """All of them, until the rest is little or gets no less. :raises ToolstackError."""
        if self._mirror is None:
            return
        teller = asyncio.get_running_loop().create_task(self._keep_telling())
        try:
            await self._mirror.begin()
            in_vain, before = 0, 0
            for number in range(self._options.max_rounds):
                await self._mirror.round()
                left = self.left
                in_vain = in_vain + 1 if number and left > before * GOOD_ROUND else 0
                before = left
                if left <= LITTLE or in_vain >= PATIENCE:
                    break
        finally:
            teller.cancel()
            await asyncio.gather(teller, return_exceptions=True)
        self._now()

    async def again(self) -> None:
        """What was written since. :raises ToolstackError."""
        if self._mirror is not None:
            await self._mirror.round()
            self._now()

    async def last(self) -> None:
        """The guest stands still, its drivers have let go. :raises ToolstackError."""
        if self._mirror is not None:
            await self._mirror.finish()
            self._now()

    # -- epoch by epoch

    async def aside(self) -> None:
        """From now on the target keeps what comes until an epoch is whole. :raises ToolstackError."""
        if self._mirror is not None:
            await self._mirror.aside()

    async def gather(self) -> Batch:
        """What was written since the last epoch; guest and drivers stand still. :raises ToolstackError."""
        return await self._mirror.gather() if self._mirror is not None else Batch()

    async def deliver(self, batch: Batch) -> None:
        """Until the target has it. :raises ToolstackError."""
        if self._mirror is not None:
            await self._mirror.deliver(batch)
            self._now()

    async def abort(self) -> None:
        """Harmless when repeated, and after `last`."""
        if self._mirror is not None:
            await self._mirror.abort()

    def _now(self) -> None:
        assert self._mirror is not None
        sent, left = self._mirror.progress()
        self._tell(sent - self._told, left)
        self._told = sent

    async def _keep_telling(self) -> None:
        while True:
            await asyncio.sleep(TELL_EVERY)
            self._now()


class IncomingDisks:
    """The target's half. :param made: called with the paths of images that were made here.

    :ivar answers: for the source.
    """

    def __init__(self, offers: object, answers: list[dict[str, Any]], made: Callable[[list[str]], None]) -> None:
        self.answers = answers
        self._offers = offers
        self._made = made
        self._mirror: MirrorTarget | None = None
        self._task: asyncio.Task[None] | None = None
        self._link: BlobLink | None = None
        self._opened: dict[str, Opened] = {}

    @classmethod
    async def of(cls, offers: object, settings: HostSettings, made: Callable[[list[str]], None]) -> IncomingDisks:
        """:raises MigrationRefused: there is a disk that can neither be seen nor copied here."""
        return cls(offers, await disk_mirror.answers(offers, settings), made)

    @property
    def elsewhere(self) -> frozenset[str]:
        """Disks that this host does not see, so that they must be copied; as in `DomainRecord.devices`."""
        return frozenset(f"disk/{answer['id']}" for answer in self.answers if not answer["shared"])

    def begin(self, backend: Backend, record: DomainRecord, mover: Mover) -> None:
        """Be ready for what comes.

        :param backend: of this host's disks. :raises MigrationRefused: the offers are not of this domain.
        """
        if not self.answers:
            return
        uuid, specs = record.spec.uuid, record.spec.disks
        mirror = disk_mirror.target(backend, uuid, record.domid, specs, self._offers, self.answers)
        mirror.on_made = lambda: self._made(list(mirror.paths))
        self._mirror, self._link = mirror, BlobLink(mover.blob)
        self._task = asyncio.get_running_loop().create_task(mirror.serve(self._link))
        self._task.add_done_callback(lambda task: task.cancelled() or task.exception())

    def heard(self, data: bytes) -> None:
        """:raises MigrationFailed: disks are not expected."""
        if self._link is None:
            raise MigrationFailed("the source sends disks that it has not offered: are both hosts of one release?")
        self._link.heard(data)

    async def apply(self) -> None:
        """What came since the last epoch belongs to one that is whole. :raises ToolstackError: the disks are no use."""
        if self._mirror is not None:
            await self._mirror.apply()

    async def take(self, spec: DomainSpec) -> DomainSpec:
        """After the source's last word on disks. :returns: the spec, with the paths that its disks have here.

        :raises ToolstackError: one is not whole.
        """
        if self._mirror is None or self._task is None:
            return spec
        if self._task.done() and not self._mirror.keeps_aside:
            self._task.result()
        await self.end()
        taken = await self._mirror.take()
        self._opened = {f"disk/{name}": opened for name, (_, opened) in taken.items()}
        if missing := self.elsewhere - self._opened.keys():
            name = min(missing).replace("/", " ")
            raise MigrationFailed(f"{name} was not copied, and the target does not see it: try again")
        here = {name: disk for name, (disk, _) in taken.items()}
        return dataclasses.replace(spec, disks=tuple(here.get(disk.id, disk) for disk in spec.disks))

    def use(self) -> dict[str, Opened]:
        """The disks that were taken, by key as in `DomainRecord.devices`; they are the caller's."""
        opened, self._opened = self._opened, {}
        return opened

    async def drop(self) -> None:
        """Nothing is open; harmless when repeated, and after `use`. Images are the caller's to remove."""
        await self.end()
        if self._mirror is not None:
            await self._mirror.abort()
        for opened in self.use().values():
            opened.close()

    async def end(self) -> None:
        """The conversation is over; what was taken stays."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)


def remove(paths: Sequence[str]) -> None:
    """Images that were made for a domain which did not come."""
    for path in paths:
        images.remove(path)
