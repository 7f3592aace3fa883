"""A guest without a machine, and a `GuestLink` to it: for unit tests of drivers.

The test plays the front end with `FakeGuest`: it fills frames, grants them, opens ports, notifies, and looks at what
was notified. A driver gets `FakeGuest.link`, and after it was "killed" (`FakeLink.close`) the next driver another one.
"""

from __future__ import annotations

import dataclasses
import os
import socket
from collections.abc import Sequence

from hypervisor import abi
from hypervisor.devices.driver import Copy, EventPort, LinkClosed, LinkError, Page

PAGE = 4096


@dataclasses.dataclass
class FakeGrant:
    """:ivar mapped: mappings there are; `copied` the copies there were."""

    frame: int
    readonly: bool
    mapped: int = 0
    copied: int = 0


class FakeGuest:
    """:param frames: of its memory. :param buffer_bytes: size of each link's `buffer`."""

    def __init__(self, domid: int = 7, frames: int = 2048, buffer_bytes: int = 1 << 20) -> None:
        self.domid = domid
        self.memory = bytearray(frames * PAGE)
        self.buffer_bytes = buffer_bytes
        self.grants: dict[int, FakeGrant] = {}
        self.links: list[FakeLink] = []
        self.ports: dict[int, FakePort | None] = {}
        self.notified: dict[int, int] = {}
        self._frames = iter(range(1, frames))
        self._refs = iter(range(8, 1 << 20))
        self._ports = iter(range(3, 4096))

    def link(self) -> FakeLink:
        """For one driver process."""
        self.links.append(FakeLink(self))
        return self.links[-1]

    # -- memory and grants

    def page(self, frame: int) -> memoryview:
        return memoryview(self.memory)[frame * PAGE : (frame + 1) * PAGE]

    def new_frame(self, data: bytes = b"") -> int:
        """A frame that nobody uses yet, filled with `data` from its start."""
        frame = next(self._frames)
        self.page(frame)[: len(data)] = data
        return frame

    def grant(self, frame: int | None = None, *, readonly: bool = False) -> int:
        """Grant a frame (None: a new one) to domain 0; the reference."""
        ref = next(self._refs)
        self.grants[ref] = FakeGrant(self.new_frame() if frame is None else frame, readonly)
        return ref

    def granted(self, ref: int) -> memoryview:
        """The memory behind a grant."""
        return self.page(self.grants[ref].frame)

    def revoke(self, ref: int) -> bool:
        """End a grant; False: the driver still maps it (gnttab_end_foreign_access)."""
        if self.grants[ref].mapped:
            return False
        del self.grants[ref]
        return True

    @property
    def mapped(self) -> int:
        """Mappings that drivers hold."""
        return sum(grant.mapped for grant in self.grants.values())

    # -- event channels

    def open_port(self) -> int:
        """A port that waits for domain 0 (EVTCHNOP_alloc_unbound)."""
        port = next(self._ports)
        self.ports[port] = None
        self.notified[port] = 0
        return port

    def close_port(self, port: int) -> None:
        self.ports.pop(port)

    def notify(self, port: int) -> None:
        """The guest sends an event; lost when nobody is bound, as in Xen."""
        event = self.ports[port]
        if event is not None:
            event.ring()

    def notifications(self, port: int) -> int:
        """How often the driver has notified since this was last asked."""
        count, self.notified[port] = self.notified[port], 0
        return count

    def die(self) -> None:
        """The domain ends."""
        for link in self.links:
            link.close()


class FakePage:
    def __init__(self, ref: int, grant: FakeGrant, view: memoryview) -> None:
        self.ref = ref
        self.view = view
        self.grant = grant


class FakePort:
    def __init__(self, guest: FakeGuest, port: int) -> None:
        self.guest = guest
        self.port = port
        self._fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def fileno(self) -> int:
        return self._fd

    def ring(self) -> None:
        os.eventfd_write(self._fd, 1)

    def answer(self) -> bool:
        try:
            return os.eventfd_read(self._fd) > 0
        except BlockingIOError:
            return False

    def notify(self) -> None:
        if self.guest.ports.get(self.port) is self:
            self.guest.notified[self.port] += 1

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class FakeLink:
    """A `hypervisor.devices.driver.GuestLink`. :ivar calls: operations that cost the real one a round trip."""

    def __init__(self, guest: FakeGuest) -> None:
        self.guest = guest
        self.calls: list[str] = []
        self.events: list[FakePort] = []
        self.pages: list[FakePage] = []
        self._buffer = memoryview(bytearray(guest.buffer_bytes))
        self._near, self._far = socket.socketpair()
        self._open = True

    @property
    def domid(self) -> int:
        return self.guest.domid

    @property
    def buffer(self) -> memoryview:
        return self._buffer

    def fileno(self) -> int:
        return self._near.fileno()

    def alive(self) -> bool:
        return self._open

    def close(self) -> None:
        """The driver process, or the guest, has ended."""
        if self._open:
            self._open = False
            for event in self.events:
                if self.guest.ports.get(event.port) is event:
                    self.guest.ports[event.port] = None
            for page in self.pages:
                page.grant.mapped -= 1
            self.pages.clear()
            self._far.close()

    def _call(self, what: str) -> None:
        if not self._open:
            raise LinkClosed("the guest has ended")
        self.calls.append(what)

    def _refusal(self, ref: int, *, readonly: bool) -> int:
        grant = self.guest.grants.get(ref)
        if grant is None:
            return abi.GNTST_bad_gntref
        return abi.GNTST_general_error if grant.readonly and not readonly else abi.GNTST_okay

    def map(self, refs: Sequence[int], *, readonly: bool = False) -> list[Page]:
        self._call("map")
        for ref in refs:
            if status := self._refusal(ref, readonly=readonly):
                raise LinkError(f"grant {ref} cannot be mapped", status)
        pages: list[Page] = []
        for ref in refs:
            grant = self.guest.grants[ref]
            grant.mapped += 1
            view = self.guest.page(grant.frame)
            page = FakePage(ref, grant, view.toreadonly() if readonly else view)
            self.pages.append(page)
            pages.append(page)
        return pages

    def unmap(self, pages: Sequence[Page]) -> None:
        """The views are released: to use one afterwards is a ValueError here, a SIGSEGV in a driver process."""
        self._call("unmap")
        for page in pages:
            assert isinstance(page, FakePage)
            self.pages.remove(page)
            page.grant.mapped -= 1
            page.view.release()

    def copy(self, copies: Sequence[Copy]) -> list[int]:
        self._call("copy")
        return [self._copy_one(one) for one in copies]

    def _copy_one(self, one: Copy) -> int:
        assert 0 <= one.at <= one.at + one.length <= len(self._buffer), "outside of the buffer: the driver's bug"
        if status := self._refusal(one.ref, readonly=not one.to_guest):
            return status
        if one.offset < 0 or one.length < 0 or one.offset + one.length > PAGE:
            return abi.GNTST_bad_copy_arg
        grant = self.guest.grants[one.ref]
        grant.copied += 1
        guest = self.guest.page(grant.frame)[one.offset : one.offset + one.length]
        ours = self._buffer[one.at : one.at + one.length]
        if one.to_guest:
            guest[:] = ours
        else:
            ours[:] = guest
        return abi.GNTST_okay

    def bind(self, port: int) -> EventPort:
        self._call("bind")
        if self.guest.ports.get(port, self) is not None:
            raise LinkError(f"port {port} does not wait for domain 0")
        event = FakePort(self.guest, port)
        self.guest.ports[port] = event
        self.events.append(event)
        event.ring()  # what was sent before is lost: a driver looks at the ring as soon as it is bound
        return event

    def unbind(self, event: EventPort) -> None:
        self._call("unbind")
        assert isinstance(event, FakePort)
        self.events.remove(event)
        if self.guest.ports.get(event.port) is event:
            self.guest.ports[event.port] = None
        event.close()
