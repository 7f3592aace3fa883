"""Guest links in the domain process: driver processes reach the guest's grants and event channels.

The channel thread takes requests from the sockets (`hypervisor.devices.link_wire`) and rings the guest's ports; the run
loop's thread executes requests, each as one `Machine.post`, and answers. What a driver says is hostile: it can
reach frames that are granted to domain 0 and ports that wait for domain 0, and end its own link.

Owners: `GuestLinks` and the descriptors belong to the channel thread; pins, ports and `LinkState` to the run loop's.
"""

from __future__ import annotations

import fcntl
import itertools
import logging
import os
import select
import socket
import threading
from typing import Any

from hypervisor.abi import errno
from hypervisor.devices import link_wire as wire
from hypervisor.devices.link_window import BYTES, SLOTS, map_memory, view_of
from hypervisor.errors import HostFailure, WrongState
from hypervisor.host.channel import close_all
from hypervisor.host.guest_link_guard import Guard
from hypervisor.host.guest_link_state import LinkState, LinkTarget, Refused
from hypervisor.host.handles import answer
from hypervisor.host.poller import Poller

LOG = logging.getLogger(__name__)

MAX_LINKS = 16
MAX_BUFFER = 64 << 20
_PROT_READ_WRITE, _MAP_SHARED = 3, 1
_F_GET_SEALS = 1034


class _Link:
    """One driver process. :ivar bells: eventfds that it rings, by port of the guest."""

    def __init__(self, number: int, sock: int) -> None:
        self.number = number
        # All told, because a sandboxed process may not ask the kernel.
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET, 0, fileno=sock)
        self.socket.setblocking(False)
        self.lock = threading.Lock()  # between an answer and the end of the socket
        self.busy = False
        self.open = True
        self.bells: dict[int, int] = {}
        self.state: LinkState

    def send(self, data: bytes, fds: list[int]) -> bool:
        """False: it does not read, or is gone."""
        with self.lock:
            try:
                if fds:
                    socket.send_fds(self.socket, [data], fds)
                else:
                    self.socket.send(data)
            except OSError:
                return False
        return True

    def is_gone(self) -> bool:
        with self.lock:
            if not self.open:
                return True
            poll = select.poll()
            poll.register(self.socket.fileno(), select.POLLIN)
            return any(events & (select.POLLHUP | select.POLLERR) for _, events in poll.poll(0))

    def close(self) -> None:
        with self.lock:
            self.open = False
            self.socket.close()


class GuestLinks:
    """The links of one domain. Every method but the constructor is for the channel thread."""

    def __init__(self, target: LinkTarget, poller: Poller) -> None:
        self._target = target
        self._poller = poller
        self._numbers = itertools.count(1)
        self._links: dict[int, _Link] = {}
        self._mapped: set[_Link] = set()  # ended, but their drivers may have mappings still
        self._ended = False

    def __len__(self) -> int:
        """Links there are, with those of drivers that have left nothing but mappings."""
        return len(self._links) + len(self._mapped)

    # -- from the host process

    def open(self, fds: list[int]) -> int:
        """Op ``link``; its number. The descriptors are owned from here on.

        :raises WrongState: the guest has ended, or has too many links. :raises HostFailure: not what belongs to a link.
        """
        try:
            if len(fds) != 2:
                raise HostFailure(f"op link with {len(fds)} descriptors instead of 2: destroy the domain")
            if self._ended:
                raise WrongState("the guest has ended: destroy or reset the domain")
            if len(self) >= MAX_LINKS:
                raise WrongState(f"the domain has {MAX_LINKS} links to drivers: end one first")
            buffer = _map_buffer(fds[1])
        except BaseException:
            close_all(fds)
            raise
        os.close(fds[1])
        link = _Link(next(self._numbers), fds[0])
        link.state = LinkState(self._target, buffer, lambda port: self._poller.call(lambda: self._deafen(link, port)))
        self._links[link.number] = link
        self._poller.add(link.socket.fileno(), lambda: self._readable(link))
        return link.number

    def close(self, number: int) -> None:
        """Op ``unlink``; 0 ends all. Posts made later see ports and pins free."""
        for link in list(self._links.values()):
            if number in (0, link.number):
                self._end(link, "unlinked by the host")

    def guest_ended(self) -> None:
        """The run loop is over: nothing can be done for drivers any more."""
        self._ended = True
        self.close(0)

    # -- requests

    def _readable(self, link: _Link) -> None:
        try:
            data, fds = wire.receive(link.socket)
        except BlockingIOError:
            return
        except (OSError, wire.BadForm) as exc:
            self._end(link, str(exc))
            return
        try:
            if not data:
                raise wire.BadForm("its driver is gone")
            if link.busy:
                raise wire.BadForm("a second request before the answer")
            op, bits, number, items = wire.parse_request(data)
            if link.state.welcome != (op != wire.HELLO) or len(fds) != (op == wire.HELLO and bits & wire.GUARDED):
                raise wire.BadForm(f"request {op} with {len(fds)} descriptors out of place")
            if op == wire.HELLO:
                self._greet(link, fds, *items[0])
        except wire.BadForm as exc:
            close_all(fds)
            self._end(link, str(exc))
            return
        link.busy = True
        if op == wire.HELLO:
            # It needs nothing of the machine, which may be waiting for its guest to arrive from another host.
            self._execute(link, op, bits, number, items)
        else:
            self._target.post(lambda: self._execute(link, op, bits, number, items))

    def _greet(
        self, link: _Link, fds: list[int], version: int, memory: int, memory_ro: int, slots: int, window: int
    ) -> None:
        if version != wire.VERSION or slots > SLOTS or window % BYTES or min(memory, memory_ro) < 0:
            raise wire.BadForm(f"hello of version {version} with {slots} slots at {window:#x}")
        if fds:
            link.state.guard = guard = Guard(fds[0], memory, memory_ro, window)
            self._poller.add(guard.listener, lambda: self._guard(link, guard))

    def _guard(self, link: _Link, guard: Guard) -> None:
        """A driver maps or unmaps, or is gone."""
        try:
            guard.answer()
            over = guard.is_over()
        except OSError as exc:
            LOG.warning("link %d: its listener: %s", link.number, exc)
            over = True
        if over:
            self._poller.remove(guard.listener)
            guard.close()
            self._end(link, "its driver is gone")
            self._mapped.discard(link)
            self._target.post(link.state.driver_is_gone)

    def _execute(self, link: _Link, op: int, flags: int, number: int, items: list[Any]) -> None:
        """In the run loop's thread, but for HELLO."""
        if not link.open:
            return
        status, results, given = 0, [], []
        try:
            if op == wire.BIND:
                given = self._bind(link, items[0][0])
            elif op == wire.UNBIND:
                self._unbind(link, items[0][0])
            else:
                results = link.state.execute(op, flags, items)
        except Refused as exc:
            LOG.debug("link %d: request %d: %s", link.number, op, exc)
            status = exc.status
        except wire.BadForm as exc:
            why = str(exc)
            self._poller.call(lambda: self._end(link, why))
            return
        link.busy = False
        if not link.send(wire.answer(op, number, status, results), given):
            self._poller.call(lambda: self._end(link, "it does not take its answers"))

    # -- event channels, in the run loop's thread

    def _bind(self, link: _Link, port: int) -> list[int]:
        """Two eventfds: to the driver, which `LinkState` keeps, and to the guest, which the channel thread does."""
        self._end_dead_owner(port)
        to_driver = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        try:
            to_guest = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        except OSError:
            os.close(to_driver)
            raise Refused(errno.ENOSPC, "no descriptor is left") from None
        try:
            link.state.bind(port, to_driver)
        except BaseException:
            close_all([to_driver, to_guest])
            raise
        self._poller.call(lambda: self._listen(link, port, to_guest))
        return [to_driver, to_guest]

    def _end_dead_owner(self, port: int) -> None:
        """The driver before may be dead without the channel thread knowing yet."""
        for other in list(self._links.values()):
            if port in other.state.ports and other.is_gone():
                other.state.release()

    def _unbind(self, link: _Link, port: int) -> None:
        link.state.unbind(port)
        self._poller.call(lambda: self._deafen(link, port))

    # -- doorbells

    def _listen(self, link: _Link, port: int, bell: int) -> None:
        if not link.open:
            os.close(bell)
            return
        self._deafen(link, port)
        link.bells[port] = bell
        self._poller.add(bell, lambda: self._rung(link, bell, port))

    def _rung(self, link: _Link, bell: int, port: int) -> None:
        if answer(bell):
            self._target.post(lambda: link.state.rung(port))

    def _deafen(self, link: _Link, port: int) -> None:
        bell = link.bells.pop(port, None)
        if bell is not None:
            self._poller.remove(bell)
            os.close(bell)

    # -- the end

    def _end(self, link: _Link, why: str) -> None:
        if not link.open:
            return
        LOG.info("link %d ends: %s", link.number, why)
        del self._links[link.number]
        self._poller.remove(link.socket.fileno())
        for port in list(link.bells):
            self._deafen(link, port)
        # Closed here, so that the driver sees the end even if the run loop is over.
        link.close()
        if link.state.guard is None:
            self._target.post(link.state.driver_is_gone)
        else:
            self._mapped.add(link)  # until nobody is left under its filter
            self._target.post(link.state.release)


def _map_buffer(fd: int) -> memoryview:
    """:raises HostFailure: it is none, or could be cut off."""
    try:
        size = os.lseek(fd, 0, os.SEEK_END)
        seals = fcntl.fcntl(fd, _F_GET_SEALS)
        if not 0 < size <= MAX_BUFFER or not seals & fcntl.F_SEAL_SHRINK:
            raise HostFailure(f"a link's buffer of {size} bytes with seals {seals:#x}: destroy the domain")
        return view_of(map_memory(size, _PROT_READ_WRITE, _MAP_SHARED, fd), size)
    except OSError as exc:
        raise HostFailure(f"a link's buffer cannot be mapped ({exc}): destroy the domain") from exc
