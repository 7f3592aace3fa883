"""A guest link in the driver process (`hypervisor.devices.driver.GuestLink` over a socket).

How a link is made::

    host process      ends = hypervisor.host.guest_link_ends.LinkEnds.create(handles.memory)
    host → domain     {"op": "link"} with the descriptors `ends.for_domain` (socket, buffer)
                      → {"result": {"link": n}}, n > 0; or an error: `WrongState` the guest has ended or has
                      too many links
    host → driver     the descriptors `ends.for_driver` (socket, buffer, memory, read-only memory), at its start;
                      then the host closes all of them (`ends.close`)
    driver            link = ProcessLink(*fds): says HELLO, waits for the answer
    host → domain     {"op": "unlink", "link": n} (0: all), after the driver is gone: its ports wait for domain 0 again,
                      its pins are given back. The end of the driver process does the same.

Made in the same order `unlink` or death, `link`, `bind`, the next driver gets the port of the one before. Links live
on without a host process; the next one may end them all.

In a real driver process `hypervisor.host.guarded_link.connect` makes the `ProcessLink`, with the filter that guards the
mappings.
Eventfds are made by the domain process when a port is bound; nothing needs to be known before.
"""

from __future__ import annotations

import errno
import logging
import os
import select
import socket
from collections.abc import Sequence

from hypervisor.devices import link_wire as wire
from hypervisor.devices.driver import Copy, EventPort, LinkClosed, LinkError, Page
from hypervisor.devices.link_window import PAGE, Slots, Window, map_memory, unmap_memory, view_of

LOG = logging.getLogger(__name__)

_PROT_READ_WRITE = 3
_MAP_SHARED = 1


class MappedPage:
    """A `hypervisor.devices.driver.Page`."""

    __slots__ = ("ref", "slot", "view")

    def __init__(self, ref: int, slot: int, view: memoryview) -> None:
        self.ref = ref
        self.slot = slot
        self.view = view


class Doorbells:
    """A `hypervisor.devices.driver.EventPort`: two eventfds."""

    __slots__ = ("_from_guest", "_to_guest", "port")

    def __init__(self, port: int, from_guest: int, to_guest: int) -> None:
        self.port = port
        self._from_guest = from_guest
        self._to_guest = to_guest

    def fileno(self) -> int:
        return self._from_guest

    def answer(self) -> bool:
        try:
            return os.eventfd_read(self._from_guest) > 0
        except BlockingIOError:
            return False

    def notify(self) -> None:
        try:
            os.eventfd_write(self._to_guest, 1)
        except BlockingIOError:
            return  # the counter is full: it rings already

    def close(self) -> None:
        if self._from_guest >= 0:
            os.close(self._from_guest)
            os.close(self._to_guest)
            self._from_guest = self._to_guest = -1


class ProcessLink:
    """:param sock: SEQPACKET socket to the domain process. All descriptors belong to the link from here on.

    :param buffer: sealed memfd shared with the domain process. :param memory: the guest's memfd; `memory_ro` the
        same, opened for reading only.
    :param window: made before the process was confined; None: one is made.
    :param listener: of the filter that guards the window, sent to the domain process and closed; -1: none does.
    :raises LinkClosed: the guest has ended.
    """

    def __init__(
        self,
        sock: int,
        buffer: int,
        memory: int,
        memory_ro: int,
        *,
        window: Window | None = None,
        listener: int = -1,
    ) -> None:
        self._socket = socket.socket(fileno=sock)
        self._memory, self._memory_ro = memory, memory_ro
        self._window = window or Window()
        self._slots = Slots()
        self._number = 0
        self._open = True
        self._ports: list[Doorbells] = []
        size = os.lseek(buffer, 0, os.SEEK_END)
        self._buffer_at = map_memory(size, _PROT_READ_WRITE, _MAP_SHARED, buffer)
        self._buffer = view_of(self._buffer_at, size)
        os.close(buffer)
        hello = (wire.VERSION, memory, memory_ro, len(self._slots), self._window.address)
        guarded = wire.GUARDED if listener >= 0 else 0
        try:
            items, _ = self._call(wire.HELLO, [hello], guarded, fds=[listener] if guarded else [])
        finally:
            if listener >= 0:
                os.close(listener)
        self._domid, self._pages, told = items[0]
        if told != size:
            raise self._ended(f"the domain process sees a buffer of {told} bytes, not {size}")

    @property
    def domid(self) -> int:
        return self._domid

    @property
    def buffer(self) -> memoryview:
        return self._buffer

    def fileno(self) -> int:
        return self._socket.fileno()

    def alive(self) -> bool:
        if self._open:
            # Nothing comes unasked but the end.
            poll = select.poll()
            poll.register(self._socket.fileno(), select.POLLIN)
            if poll.poll(0):
                self._open = False
        return self._open

    def close(self) -> None:
        """Give everything back; for tests, and for whoever serves more than one guest in its life."""
        self._open = False
        self._socket.close()
        for event in self._ports:
            event.close()
        self._ports.clear()
        self._window.close()
        unmap_memory(self._buffer_at, len(self._buffer))
        self._buffer = memoryview(b"")
        os.close(self._memory)
        os.close(self._memory_ro)

    # -- grants

    def map(self, refs: Sequence[int], *, readonly: bool = False) -> list[Page]:
        pages: list[MappedPage] = []
        try:
            for start in range(0, len(refs), wire.MAX_ITEMS):
                pages += self._map(refs[start : start + wire.MAX_ITEMS], readonly=readonly)
        except LinkClosed:
            raise
        except LinkError:
            self.unmap(pages)
            raise
        return list(pages)

    def _map(self, refs: Sequence[int], *, readonly: bool) -> list[MappedPage]:
        try:
            slots = self._slots.take(len(refs))
        except MemoryError as exc:
            raise LinkError(str(exc)) from exc
        try:
            items, _ = self._call(wire.MAP, list(zip(refs, slots, strict=True)), wire.READONLY if readonly else 0)
        except LinkError:
            self._slots.give_back(slots)
            raise
        pages: list[MappedPage] = []
        fd = self._memory_ro if readonly else self._memory
        try:
            for ref, slot, (page,) in zip(refs, slots, items, strict=True):
                if page >= self._pages:
                    raise self._ended(f"page {page} of a memory of {self._pages}")
                pages.append(MappedPage(ref, slot, self._window.map(slot, fd, page, readonly=readonly)))
        except OSError as exc:
            self._unmap(slots)
            raise LinkError(f"mapping a granted frame: {exc}") from exc
        return pages

    def unmap(self, pages: Sequence[Page]) -> None:
        slots: list[int] = []
        for page in pages:
            assert isinstance(page, MappedPage)
            page.view.release()
            slots.append(page.slot)
        for start in range(0, len(slots), wire.MAX_ITEMS):
            self._unmap(slots[start : start + wire.MAX_ITEMS])

    def _unmap(self, slots: Sequence[int]) -> None:
        good = [slot for slot in slots if self._window.unmap(slot)]
        self._window.settle()
        self._call(wire.UNMAP, [(slot,) for slot in slots])
        self._slots.give_back(good)

    def copy(self, copies: Sequence[Copy]) -> list[int]:
        size = len(self._buffer)
        for one in copies:
            if not (0 <= one.at <= one.at + one.length <= size and 0 <= one.length <= PAGE and 0 <= one.offset <= PAGE):
                raise ValueError(f"{one} does not fit a page and a buffer of {size} bytes")
        statuses: list[int] = []
        for start in range(0, len(copies), wire.MAX_ITEMS):
            part = copies[start : start + wire.MAX_ITEMS]
            items = [(one.ref, one.offset, one.length, one.at, int(one.to_guest)) for one in part]
            statuses += [status for (status,) in self._call(wire.COPY, items)[0]]
        return statuses

    # -- event channels

    def bind(self, port: int) -> EventPort:
        _, fds = self._call(wire.BIND, [(port,)], expect=2)
        event = Doorbells(port, *fds)
        self._ports.append(event)
        return event

    def unbind(self, event: EventPort) -> None:
        assert isinstance(event, Doorbells)
        if event in self._ports:
            self._ports.remove(event)
            event.close()
            try:
                self._call(wire.UNBIND, [(event.port,)])
            except LinkClosed:
                raise
            except LinkError as exc:
                LOG.debug("port %d: the guest has closed it: %s", event.port, exc)

    # -- the socket

    def _call(
        self, op: int, items: Sequence[tuple[int, ...]], flags: int = 0, *, fds: Sequence[int] = (), expect: int = 0
    ) -> tuple[list[tuple[int, ...]], list[int]]:
        """The answer's items and descriptors. :raises LinkError: the status. :raises LinkClosed."""
        if not self._open:
            raise LinkClosed("the guest has ended")
        self._number = (self._number + 1) & 0xFFFF_FFFF
        data = wire.request(op, self._number, items, flags)
        try:
            # send() and not sendmsg(), which is refused to a driver: it can carry descriptors away.
            if fds:
                socket.send_fds(self._socket, [data], list(fds))
            else:
                self._socket.send(data)
            answer, got = wire.receive(self._socket)
        except (OSError, wire.BadForm) as exc:
            raise self._ended(str(exc)) from exc
        if not answer:
            raise self._ended("end of file")
        try:
            status, results = wire.parse_answer(answer, op, self._number, len(items))
            if len(got) != (0 if status else expect):
                raise wire.BadForm(f"answer to {op} with {len(got)} descriptors")
        except wire.BadForm as exc:
            for fd in got:
                os.close(fd)
            raise self._ended(str(exc)) from exc
        if status < 0:
            raise LinkError(f"the domain process refuses request {op}: GNTST {status}", status)
        if status > 0:
            raise LinkError(f"the domain process refuses request {op}: {errno.errorcode.get(status, status)}")
        return results, got

    def _ended(self, why: str) -> LinkClosed:
        if self._open:
            LOG.info("the link to the guest ends: %s", why)
        self._open = False
        return LinkClosed(f"the guest has ended ({why})")
