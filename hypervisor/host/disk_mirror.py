"""Disks that move with a live-migrated domain: what `hypervisor.devices.block.mirror` needs of a host.

In the order of a migration::

    source: `offers` of its disks        → target: `answers`, what it can do with each
    source: `source`: a `MirrorSource` of those to be copied; `begin`, `round` ..., `finish` with the guest paused
    target: `target`: a `MirrorTarget`, serving meanwhile; `take`: open disks, and specs with the paths they have here

Messages go as blobs of kind `KIND` over the connection of a mover.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from hypervisor.devices.block.backend import BlockBackend, folders
from hypervisor.devices.block.mirror.copied import SourceDisk
from hypervisor.devices.block.mirror.images import (
    Copy,
    DiskAnswer,
    DiskOffer,
    choose,
    describe,
    digest,
    survey,
)
from hypervisor.devices.block.mirror.link import MirrorLink
from hypervisor.devices.block.mirror.source import WINDOW, MirrorSource
from hypervisor.devices.block.mirror.target import Candidate, MirrorTarget
from hypervisor.devices.driver import Backend
from hypervisor.errors import HostUnavailable, MigrationFailed, MigrationRefused, ToolstackError, Unsupported
from hypervisor.host.device import Device
from hypervisor.host.settings import HostSettings
from hypervisor.toolstack.api import MigrationOptions
from hypervisor.toolstack.devices import DiskSpec

KIND = "disk"
_MOST_WAITING = 2 * WINDOW + 4


class BlobLink:
    """A `MirrorLink` on a connection that carries other blobs as well.

    :param blob: `hypervisor.host.mover.client.Mover.blob`. Who receives there hands those of kind `KIND` to `heard`.
    """

    def __init__(self, blob: Callable[[str, bytes | int], Awaitable[None]]) -> None:
        self._blob = blob
        self._waiting: asyncio.Queue[bytes | None] = asyncio.Queue()
        self._over: ToolstackError | None = None

    async def send(self, message: bytes | int) -> None:
        """:raises ToolstackError: the connection is over."""
        if self._over is not None:
            raise self._over
        await self._blob(KIND, message)

    async def receive(self) -> bytes:
        """:raises ToolstackError: the connection is over."""
        message = await self._waiting.get()
        if message is None:
            assert self._over is not None
            self._waiting.put_nowait(None)
            raise self._over
        return message

    def heard(self, data: bytes) -> None:
        """A blob of kind `KIND` has come."""
        if self._over is None and self._waiting.qsize() >= _MOST_WAITING:
            self.over(MigrationFailed("the other host sends more of its disks than it may: are both of one release?"))
        elif self._over is None:
            self._waiting.put_nowait(data)

    def over(self, why: ToolstackError) -> None:
        """The connection has ended; what came before is still received."""
        if self._over is None:
            self._over = why
            self._waiting.put_nowait(None)


def movable(disks: Sequence[Device]) -> list[Device]:
    """Those that `source` can copy: all but the ones of tests."""
    return [disk for disk in disks if isinstance(disk.backend, BlockBackend)]


async def offers(disks: Sequence[Device]) -> list[dict[str, Any]]:
    """What the target is told of a domain's disks. :raises ToolstackError: one cannot be described now."""
    found = []
    for disk in movable(disks):
        spec, opened = _spec(disk), disk.opened
        if opened is None:
            raise HostUnavailable(f"disk {disk.id} is not open now: try again")
        offer = await asyncio.to_thread(describe, spec.id, spec.path, str(spec.format), opened.size_bytes)
        found.append(offer.to_json())
    return found


async def answers(told: object, settings: HostSettings) -> list[dict[str, Any]]:
    """What this host can do with them. :raises MigrationRefused: with one of them nothing."""
    found = []
    for offer in parse_offers(told):
        answer = await asyncio.to_thread(survey, offer, folders(settings), settings.shared_folders)
        if not answer.shared and not answer.path:
            raise MigrationRefused(answer.refusal)
        found.append(answer.to_json())
    return found


def parse_offers(told: object) -> list[DiskOffer]:
    """:raises MigrationRefused: they make no sense."""
    if not isinstance(told, list):
        raise MigrationRefused("the source does not describe its disks: install one release on both")
    return [DiskOffer.from_json(item) for item in told]


def source(
    disks: Sequence[Device], told: list[dict[str, Any]], answered: object, options: MigrationOptions, link: MirrorLink
) -> MirrorSource | None:
    """The source's end; None when nothing is to be copied.

    :param told: what `offers` gave. :param answered: what the target's `answers` gave.
    :raises MigrationRefused: a disk cannot be taken by the target as `options` want it.
    """
    if not isinstance(answered, list) or len(answered) != len(told) or len(told) != len(disks):
        raise MigrationRefused("the domain's disks are not those that were offered: try again")
    wanted = []
    for disk, offer, answer in zip(
        disks, parse_offers(told), [DiskAnswer.from_json(item) for item in answered], strict=True
    ):
        spec = _spec(disk)
        if not spec.id == offer.id == answer.id:
            raise MigrationRefused("the domain's disks are not those that were offered: try again")
        copy = choose(offer, answer, flatten=options.flatten_disks, copy=options.copy_disks)
        if copy is Copy.NOTHING:
            continue
        if spec.shared and not spec.readonly:
            raise MigrationRefused(f"disk {spec.id} is shared with other domains and cannot be copied: detach it")
        assert disk.opened is not None and isinstance(disk.backend, BlockBackend)
        top = copy is Copy.TOP
        files = [(file.path, file.format) for file in offer.files[1:]]
        compare = functools.partial(digest, files) if top and answer.compare else None
        wanted.append(SourceDisk(spec.id, disk.backend.hold(disk.opened), disk.ask, spec.readonly, top, compare))
    return MirrorSource(wanted, link, rate=options.bandwidth_bytes) if wanted else None


def target(
    backend: Backend,
    uuid: str,
    domid: int,
    specs: Sequence[DiskSpec],
    told: object,
    answered: list[dict[str, Any]],
) -> MirrorTarget:
    """The target's end, for whichever disks the source will copy.

    :param told: what came from the source's `offers`. :param answered: what `answers` gave for it.
    :raises MigrationRefused: they are not the domain's disks.
    """
    assert isinstance(backend, BlockBackend)
    by_id = {spec.id: spec for spec in specs}
    found = []
    for offer, item in zip(parse_offers(told), answered, strict=True):
        if offer.id not in by_id:
            raise MigrationRefused(f"the source offers a disk {offer.id[:20]!r} that its domain has not: try again")
        found.append(Candidate(offer, DiskAnswer.from_json(item), by_id[offer.id]))
    return MirrorTarget(backend, uuid, domid, found)


def _spec(disk: Device) -> DiskSpec:
    if not isinstance(disk.spec, DiskSpec) or not isinstance(disk.backend, BlockBackend):
        raise Unsupported(f"{disk.kind} {disk.id} cannot be copied to another host: detach it")
    return disk.spec
