"""A disk's image while the host process holds it: what a driver is given, growth, the end."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import errno
import fcntl
import json
import logging
import os
import shutil
import socket
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, Protocol

from hypervisor.devices.block.about import About
from hypervisor.devices.block.image.base import Action, Image, ImageGone, Operation
from hypervisor.devices.block.image.daemon import StorageDaemon
from hypervisor.devices.block.image.files import ImageFile
from hypervisor.devices.block.image.handshake import ALLOCATION, ALLOCATION_DEPTH
from hypervisor.devices.block.image.nbd import NbdImage
from hypervisor.devices.block.image.nbd_status import NbdStatus
from hypervisor.devices.block.image.raw import RawImage
from hypervisor.devices.block.journal import JOURNAL_BYTES, is_lost, note_lost
from hypervisor.devices.block.ring import SECTOR
from hypervisor.devices.block.unflushed import Unflushed
from hypervisor.devices.block.written import Written
from hypervisor.errors import HostFailure, ImageInvalid, ToolstackError

LOG = logging.getLogger(__name__)

JOURNAL_NAME = "ring"
RESTART_FIRST, RESTART_MOST = 0.2, 30.0
"""Seconds to wait before a daemon that ended is started again, doubled each time."""

OpenChain = Callable[[], list[ImageFile]]


class DiskHold(Protocol):
    """:ivar size: bytes. :ivar kind: as the driver is told it. :ivar journal: descriptor of its rings' journal.

    :ivar record: of what is written, for every driver to come; owned by who mirrors the disk. None: it is not mirrored.
    """

    kind: str
    size: int
    journal: int
    record: Written | None

    def fds(self) -> list[int]:
        """For a new driver; see `hypervisor.devices.block.driver.BlockDriver.connect`. The caller closes them."""

    async def resize(self, size: int) -> int:
        """Grow to `size` bytes. :returns: the size there is then. :raises ToolstackError."""

    async def view(self, *, writable: bool, top: bool = False) -> View:
        """Another way to its content, besides the driver's: what that one has written is seen.

        :param top: `View.status` tells how deep in a backing chain a range lies, and not what reads as zeroes.
        :raises HostFailure: it cannot be now.
        """

    async def flush(self) -> None:
        """What was written is on its disk. :raises HostFailure: it is not, and the guest's next flush will fail."""

    def lost(self) -> bool:
        """Something that the guest was told to be written may not be, and it was not told yet."""

    def behind(self) -> bool:
        """Not all that the driver has written is seen in a `view`."""

    async def close(self) -> None: ...


@dataclasses.dataclass(frozen=True, slots=True)
class View:
    """:ivar image: to be used by one thread at a time. :ivar status: where what lies, of one behind a daemon.

    :ivar fd: of a raw image, else -1; it is the image's.
    """

    image: Image
    status: NbdStatus | None = None
    fd: int = -1

    def close(self) -> None:
        self.image.close()
        if self.status is not None:
            self.status.close()


def open_journal(folder: Path) -> int:
    """The file of `hypervisor.devices.block.journal`, its room taken now, for later a full disk would stop the ring.

    :raises HostFailure: the disk is full.
    """
    try:
        fd = os.open(folder / JOURNAL_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            os.posix_fallocate(fd, 0, JOURNAL_BYTES)
        except BaseException:
            os.close(fd)
            raise
    except OSError as exc:
        raise HostFailure(f"{folder} cannot be written: {exc.strerror}: make room in the state folder") from exc
    return fd


class RawDisk:
    """:param file: owned from here on; so is `journal`."""

    kind = "raw"

    def __init__(self, file: ImageFile, journal: int, folder: Path) -> None:
        self._file = file
        self.journal = journal
        self._folder = folder
        self.record: Written | None = None
        self.size = file.size

    def fds(self) -> list[int]:
        return [_duplicate(self._file.fd), _duplicate(self.journal), *_record(self.record)]

    async def view(self, *, writable: bool, top: bool = False) -> View:
        flags = fcntl.fcntl(self._file.fd, fcntl.F_GETFL) & os.O_DIRECT
        try:
            # Opened anew: flags of a description are those of all its descriptors. The lock stays with the first one.
            flags |= (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC
            fd = os.open(f"/proc/self/fd/{self._file.fd}", flags)
        except OSError as exc:
            raise HostFailure(f"image {self._file.path} cannot be opened once more: {exc.strerror}") from exc
        return View(RawImage(fd, direct=bool(flags & os.O_DIRECT)), None, fd)

    async def resize(self, size: int) -> int:
        if self._file.block_device:
            now = os.lseek(self._file.fd, 0, os.SEEK_END)
            if now < size:
                raise ImageInvalid(f"{self._file.path} has {now} bytes: make the block device larger first")
            self.size = size
        else:
            try:
                os.ftruncate(self._file.fd, size)
            except OSError as exc:
                cure = "make room" if exc.errno in (errno.ENOSPC, errno.EDQUOT) else "choose a smaller size"
                raise HostFailure(f"{self._file.path} cannot be made larger ({exc.strerror}): {cure}") from exc
            self.size = self._file.size = size
        return self.size

    async def flush(self) -> None:
        if fcntl.fcntl(self._file.fd, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDONLY:
            try:
                await asyncio.to_thread(os.fdatasync, self._file.fd)
            except OSError as exc:
                raise _unflushed(self.journal, self._file.path, exc.errno or errno.EIO) from exc

    def lost(self) -> bool:
        return is_lost(self.journal)

    def behind(self) -> bool:
        return False

    async def close(self) -> None:
        os.close(self._file.fd)
        os.close(self.journal)
        shutil.rmtree(self._folder, ignore_errors=True)


class DaemonDisk:
    """A disk behind a `StorageDaemon`, which is started again when it ends. Made by `open`."""

    kind = "nbd"

    def __init__(self, folder: Path, journal: int, chain: list[ImageFile], open_chain: OpenChain, about: About) -> None:
        self.size = 0
        self._folder = folder
        self.journal = journal
        self._chain = chain  # empty after an adoption: the daemon holds the files and their locks
        self._open_chain = open_chain
        self._about = about
        self._daemon: StorageDaemon | None = None
        self._control: socket.socket | None = None
        self.record: Written | None = None
        self._lock = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()
        self._restarting: asyncio.Task[None] | None = None
        self._closed = False
        self._unflushed: Unflushed

    @classmethod
    async def open(cls, folder: Path, journal: int, open_chain: OpenChain, about: About) -> DaemonDisk:
        """Find the daemon of a host process before this one, or start one. :raises ToolstackError."""
        disk = cls(folder, journal, [], open_chain, about)
        found = await StorageDaemon.find(folder, disk._daemon_exited)
        if found is not None and not about.matches(folder):
            await found.stop()
            found = None
        if found is not None and await disk._use(found):
            LOG.info("disk %s: its storage daemon is there", about.path)
            # What a driver of before has written and not flushed, only that driver knew.
            disk._unflushed = Unflushed.create(known=about.readonly)
            return disk
        went_on = about.matches(folder)  # the guest, while its daemon did not
        disk._unflushed = Unflushed.create(known=about.readonly or not went_on)
        if went_on:
            disk._unflushed.daemon_ended()
        try:
            await disk._start()
        except BaseException:
            disk._closed = True
            disk._close_chain()
            disk._unflushed.close()
            raise
        about.save(folder)
        return disk

    def fds(self) -> list[int]:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        if self._control is not None:
            self._control.close()
        self._control = ours
        ours.setblocking(False)
        self._task(self._supply(fence=True))
        return [theirs.detach(), _duplicate(self.journal), _duplicate(self._unflushed.fd), *_record(self.record)]

    async def view(self, *, writable: bool, top: bool = False) -> View:
        async with self._lock:
            if self._daemon is None:
                raise HostFailure(f"the storage daemon of {self._about.path} is being started again: try again")
            data = await self._daemon.view(writable=writable)
            image = NbdImage(data.sock.detach(), flags=data.flags)
            try:
                context = ALLOCATION_DEPTH if top else ALLOCATION
                told = await self._daemon.view(writable=False, context=context)
            except BaseException:
                image.close()
                raise
            return View(image, NbdStatus(told.sock.detach(), told.context))

    async def resize(self, size: int) -> int:
        async with self._lock:
            if self._daemon is None:
                raise HostFailure(f"the storage daemon of {self._about.path} is being started again: try again")
            try:
                await self._daemon.resize(size)
                self.size = size
            finally:
                await self._give_connection(fence=False)
        return self.size

    async def flush(self) -> None:
        if self._about.readonly:
            return
        if self._unflushed.stale and not self._unflushed.empty:
            raise HostFailure(
                f"what a storage daemon of {self._about.path} took along is being written again: try again"
            )
        view, operation = await self.view(writable=True), Operation(Action.FLUSH)
        try:
            await asyncio.to_thread(view.image.run, [operation])
        except ImageGone as exc:
            raise HostFailure(f"the storage daemon of {self._about.path} has ended: try again") from exc
        finally:
            view.close()
        if operation.error:
            raise _unflushed(self.journal, self._about.path, operation.error)

    def behind(self) -> bool:
        return self._daemon is None or (self._unflushed.stale and not self._unflushed.empty)

    def lost(self) -> bool:
        return is_lost(self.journal) or (self._unflushed.stale and not self._unflushed.known)

    async def close(self) -> None:
        self._closed = True
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._control is not None:
            self._control.close()
            self._control = None
        if self._daemon is not None:
            await self._daemon.stop()
        self._close_chain()
        self._unflushed.close()
        os.close(self.journal)
        shutil.rmtree(self._folder, ignore_errors=True)

    async def _start(self) -> None:
        if not self._chain:
            self._chain = self._open_chain()
        about = self._about
        daemon = await StorageDaemon.start(
            self._folder, self._chain, readonly=about.readonly, direct=about.direct, on_exit=self._daemon_exited
        )
        if not await self._use(daemon):
            raise HostFailure(f"the storage daemon of {about.path} has ended at once: see {self._folder}")

    async def _use(self, daemon: StorageDaemon) -> bool:
        """Whether it is there to be used."""
        try:
            size = await daemon.size()
        except BaseException as exc:
            await daemon.stop()
            if isinstance(exc, ToolstackError):
                return False
            raise
        if not daemon.ended:
            self._daemon, self.size = daemon, size
        return not daemon.ended

    async def _supply(self, *, fence: bool) -> None:
        """Give the driver a connection, if there is a driver."""
        async with self._lock:
            await self._give_connection(fence=fence)

    async def _give_connection(self, *, fence: bool) -> None:
        """With the lock held."""
        control, daemon = self._control, self._daemon
        if control is None or daemon is None:
            return
        try:
            export = await daemon.connection(fence=fence, writable=not self._about.readonly)
        except ToolstackError as exc:
            LOG.error("disk %s: %s", self._about.path, exc)
            # The driver waits. A daemon that does not answer is of no use: the next one may be.
            daemon.kill()
            return
        message = {"size": export.size, "flags": export.flags}
        with contextlib.suppress(OSError):
            socket.send_fds(control, [json.dumps(message).encode()], [export.sock.fileno()])
        export.sock.close()

    def _daemon_exited(self) -> None:
        if self._daemon is None or self._closed:
            return  # it was not in use yet: who starts it finds out
        self._daemon = None
        LOG.error("disk %s: its storage daemon has ended, the guest waits", self._about.path)
        self._unflushed.daemon_ended()
        if self._restarting is None or self._restarting.done():
            self._restarting = self._task(self._restart())

    async def _restart(self) -> None:
        """Until one is in use and the driver has it: it may be killed at any moment of that, too."""
        delay = RESTART_FIRST
        while self._daemon is None:
            await asyncio.sleep(delay)
            delay = min(RESTART_MOST, 2 * delay)
            try:
                async with self._lock:
                    await self._start()
                    await self._give_connection(fence=False)
            except ToolstackError as exc:
                LOG.error("disk %s: %s", self._about.path, exc)

    def _task(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _close_chain(self) -> None:
        for file in self._chain:
            os.close(file.fd)
        self._chain = []


def _unflushed(journal: int, path: str, error: int) -> HostFailure:
    """The kernel tells of it once: so it must be written down for the guest."""
    note_lost(journal, True)
    return HostFailure(f"image {path} cannot be written out ({os.strerror(error)}): look after the host's disk")


def _record(record: Written | None) -> list[int]:
    return [] if record is None else [_duplicate(record.fd)]


def _duplicate(fd: int) -> int:
    return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 0)


def whole_sectors(size: int, path: str) -> int:
    """:raises ImageInvalid: less than one."""
    if size < SECTOR:
        raise ImageInvalid(f"image {path} has {size} bytes: a disk has at least one sector of {SECTOR}")
    return size // SECTOR
