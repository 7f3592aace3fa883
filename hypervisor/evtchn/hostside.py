"""The other end of a domain's channels as long as all of them lead to the host process."""

from __future__ import annotations

from collections.abc import Callable

from hypervisor.abi import errno
from hypervisor.errors import XenError


class HostRouter:
    """Everything beyond this domain is the host side, for now: console and xenstore."""

    def __init__(self, notify_host: Callable[[int], None]) -> None:
        self._notify_host = notify_host

    def send(self, peer: int, _peer_port: int, local_port: int) -> None:
        if peer == 0:
            self._notify_host(local_port)

    def bind(self, peer: int, _peer_port: int, _local_port: int) -> None:
        raise XenError(errno.ESRCH if peer else errno.EINVAL, f"domain {peer} waits for nobody")

    def closed(self, _peer: int, _peer_port: int, _local_port: int) -> None:
        return
