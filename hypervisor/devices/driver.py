"""What a driver process has of a guest, and what a driver is.

A driver process serves one domain's devices of one kind (its disks, its nics). It has
granted frames and event channels by a `GuestLink` to the domain process, its devices' open
files or sockets from the host process, and nothing else. It may be killed at any moment:
all that must outlive it lies in the rings, in xenstore and on disk.

The parts::

    host process   xenbus states, opening of images and switch ports, supervision     (hypervisor.devices.xenbus)
    driver process `Driver`: rings and data                                         (hypervisor.devices.{block,net})
    domain process grant checks, pins, copies, event channels                       (hypervisor.host.guest_link)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable


class LinkError(Exception):
    """The domain process refuses, or is gone.

    :ivar status: GNTST_*, below 0 (public/grant_table.h); 0 when it is no matter of a grant.
    """

    def __init__(self, message: str, status: int = 0) -> None:
        super().__init__(message)
        self.status = status


class LinkClosed(LinkError):
    """The guest has ended: nothing more can be done for it."""


class Page(Protocol):
    """A granted frame, mapped until `GuestLink.unmap`; `ref` its grant reference.

    :ivar view: its 4096 bytes, shared with the guest: read each field once.
    """

    ref: int
    view: memoryview


@dataclasses.dataclass(frozen=True, slots=True)
class Copy:
    """One piece of a grant copy (GNTTABOP_copy): within one frame of the guest.

    :ivar ref: grant reference; `offset` of the first byte in its frame; `offset` + `length` <= 4096.
    :ivar at: where in `GuestLink.buffer` the bytes come from or go to.
    :ivar to_guest: the direction; the grant must not be read-only then.
    """

    ref: int
    offset: int
    length: int
    at: int
    to_guest: bool


class EventPort(Protocol):
    """An event channel to the guest, as an interdomain one whose near end is domain 0's."""

    def fileno(self) -> int:
        """Readable when the guest has notified."""

    def answer(self) -> bool:
        """Take the notification back before looking at the rings; whether there was one."""

    def notify(self) -> None:
        """Send an event to the guest."""


class GuestLink(Protocol):
    """The guest's grants and event channels, for one driver process. Not thread-safe.

    When the process ends, the domain process closes its event channels' near ends and gives back its mappings.
    """

    @property
    def domid(self) -> int: ...

    @property
    def buffer(self) -> memoryview:
        """Memory shared with the domain process, for `copy`; its size is fixed for the life of the link."""

    def fileno(self) -> int:
        """Readable when the domain process is gone; see `alive`."""

    def alive(self) -> bool: ...

    def map(self, refs: Sequence[int], *, readonly: bool = False) -> list[Page]:
        """Map granted frames. :raises LinkError: one is refused; none is mapped then. :raises LinkClosed."""

    def unmap(self, pages: Sequence[Page]) -> None:
        """Their views must not be used any more. :raises LinkClosed."""

    def copy(self, copies: Sequence[Copy]) -> list[int]:
        """Copy in this order, within one call to the domain process; GNTST_* of each. :raises LinkClosed."""

    def bind(self, port: int) -> EventPort:
        """Bind to a port that the guest left unbound for domain 0, or had bound to a driver before this one.

        :raises LinkError: it does not wait for domain 0. :raises LinkClosed.
        """

    def unbind(self, event: EventPort) -> None:
        """No effect if the guest has closed it already. :raises LinkClosed."""


class Loop(Protocol):
    """The driver process's single thread."""

    def add_reader(self, fd: int, callback: Callable[[], None]) -> None: ...

    def remove_reader(self, fd: int) -> None: ...

    def call_later(self, seconds: float, callback: Callable[[], None]) -> Callable[[], None]:
        """Returns what cancels it."""

    def call_soon(self, callback: Callable[[], None]) -> None: ...


class DeviceBroken(Exception):
    """The front end (or the device behind) cannot be served: the text goes to the device's `detail` and error node."""


class Driver(Protocol):
    """One kind of device in a driver process; made as ``factory(link, loop, report)``.

    ``report(devid, what, detail)`` tells the host process: what = ``broken`` (the device is closed, detail says
    why) or ``warning``.
    """

    def connect(self, devid: int, config: Mapping[str, Any], fds: Sequence[int]) -> None:
        """Serve a device from now on.

        After a driver before this one was killed, the same call comes again: requests that have no response yet are
        done (again).

        :param config: ``frontend`` as `Backend.frontend` gave it, ``device`` as `Backend.device` did.
        :param fds: open descriptors that belong to this device, owned by the driver from here on.
        :raises DeviceBroken: ring or grants are unusable.
        """

    def update(self, devid: int, device: Mapping[str, Any]) -> None:
        """The device's part of the config has changed (size, limits)."""

    def disconnect(self, devid: int) -> None:
        """Finish what is in flight, give back mappings and event channels, close its descriptors."""

    def stats(self) -> dict[int, dict[str, int]]:
        """Counters by devid, named as in `hypervisor.toolstack.devices.DeviceInfo.stats`."""


@runtime_checkable
class Leaving(Protocol):
    """A driver that has more to do than `Driver.disconnect` does, or less, when the guest goes to another host."""

    def leave(self, devid: int) -> None:
        """As `Driver.disconnect`, but the front end stays connected: another driver will go on with its rings."""


@runtime_checkable
class Finishing(Protocol):
    """A driver whose front end may have something left when it has closed."""

    def finish(self, devid: int) -> None:
        """Have the front end look, and serve what comes. No effect if the device is not served."""


@runtime_checkable
class Recording(Protocol):
    """What a driver of disks can do besides, so that a disk can be mirrored while it is written."""

    def track(self, devid: int, fd: int | None) -> None:
        """Record what is written from now on in the file `fd` (owned from here on), or, with None, no more."""

    def written(self, devid: int, fd: int) -> bool:
        """Move what was recorded to where the host process takes it.

        :param fd: of the record, owned from here on. :returns: whether all that was written before is in it.
        """


@runtime_checkable
class Committing(Protocol):
    """A driver whose guest is kept on a second host too: what it sends is seen when that has what led to it.

    Whoever calls `boundary` sees to it that nothing is served until the state of the epoch is taken.
    """

    def hold(self) -> None:
        """Keep back what guests send from now on. Harmless when repeated."""

    def boundary(self, number: int) -> None:
        """What was taken from guests until now belongs to epoch `number`, or to one before."""

    def release(self, number: int) -> None:
        """Epoch `number` is whole: what belongs to it goes out."""

    def let_out(self) -> None:
        """Keep nothing back any more; what was kept goes out. Harmless when repeated."""

    def discard(self) -> None:
        """Forget what was kept back; what comes is kept back still."""


async def _nothing() -> None:
    """There is nothing to be done."""


@dataclasses.dataclass(slots=True)
class Opened:
    """A device made ready in the host process.

    :ivar config: JSON for the driver process (`Driver.connect`'s ``device``).
    :ivar nodes: the back end's own xenstore nodes (name → value) before the front end connects: features.
    :ivar connected: nodes to be written together with state Connected (``sectors``, ``sector-size``, ``info`` ...).
    :ivar frontend: further nodes of the front end's directory (``virtual-device``, ``mac`` ...).
    :ivar fds: a function that gives descriptors for a (new) driver process; called at each start of one.
    :ivar size_bytes: of a disk.
    :ivar close: gives all of it back.

    What a domain's move to another host takes (`hypervisor.host.migration`), with no driver at work:

    :ivar flush: what this host keeps of a disk's content is where the other one finds it. It may be called before that
        too, so that less is left to do. :raises HostFailure: it cannot be done.
    :ivar leave: gives what of the device is on this host only, JSON. :ivar arrive: takes it on the other one; and
        whoever sends frames to a nic learns where it is now.
    :ivar end: as `close`, and waits until all is given back; None: `close` does.
    """

    config: dict[str, Any]
    nodes: dict[str, str]
    connected: dict[str, str]
    frontend: dict[str, str]
    fds: Callable[[], Sequence[int]]
    close: Callable[[], None]
    size_bytes: int = 0
    flush: Callable[[], Awaitable[None]] = _nothing
    leave: Callable[[], dict[str, Any]] = dict
    arrive: Callable[[Mapping[str, Any]], None] = lambda carried: None
    end: Callable[[], Awaitable[None]] | None = None


class Backend(Protocol):
    """One kind of device in the host process.

    :cvar kind: ``disk`` or ``nic``. :cvar type: ``vbd`` or ``vif``, the name in xenstore paths.
    :cvar driver: ``module:attribute`` of the `Driver` factory, loaded in the driver process only.
    """

    kind: str
    type: str
    driver: str

    async def open(self, domain: str, domid: int, spec: Any) -> Opened:
        """Check and open a device of domain `domain` (UUID).

        :raises ToolstackError: ImageInvalid, ImageInUse, NetworkUnknown, DeviceExists ... with cause and cure.
        """

    async def check(self, domain: str, spec: Any) -> int:
        """Whether it could be opened if nobody else had it; what takes time is made ready.

        :returns: bytes of a disk, 0 for others. :raises ToolstackError: as `open`, but for who else uses it.
        """

    def frontend(self, read: Callable[[str], str | None]) -> dict[str, Any]:
        """The front end's nodes, checked, as JSON for the driver.

        :param read: a node's text below the front end's directory, None if there is none.
        :raises DeviceBroken: they make no sense.
        """

    async def resize(self, opened: Opened, spec: Any, size_bytes: int) -> dict[str, str]:
        """Grow; `opened` is updated. :returns: back-end nodes to write. :raises ToolstackError: cannot be."""
