"""What one driver process holds of the guest: mapped grants and bound ports. Belongs to the run loop's thread."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import logging
import os
from collections.abc import Callable
from typing import Any

from hypervisor import abi
from hypervisor.abi import errno
from hypervisor.devices import link_wire as wire
from hypervisor.devices.link_window import SLOTS
from hypervisor.domain import Domain
from hypervisor.errors import XenError
from hypervisor.evtchn.core import ChannelState, EventChannels
from hypervisor.evtchn.hostside import FIRST_DRIVER_PORT, HostRouter
from hypervisor.grants.active import ActiveGrants
from hypervisor.grants.peer import HOST_DOMID, HOST_READ, HOST_WRITE, GrantError
from hypervisor.host.guest_link_guard import Guard
from hypervisor.host.handles import ring
from hypervisor.host.writable_pages import WritablePages
from hypervisor.types import PAGE_SIZE

LOG = logging.getLogger(__name__)

MAX_PORTS = 64
"""Of one link."""
_peer_ports = itertools.count(FIRST_DRIVER_PORT)


class Refused(Exception):
    """:ivar status: GNTST_* below 0, or an errno."""

    def __init__(self, status: int, why: str) -> None:
        super().__init__(why)
        self.status = status


@dataclasses.dataclass(frozen=True, slots=True)
class LinkTarget:
    """What links need of the machine.

    :ivar frames: pages of its memfd; `index` the page of a machine frame, -1 when there is none.
    :ivar share: makes a page one of the memfd, if it is none yet (`DomainMemory.share`). :raises OSError.
    :ivar post: has a function called in the run loop's thread (`Machine.post`).
    :ivar machine: what neighbours reach; None: it has none.
    :ivar mapped: how often driver processes have a page of the memfd mapped; `writable`: those they can write to.
    :ivar shared: pages that a neighbour uses; they are not in the memfd now.
    """

    domid: int
    frames: int
    index: Callable[[int], int]
    grants: ActiveGrants
    events: EventChannels
    router: HostRouter
    post: Callable[[Callable[[], None]], None]
    machine: Domain | None = None
    mapped: collections.Counter[int] = dataclasses.field(default_factory=collections.Counter)
    shared: set[int] = dataclasses.field(default_factory=set)
    writable: WritablePages = dataclasses.field(default_factory=WritablePages)
    share: Callable[[int], None] = lambda _page: None


@dataclasses.dataclass(slots=True)
class Held:
    """A mapping: one pin of the grant, one hold of the frame."""

    ref: int
    mfn: int
    page: int
    readonly: bool

    @property
    def increment(self) -> int:
        return HOST_READ if self.readonly else HOST_WRITE


class LinkState:
    """:param buffer: shared with the driver, for copies.

    :param port_closed: called with a port that the guest closed.
    :ivar ports: eventfd to the driver and number of its end, by port of the guest.
    :ivar guard: lets the driver map what is held; None: nothing keeps it from mapping more.
    """

    def __init__(self, target: LinkTarget, buffer: memoryview, port_closed: Callable[[int], None]) -> None:
        self._target = target
        self._buffer = buffer
        self._port_closed = port_closed
        self.guard: Guard | None = None
        self._held: dict[int, Held] = {}
        self.ports: dict[int, tuple[int, int]] = {}
        self.welcome = False

    def __len__(self) -> int:
        """Mappings there are."""
        return len(self._held)

    def execute(self, op: int, flags: int, items: list[tuple[Any, ...]]) -> list[tuple[int, ...]]:
        """A request that is of the right form; the answer's items. :raises Refused. :raises wire.BadForm."""
        if op == wire.MAP:
            return self._map(items, readonly=bool(flags & wire.READONLY))
        if op == wire.UNMAP:
            return self._unmap(items)
        if op == wire.COPY:
            return [(self._copy(*item),) for item in items]
        return self._hello()

    def _hello(self) -> list[tuple[int, ...]]:
        self.welcome = True
        return [(self._target.domid, self._target.frames, len(self._buffer))]

    # -- mappings

    def _map(self, items: list[tuple[Any, ...]], *, readonly: bool) -> list[tuple[int, ...]]:
        """All or none."""
        taken: dict[int, Held] = {}
        try:
            for ref, slot in items:
                if slot >= SLOTS or slot in self._held or slot in taken:
                    raise wire.BadForm(f"slot {slot} is in use, or there is none")
                taken[slot] = self._pin(ref, readonly=readonly)
        except BaseException:
            for held in taken.values():
                self._unpin(held)
            raise
        # Only now: a slot that was announced could be mapped at once.
        self._held.update(taken)
        if self.guard is not None:
            for slot, held in taken.items():
                self.guard.grant(slot, held.page, readonly=readonly)
        return [(held.page,) for held in taken.values()]

    def _pin(self, ref: int, *, readonly: bool) -> Held:
        grants = self._target.grants
        increment = HOST_READ if readonly else HOST_WRITE
        try:
            mfn = grants.pin(ref, HOST_DOMID, increment, readonly=readonly)
            try:
                grants.hold(mfn, writable=not readonly)
            except GrantError:
                grants.unpin(ref, increment, readonly=readonly)
                raise
        except GrantError as exc:
            raise Refused(exc.status, exc.why) from exc
        held = Held(ref, mfn, self._target.index(mfn), readonly)
        self._target.mapped[held.page] += 1
        if not readonly:
            self._target.writable.mapped(held.page)
        if held.page in self._target.shared:
            self._unpin(held)
            raise Refused(abi.GNTST_general_error, f"grant {ref}: another domain has the frame mapped")
        try:
            self._target.share(held.page)
        except OSError as exc:
            self._unpin(held)
            raise Refused(abi.GNTST_no_space, f"grant {ref}: its frame cannot be shared: {exc}") from exc
        return held

    def _unpin(self, held: Held) -> None:
        mapped, grants = self._target.mapped, self._target.grants
        if not held.readonly:
            self._target.writable.unmapped(held.page)
        mapped[held.page] -= 1
        if not mapped[held.page]:
            del mapped[held.page]
        grants.drop(held.mfn, writable=not held.readonly)
        grants.unpin(held.ref, held.increment, readonly=held.readonly)

    def _unmap(self, items: list[tuple[Any, ...]]) -> list[tuple[int, ...]]:
        for (slot,) in items:
            if slot not in self._held or not self._give_back(slot):
                raise wire.BadForm(f"slot {slot} is not in use, or is mapped still")
        return []

    def _give_back(self, slot: int) -> bool:
        if self.guard is not None and not self.guard.forget(slot):
            return False
        self._unpin(self._held.pop(slot))
        return True

    # -- copies

    def _copy(self, ref: int, offset: int, length: int, at: int, direction: int) -> int:
        """GNTST_* of one piece."""
        if offset + length > PAGE_SIZE or at + length > len(self._buffer) or direction > 1:
            return abi.GNTST_bad_copy_arg
        grants, readonly = self._target.grants, not direction
        try:
            window = grants.pin_copy(ref, HOST_DOMID, readonly=readonly, transitive=True)
        except GrantError as exc:
            return exc.status
        owner = window.owner
        try:
            if offset < window.start or offset + length > window.start + window.length:
                return abi.GNTST_general_error
            buffer = self._buffer[at : at + length]
            if readonly:
                buffer[:] = owner.page(window.mfn)[offset : offset + length]
            else:
                owner.hold(window.mfn, writable=True)
                owner.page(window.mfn)[offset : offset + length] = buffer
                owner.drop(window.mfn, writable=True)
            return abi.GNTST_okay
        except GrantError as exc:
            return exc.status
        finally:
            grants.unpin_copy(ref, readonly=readonly)
            owner.drop(window.mfn, writable=False)

    # -- event channels

    def bind(self, port: int, bell: int) -> None:
        """:param bell: eventfd to the driver, owned from here on. :raises Refused: it stays the caller's."""
        if len(self.ports) >= MAX_PORTS:
            raise Refused(errno.ENOSPC, f"{MAX_PORTS} ports of one link are bound")
        peer_port = next(_peer_ports)
        try:
            self._target.events.accept(port, HOST_DOMID, peer_port)
        except XenError as exc:
            raise Refused(exc.errno, exc.why) from exc
        self.ports[port] = (bell, peer_port)
        self._target.router.join(port, lambda: ring(bell), lambda: self._closed(port))
        # The guest may have sent before there was a channel: the driver is told to look, as in Xen.
        ring(bell)

    def unbind(self, port: int) -> None:
        """:raises Refused: it is not bound by this link."""
        if port not in self.ports:
            raise Refused(errno.EINVAL, f"port {port} is not bound")
        bell, peer_port = self.ports.pop(port)
        self._target.router.leave(port)
        channel = self._target.events.status(port)
        if channel.state is ChannelState.INTERDOMAIN and (channel.peer, channel.peer_port) == (HOST_DOMID, peer_port):
            self._target.events.peer_closed(port)
        os.close(bell)

    def _closed(self, port: int) -> None:
        bell, _ = self.ports.pop(port)
        os.close(bell)
        self._port_closed(port)

    def rung(self, port: int) -> None:
        """The driver sends an event."""
        if port in self.ports:
            self._target.events.pend(port)

    # -- the end

    def release(self) -> None:
        """Give back all that the driver cannot reach. Harmless when repeated."""
        for port in list(self.ports):
            self.unbind(port)
        for slot in list(self._held):
            self._give_back(slot)

    def driver_is_gone(self) -> None:
        """Give back the rest."""
        self.release()
        while self._held:
            self._unpin(self._held.popitem()[1])
