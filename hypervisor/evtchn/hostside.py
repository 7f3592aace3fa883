"""The other ends of a domain's channels: the host process and driver processes as domain 0, and other domains."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from hypervisor.abi import errno
from hypervisor.errors import XenError
from hypervisor.evtchn.core import ChannelState, EventChannels, Router

FIRST_DRIVER_PORT = 1 << 16
"""Ends of driver processes have numbers of their own, beyond those of the host process's."""


@contextlib.contextmanager
def without_drivers(events: EventChannels) -> Iterator[None]:
    """Meanwhile all is as if driver processes had closed their ends. Nobody may use channels then."""
    bound = [
        (channel, channel.peer_port)
        for channel in events.channels
        if channel.state is ChannelState.INTERDOMAIN and not channel.peer and channel.peer_port >= FIRST_DRIVER_PORT
    ]
    for channel, _ in bound:
        channel.state, channel.peer_port = ChannelState.UNBOUND, 0
    try:
        yield
    finally:
        for channel, peer_port in bound:
            channel.state, channel.peer_port = ChannelState.INTERDOMAIN, peer_port


class Nobody:
    """The neighbours of a domain that has none."""

    def send(self, _peer: int, _peer_port: int, _local_port: int) -> None:
        """Dropped."""

    def bind(self, peer: int, _peer_port: int, _local_port: int) -> None:
        raise XenError(errno.ESRCH, f"there is no domain {peer}")

    def closed(self, _peer: int, _peer_port: int, _local_port: int) -> None:
        """There was none."""

    def exists(self, _domid: int) -> bool:
        return False


class HostRouter:
    """A port that was joined (`join`) leads to a driver process, any other one of domain 0 to the host process.

    :param notify_host: told the guest's port.
    :ivar neighbours: the other domains.
    """

    def __init__(self, notify_host: Callable[[int], None]) -> None:
        self._notify_host = notify_host
        self.neighbours: Router = Nobody()
        self._joined: dict[int, tuple[Callable[[], None], Callable[[], None]]] = {}

    def join(self, port: int, notified: Callable[[], None], closed: Callable[[], None]) -> None:
        """The guest's `port` is bound to a driver process.

        :param closed: the guest closed the port; `leave` is not to be called any more.
        """
        self._joined[port] = (notified, closed)

    def leave(self, port: int) -> None:
        self._joined.pop(port, None)

    def send(self, peer: int, peer_port: int, local_port: int) -> None:
        if peer:
            self.neighbours.send(peer, peer_port, local_port)
            return
        joined = self._joined.get(local_port)
        if joined is None:
            self._notify_host(local_port)
        else:
            joined[0]()

    def bind(self, peer: int, peer_port: int, local_port: int) -> None:
        if not peer:
            raise XenError(errno.EINVAL, "domain 0 waits for nobody")
        self.neighbours.bind(peer, peer_port, local_port)

    def closed(self, peer: int, peer_port: int, local_port: int) -> None:
        if peer:
            self.neighbours.closed(peer, peer_port, local_port)
            return
        joined = self._joined.pop(local_port, None)
        if joined is not None:
            joined[1]()

    def exists(self, domid: int) -> bool:
        return not domid or self.neighbours.exists(domid)
