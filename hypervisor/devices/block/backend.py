"""Disks in the host process: opening of images, what the front end is told, growth."""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from hypervisor.devices.block.about import About
from hypervisor.devices.block.disk import DaemonDisk, DiskHold, RawDisk, open_journal, whole_sectors
from hypervisor.devices.block.frontend import MAX_QUEUES, read_frontend
from hypervisor.devices.block.image.daemon import StorageDaemon, find_program
from hypervisor.devices.block.image.files import ImageFile, Opener
from hypervisor.devices.block.journal import load_ring, note_lost, ring_text
from hypervisor.devices.block.ring import MAX_INDIRECT, MAX_RING_ORDER, SECTOR
from hypervisor.devices.driver import Opened
from hypervisor.errors import HostFailure, ImageInUse, SpecInvalid, Unsupported, WrongState

LOG = logging.getLogger(__name__)

VDISK_READONLY = 4
GRANULARITY = 4096
MAX_BYTES = 1 << 44
LOCK_SECONDS, LOCK_EVERY = 5.0, 0.1
"""How long an image may still be held by what is ending: a daemon or driver of before."""


class Settings(Protocol):
    """Of the host process. :ivar image_folders: see `folders`."""

    @property
    def state_dir(self) -> Path: ...

    @property
    def image_folders(self) -> Sequence[str]: ...


def folders(settings: Settings) -> list[Path]:
    """Below which images and their backing files must lie.

    By default ``images`` in the state folder, and beside it the folders that the agent has there.
    """
    if settings.image_folders:
        return [Path(folder) for folder in settings.image_folders]
    found = [settings.state_dir / "images"]
    if settings.state_dir.name == "hypervisor":
        names = ("images", "config-drives", "image-cache", "guest-disks")
        found += [settings.state_dir.parent / name for name in names]
    return found


class BlockBackend:
    """A `hypervisor.devices.driver.Backend`."""

    kind = "disk"
    type = "vbd"
    driver = "hypervisor.devices.block.driver:BlockDriver"

    def __init__(self, settings: Settings) -> None:
        self._opener = Opener(folders(settings))
        self._home = settings.state_dir / "disks"
        self._domains = settings.state_dir / "domains"
        self._holds: dict[int, DiskHold] = {}
        self._closing: dict[Path, asyncio.Task[None]] = {}
        self._users: dict[tuple[int, int], list[str]] = {}
        self._swept = False

    async def open(self, domain: str, domid: int, spec: Any) -> Opened:
        """:param spec: a `hypervisor.toolstack.devices.DiskSpec`.

        :raises ImageInvalid, ImageInUse, HostFailure.
        """
        await self.sweep()
        folder = self._home / f"{domain}-{spec.id}"
        if (closing := self._closing.get(folder)) is not None:
            await asyncio.wait([closing])
        # A folder that is there already: its driver or daemon may be, too, and hold the image.
        before = folder.exists()
        deadline = asyncio.get_running_loop().time() + (LOCK_SECONDS if before else 0.0)
        while True:
            try:
                return await self._open(folder, domain, domid, spec)
            except ImageInUse:
                if asyncio.get_running_loop().time() >= deadline:
                    if not before:
                        shutil.rmtree(folder, ignore_errors=True)
                    raise
                await asyncio.sleep(LOCK_EVERY)
            except BaseException:
                if not before:
                    shutil.rmtree(folder, ignore_errors=True)
                raise

    async def check(self, domain: str, spec: Any) -> int:
        """Another host may be writing to it: nothing is locked, and the daemon of a qcow2 image is not started.

        :returns: bytes. :raises ImageInvalid.
        """
        files = self._opener.chain(
            spec.path, str(spec.format), readonly=spec.readonly, shared=spec.shared, direct=spec.direct, lock=False
        )
        for file in files:
            os.close(file.fd)
        if files[0].format == "qcow2":
            find_program()
        size = files[0].size if files[0].header is None else files[0].header.size
        return whole_sectors(size, spec.path) * SECTOR

    def frontend(self, read: Callable[[str], str | None]) -> dict[str, Any]:
        """:raises DeviceBroken."""
        return read_frontend(read)

    async def resize(self, opened: Opened, spec: Any, size_bytes: int) -> dict[str, str]:
        """:raises SpecInvalid: no such size. :raises WrongState: it would shrink. :raises Unsupported: read-only."""
        hold = self._holds[id(opened)]
        if hold.record is not None:
            raise WrongState(f"disk {spec.id} is being mirrored: make it larger afterwards")
        if size_bytes % SECTOR or not 0 < size_bytes <= MAX_BYTES:
            raise SpecInvalid(
                f"disk {spec.id}: {size_bytes} bytes is no size: give a multiple of {SECTOR}, at most 16 TiB"
            )
        if size_bytes < opened.size_bytes:
            raise WrongState(
                f"disk {spec.id} has {opened.size_bytes} bytes and cannot shrink to {size_bytes}: "
                "what lies there would be lost"
            )
        if spec.readonly:
            raise Unsupported(f"disk {spec.id} is read-only and cannot grow: attach it writable")
        size = await hold.resize(size_bytes)
        opened.size_bytes = size
        opened.config["sectors"] = size // SECTOR
        opened.connected["sectors"] = str(size // SECTOR)
        return dict(opened.connected)

    def hold(self, opened: Opened) -> DiskHold:
        """Of an opened disk, for who mirrors it."""
        return self._holds[id(opened)]

    # -- inside

    async def _open(self, folder: Path, domain: str, domid: int, spec: Any) -> Opened:
        identities: list[tuple[int, int]] = []

        def chain() -> list[ImageFile]:
            try:
                files = self._opener.chain(
                    spec.path, str(spec.format), readonly=spec.readonly, shared=spec.shared, direct=spec.direct
                )
            except ImageInUse as exc:
                raise self._named(exc, spec.path) from None
            identities[:] = [file.identity for file in files]
            return files

        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as exc:
            raise HostFailure(f"{folder} cannot be made: {exc.strerror}") from exc
        journal = open_journal(folder)
        try:
            hold = await self._hold(folder, journal, chain, domid, spec)
        except BaseException:
            os.close(journal)
            raise
        try:
            return self._opened(hold, folder, domain, spec, identities)
        except BaseException:
            await hold.close()
            raise

    async def _hold(
        self, folder: Path, journal: int, chain: Callable[[], list[ImageFile]], domid: int, spec: Any
    ) -> DiskHold:
        if spec.format == "raw":
            (file,) = chain()
            return RawDisk(file, journal, folder)
        about = About(domid, spec.path, str(spec.format), spec.readonly, spec.direct)
        return await DaemonDisk.open(folder, journal, chain, about)

    def _opened(
        self, hold: DiskHold, folder: Path, domain: str, spec: Any, identities: list[tuple[int, int]]
    ) -> Opened:
        sectors = whole_sectors(hold.size, spec.path)
        discard = spec.discard and not spec.readonly
        config = {
            "kind": hold.kind,
            "sectors": sectors,
            "readonly": spec.readonly,
            "direct": spec.direct,
            "discard": discard,
            "limits": {
                "bytes_per_second": spec.limits.bytes_per_second,
                "iops": spec.limits.iops,
                "burst_seconds": spec.limits.burst_seconds,
            },
        }
        opened = Opened(
            config=config,
            nodes={**_features(discard=discard), "dev": spec.id, "mode": "r" if spec.readonly else "w"},
            connected={
                "sectors": str(sectors),
                "sector-size": str(SECTOR),
                "physical-sector-size": str(GRANULARITY if sectors % (GRANULARITY // SECTOR) == 0 else SECTOR),
                "info": str(VDISK_READONLY if spec.readonly else 0),
            },
            frontend={"virtual-device": str(spec.devid), "device-type": "disk"},
            fds=hold.fds,
            close=lambda: None,
            size_bytes=sectors * SECTOR,
        )
        self._holds[id(opened)] = hold
        for identity in identities:
            self._users.setdefault(identity, []).append(domain)
        opened.close = lambda: self._close(opened, folder, domain, identities)
        opened.end = lambda: self._end(opened, folder, domain, identities)
        opened.flush = hold.flush
        # What the guest was told to be written, and was not: it hears of it when it flushes, wherever that is. And
        # responses that a driver which was killed has not shown to it.
        opened.leave = lambda: {"lost": hold.lost(), "ring": ring_text(hold.journal)}
        opened.arrive = lambda carried: _arrive(hold.journal, carried)
        return opened

    async def _end(self, opened: Opened, folder: Path, domain: str, identities: list[tuple[int, int]]) -> None:
        self._close(opened, folder, domain, identities)
        if (closing := self._closing.get(folder)) is not None:
            await asyncio.wait([closing])

    def _close(self, opened: Opened, folder: Path, domain: str, identities: list[tuple[int, int]]) -> None:
        hold = self._holds.pop(id(opened), None)
        if hold is None:
            return
        for identity in identities:
            self._users[identity].remove(domain)
            if not self._users[identity]:
                del self._users[identity]
        task = asyncio.get_running_loop().create_task(hold.close())
        self._closing[folder] = task

        def done(ended: asyncio.Task[None]) -> None:
            if self._closing.get(folder) is ended:
                del self._closing[folder]
            if not ended.cancelled() and (exc := ended.exception()) is not None:
                LOG.error("closing %s: %s", folder, exc)

        task.add_done_callback(done)

    def _named(self, exc: ImageInUse, path: str) -> ImageInUse:
        """Say which domain it is, if it is one of this host."""
        try:
            users = self._users.get(self._opener.identity(path), [])
        except OSError:
            users = []
        return ImageInUse(f"{exc.message} (domain {', '.join(sorted(set(users)))})") if users else exc

    async def sweep(self) -> None:
        """End daemons of domains that went while no host process was there; once is enough."""
        swept, self._swept = self._swept, True
        if swept or not self._home.is_dir():
            return
        for folder in self._home.iterdir():
            domain = folder.name.rpartition("-")[0]
            if (self._domains / domain).is_dir():
                continue
            LOG.info("disk %s: its domain is gone", folder.name)
            daemon = await StorageDaemon.find(folder, lambda: None)
            if daemon is not None:
                await daemon.stop()
            shutil.rmtree(folder, ignore_errors=True)


def _features(*, discard: bool) -> dict[str, str]:
    """What Linux's xen-blkfront asks for (public/io/blkif.h, "Backend XenBus Nodes")."""
    nodes = {
        "feature-barrier": "0",
        "feature-flush-cache": "1",
        "feature-persistent": "1",
        "feature-max-indirect-segments": str(MAX_INDIRECT),
        "max-ring-page-order": str(MAX_RING_ORDER),
        "max-ring-pages": str(1 << MAX_RING_ORDER),
        "multi-queue-max-queues": str(MAX_QUEUES),
        "feature-discard": "1" if discard else "0",
    }
    if discard:
        nodes |= {"discard-granularity": str(GRANULARITY), "discard-alignment": "0", "discard-secure": "0"}
    return nodes


def _arrive(journal: int, carried: Mapping[str, Any]) -> None:
    note_lost(journal, bool(carried.get("lost")))
    load_ring(journal, str(carried.get("ring", "")))
