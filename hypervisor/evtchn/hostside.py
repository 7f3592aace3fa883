"""The other ends of a domain's channels that are domain 0's: the host process, and driver processes."""

from __future__ import annotations

from collections.abc import Callable

from hypervisor.abi import errno
from hypervisor.errors import XenError


class HostRouter:
    """A port that was joined (`join`) leads to a driver process, any other one of domain 0 to the host process.

    :param notify_host: told the guest's port.
    """

    def __init__(self, notify_host: Callable[[int], None]) -> None:
        self._notify_host = notify_host
        self._joined: dict[int, tuple[Callable[[], None], Callable[[], None]]] = {}

    def join(self, port: int, notified: Callable[[], None], closed: Callable[[], None]) -> None:
        """The guest's `port` is bound to a driver process.

        :param closed: the guest closed the port; `leave` is not to be called any more.
        """
        self._joined[port] = (notified, closed)

    def leave(self, port: int) -> None:
        self._joined.pop(port, None)

    def send(self, peer: int, _peer_port: int, local_port: int) -> None:
        if peer == 0:
            joined = self._joined.get(local_port)
            if joined is None:
                self._notify_host(local_port)
            else:
                joined[0]()

    def bind(self, peer: int, _peer_port: int, _local_port: int) -> None:
        raise XenError(errno.ESRCH if peer else errno.EINVAL, f"domain {peer} waits for nobody")

    def closed(self, peer: int, _peer_port: int, local_port: int) -> None:
        joined = self._joined.pop(local_port, None) if peer == 0 else None
        if joined is not None:
            joined[1]()
