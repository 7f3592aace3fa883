"""The disks of one domain, in their driver process."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import logging
import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from hypervisor.devices.block.grants import Access, CopiedPages, MappedPages
from hypervisor.devices.block.image.base import Image, ImageGone
from hypervisor.devices.block.image.nbd import NbdImage
from hypervisor.devices.block.image.raw import RawImage
from hypervisor.devices.block.journal import Journal, connection_key, is_lost, note_lost
from hypervisor.devices.block.kept import Kept
from hypervisor.devices.block.limits import Throttle
from hypervisor.devices.block.queue import Counters, Queue
from hypervisor.devices.block.ring import LAYOUTS, MAX_INDIRECT, BlkRing
from hypervisor.devices.block.unflushed import Unflushed
from hypervisor.devices.block.written import Recorded, Written
from hypervisor.devices.driver import DeviceBroken, EventPort, GuestLink, LinkClosed, LinkError, Loop, Page

LOG = logging.getLogger(__name__)

MAX_MAPPED = 6144
"""Persistently mapped grants of all disks together; a link has room for some 8000 mappings."""
MAX_MAPPED_EACH = 2112
"""Of one disk: twice what Linux's front end uses with a ring of one page (32 requests of 32 segments and a page)."""
MIN_MAPPED_EACH = MAX_INDIRECT + 64
AGAIN_IN = 2.0
"""Seconds until what a daemon took along is written again, after the host's disk was full."""
_WARN_EVERY = 10.0
_FULL = (errno.ENOSPC, errno.EDQUOT)

T = TypeVar("T")

Report = Callable[[int, str, str], None]


class Disk:
    """One device; see `hypervisor.devices.block.queue.DiskView`."""

    def __init__(self, devid: int, device: Mapping[str, Any], report: Report) -> None:
        self.devid = devid
        self.image: Image | None = None
        self.counters = Counters()
        self.coming: Image | None = None  # it does not hold yet what is unflushed
        self.unflushed: Unflushed | None = None
        self.lost = False
        self.queues: list[Queue] = []
        self.pages: list[Page] = []
        self.access: Access | None = None
        self.journal_fd = -1
        self.control: socket.socket | None = None
        self.written: Written | None = None
        self._report = report
        self._warned = -_WARN_EVERY
        self.sectors = 0
        self.readonly = True
        self.discard = False
        self.throttle = Throttle({})
        self._limits: Any = None
        self.configure(device)

    def configure(self, device: Mapping[str, Any]) -> None:
        self.sectors = int(device["sectors"])
        self.readonly = bool(device["readonly"])
        self.discard = bool(device["discard"])
        if self._limits != device["limits"]:
            self._limits = device["limits"]
            self.throttle = Throttle(self._limits)

    def use(self, image: Image) -> None:
        """Serve from this image from now on; what was served from before is not closed."""
        self.image = self.recorded(image)

    def recorded(self, image: Image) -> Image:
        """It, or it with a record of what is written, if there is one."""
        return image if self.written is None else Recorded(image, self.written)

    def close_image(self) -> None:
        for image in (self.image, self.coming):
            if image is not None:
                image.close()
        self.image = self.coming = None

    def record(self, written: Written | None) -> None:
        """Record what is written from now on, or do not any more."""
        before, self.written = self.written, written
        if self.image is not None:
            self.use(self.image.image if isinstance(self.image, Recorded) else self.image)
        if before is not None:
            before.close()

    def image_gone(self, why: str) -> None:
        """The host process sends another connection, if it can."""
        LOG.warning("disk %d: image gone: %s", self.devid, why)
        self.close_image()
        self._report(self.devid, "warning", f"the image's daemon has ended, requests wait for another: {why}")

    def may_be_lost(self, error: int) -> None:
        """Something that the guest was told to be written."""
        self.lost = True
        note_lost(self.journal_fd, True)
        self.failed(f"what was written and not flushed may be lost: {errno.errorcode.get(error, str(error))}", error)

    def flush_failed(self) -> None:
        """The guest has been told: it knows that nothing since its last flush is sure."""
        self.lost = False
        note_lost(self.journal_fd, False)

    def failed(self, what: str, error: int) -> None:
        """At most one line in ten seconds: the guest can ask for more errors than anybody wants to read."""
        now = time.monotonic()
        if now - self._warned >= _WARN_EVERY:
            self._warned = now
            cure = ": make room on the host's disk" if error in _FULL else ""
            self._report(self.devid, "warning", f"{what}{cure}")


class BlockDriver:
    """:param report: as `hypervisor.devices.driver.Driver` says."""

    def __init__(self, link: GuestLink, loop: Loop, report: Report) -> None:
        self._link = link
        self._loop = loop
        self._report = report
        self._disks: dict[int, Disk] = {}

    def connect(self, devid: int, config: Mapping[str, Any], fds: Sequence[int]) -> None:
        """``fds``: the image (kind raw), or a socket over which connections to its daemon come (nbd); the journal; of
        a daemon's disk what is unflushed; if it is being mirrored, the record of what is written."""
        device = config["device"]
        raw = device["kind"] == "raw"
        count = 2 if raw else 3
        if devid in self._disks or len(fds) not in (count, count + 1):
            _close(fds)
            raise DeviceBroken(
                f"disk {devid} is served already, or came with {len(fds)} descriptors, not {count} or one more"
            )
        disk = Disk(devid, device, self._report)
        disk.journal_fd = fds[1]
        disk.lost = is_lost(fds[1])
        try:
            if raw:
                disk.use(RawImage(fds[0], direct=bool(device["direct"])))
            else:
                # All of it given: to find it out would take system calls that a driver has not.
                disk.control = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET, 0, fileno=fds[0])
                disk.control.setblocking(False)
                disk.unflushed = _attached(Unflushed.attach, fds[2])
            if len(fds) > count:
                disk.record(_attached(Written.attach, fds[count]))
            self._open_rings(disk, config["frontend"])
        except BaseException:
            self._release(disk, in_order=False)
            raise
        self._disks[devid] = disk
        self._share_mappings()
        for queue in disk.queues:
            queue.recover()
            queue.on_due(self._guard(disk, queue.service))
            self._loop.add_reader(queue.event.fileno(), self._guard(disk, self._notified(queue)))
        if disk.control is not None:
            self._loop.add_reader(disk.control.fileno(), lambda: self._control(disk))
        # What came while nobody listened.
        self._loop.call_soon(lambda: self._go_on(disk))

    def update(self, devid: int, device: Mapping[str, Any]) -> None:
        disk = self._disks.get(devid)
        if disk is None:
            return
        if disk.control is not None:
            # A larger image has a new connection, sent before this.
            self._control(disk)
        disk.configure(device)
        self._go_on(disk)

    def disconnect(self, devid: int) -> None:
        disk = self._disks.pop(devid, None)
        if disk is not None:
            self._release(disk, in_order=True)
            self._share_mappings()

    def finish(self, devid: int) -> None:
        """See `hypervisor.host.finishing`. What is served raises its counters."""
        disk = self._disks.get(devid)
        if disk is not None:
            for queue in disk.queues:
                queue.event.notify()
            self._go_on(disk)

    def track(self, devid: int, fd: int | None) -> None:
        """Begin to record what is written (`fd`: a `Written`), or end it. No effect if the disk is not served."""
        written = _attached(Written.attach, fd) if fd is not None else None
        disk = self._disks.get(devid)
        if disk is not None:
            disk.record(written)
        elif written is not None:
            written.close()

    def written(self, devid: int, fd: int) -> bool:
        """Move what was recorded to where the host process takes it (`Written.move`).

        Between two turns of the loop nothing is being written, or its request would still be without response and be
        done again. :returns: False: this disk was served without this record up to now.
        """
        written = _attached(Written.attach, fd)
        disk = self._disks.get(devid)
        if disk is None:
            # Served by nobody, since a domain has one driver process at a time.
            written.move()
            written.close()
            return True
        known = disk.written is not None and disk.written.ident == written.ident
        if known:
            written.close()
        else:
            disk.record(written)
        assert disk.written is not None
        disk.written.move()
        return known

    def stats(self) -> dict[int, dict[str, int]]:
        return {devid: dataclasses.asdict(disk.counters) for devid, disk in self._disks.items()}

    # -- rings

    def _open_rings(self, disk: Disk, frontend: Mapping[str, Any]) -> None:
        layout = LAYOUTS[frontend["protocol"]]
        persistent = bool(frontend["persistent"])
        disk.access = MappedPages(self._link, MIN_MAPPED_EACH) if persistent else CopiedPages(self._link)
        for number, queue in enumerate(frontend["queues"]):
            refs = [int(ref) for ref in queue["refs"]]
            try:
                pages = self._link.map(refs)
            except LinkClosed:
                raise
            except LinkError as exc:
                raise DeviceBroken(f"ring {number} cannot be mapped: {exc}") from exc
            disk.pages += pages
            ring = BlkRing([page.view for page in pages], layout)
            event = self._bind(int(queue["port"]), ring)
            key = connection_key(self._link.domid, disk.devid, number, frontend["connection"])
            journal = Journal(disk.journal_fd, number, key)
            disk.queues.append(Queue(ring, event, disk.access, journal, disk, self._later))

    def _bind(self, port: int, ring: BlkRing) -> EventPort:
        try:
            return self._link.bind(port)
        except LinkClosed:
            raise
        except LinkError as exc:
            ring.close()
            raise DeviceBroken(f"event channel {port} cannot be bound: {exc}") from exc

    def _later(self, seconds: float, callback: Callable[[], None]) -> Callable[[], None]:
        return self._loop.call_later(seconds, callback)

    def _notified(self, queue: Queue) -> Callable[[], None]:
        def notified() -> None:
            queue.event.answer()
            queue.service()

        return notified

    def _guard(self, disk: Disk, action: Callable[[], None]) -> Callable[[], None]:
        """A ring that makes no sense, or a bug that it found, ends this disk and no other."""

        def guarded() -> None:
            if self._disks.get(disk.devid) is not disk:
                return
            try:
                action()
            except LinkClosed:
                raise
            except (DeviceBroken, LinkError) as exc:
                self._broken(disk, str(exc))
            except Exception as exc:
                LOG.exception("disk %d", disk.devid)
                self._broken(disk, f"{type(exc).__name__}: {exc}; see the driver's log")

        return guarded

    def _broken(self, disk: Disk, why: str) -> None:
        LOG.warning("disk %d is closed: %s", disk.devid, why)
        self._disks.pop(disk.devid, None)
        self._release(disk, in_order=False)
        self._share_mappings()
        self._report(disk.devid, "broken", why)

    def _go_on(self, disk: Disk) -> None:
        for queue in list(disk.queues):
            self._guard(disk, queue.service)()

    def _share_mappings(self) -> None:
        mapped = [disk.access for disk in self._disks.values() if isinstance(disk.access, MappedPages)]
        for access in mapped:
            access.set_limit(max(MIN_MAPPED_EACH, min(MAX_MAPPED_EACH, MAX_MAPPED // len(mapped))))

    def _release(self, disk: Disk, *, in_order: bool) -> None:
        for queue in disk.queues:
            self._loop.remove_reader(queue.event.fileno())
            queue.close(in_order=in_order)
        try:
            for queue in disk.queues:
                self._link.unbind(queue.event)
            if disk.access is not None:
                disk.access.close()
            if disk.pages:
                self._link.unmap(disk.pages)
        except LinkClosed:
            LOG.info("disk %d: the guest has ended already", disk.devid)
        finally:
            disk.queues.clear()
            disk.pages = []
            disk.close_image()
            if disk.control is not None:
                self._loop.remove_reader(disk.control.fileno())
                disk.control.close()
            for memory in (disk.written, disk.unflushed):
                if memory is not None:
                    memory.close()
            _close([disk.journal_fd])

    # -- connections to the daemon behind an image

    def _control(self, disk: Disk) -> None:
        """The host process sends a connection that is ready for requests: at first, after a growth, after a crash."""
        assert disk.control is not None
        while True:
            try:
                data, fds, _, _ = socket.recv_fds(disk.control, 4096, 4, socket.MSG_CMSG_CLOEXEC)
            except BlockingIOError:
                return
            except OSError as exc:
                LOG.info("disk %d: %s", disk.devid, exc)
                data, fds = b"", []
            if not data:
                # The host process has ended. The connection there is goes on.
                self._loop.remove_reader(disk.control.fileno())
                return
            if len(fds) != 1:
                _close(fds)
                continue
            self._new_connection(disk, json.loads(data), fds[0])

    def _new_connection(self, disk: Disk, message: Mapping[str, Any], fd: int) -> None:
        # Nothing is in flight on the old one: a batch is done whole.
        disk.close_image()
        disk.coming = NbdImage(fd, flags=int(message["flags"]))
        self._guard(disk, lambda: self._settle(disk))()

    def _settle(self, disk: Disk) -> None:
        """Serve from the image that has come, once it holds what the daemon before it took along."""
        image, unflushed = disk.coming, disk.unflushed
        if image is None or unflushed is None:
            return
        if unflushed.stale and not unflushed.known:
            # Neither this driver nor one before it has kept it. The guest must not be told that a flush was done.
            disk.may_be_lost(errno.EIO)
        kept = Kept(image, unflushed, disk.may_be_lost)
        try:
            error = kept.settle(disk.recorded(image))
        except ImageGone as exc:
            disk.image_gone(str(exc))
            return
        if error in _FULL:
            # To drop it would be to lose it: the guest waits until there is room.
            disk.failed("what its storage daemon took along cannot be written again, requests wait", error)
            self._later(AGAIN_IN, self._guard(disk, lambda: self._settle(disk)))
            return
        if error:
            disk.may_be_lost(error)
            unflushed.settle(unflushed.daemon)
        disk.coming = None
        disk.use(kept)
        LOG.info("disk %d: connection to its image", disk.devid)
        self._go_on(disk)


def _attached(attach: Callable[[int], T], fd: int) -> T:
    """:raises DeviceBroken: it is something else."""
    try:
        return attach(fd)
    except (ValueError, OSError) as exc:
        raise DeviceBroken(str(exc)) from exc


def _close(fds: Sequence[int]) -> None:
    for fd in fds:
        with contextlib.suppress(OSError):
            os.close(fd)
