"""Event channels: the port table and the operations on it (xen/common/event_channel.c).

Nothing here decodes hypercall arguments. How a port is marked pending is the
business of the ABI object (`twolevel`, later FIFO); what lies at the other end
of an interdomain channel is the business of a `Router`.
"""

from __future__ import annotations

import dataclasses
import enum
from typing import Any, Protocol

from hypervisor import abi
from hypervisor.abi import errno
from hypervisor.errors import XenError
from hypervisor.types import DomId, Port

DOMID_SELF = 0x7FF0
MAX_VCPUS = 32

# VIRQs bound per vCPU; the others are bound once per domain, on vCPU 0.
VCPU_VIRQS = frozenset((abi.VIRQ_TIMER, abi.VIRQ_DEBUG, abi.VIRQ_XENOPROF, abi.VIRQ_XENPMU))
NR_VIRQS = 24


class ChannelState(enum.IntEnum):
    FREE = abi.EVTCHNSTAT_closed
    UNBOUND = abi.EVTCHNSTAT_unbound
    INTERDOMAIN = abi.EVTCHNSTAT_interdomain
    PIRQ = abi.EVTCHNSTAT_pirq
    VIRQ = abi.EVTCHNSTAT_virq
    IPI = abi.EVTCHNSTAT_ipi


@dataclasses.dataclass(slots=True)
class Channel:
    """One port.

    :ivar peer: domain at the other end (unbound: the only one that may bind), 0 for the host side.
    :ivar peer_port: its port when bound.
    """

    state: ChannelState = ChannelState.FREE
    vcpu: int = 0
    peer: int = 0
    peer_port: int = 0
    virq: int = 0


class Abi(Protocol):
    """How events reach the guest's shared memory."""

    max_ports: int

    def set_pending(self, port: int, vcpu: int) -> None: ...
    def unmask(self, port: int, vcpu: int) -> None: ...
    def clear(self, port: int) -> None: ...
    def is_pending(self, port: int) -> bool: ...


class Router(Protocol):
    """What lies beyond this domain."""

    def send(self, peer: int, peer_port: int, local_port: int) -> None:
        """Signal the other end."""

    def bind(self, peer: int, peer_port: int, local_port: int) -> None:
        """Join a port that `peer` left unbound for us. :raises XenError: EINVAL, ESRCH."""

    def closed(self, peer: int, peer_port: int, local_port: int) -> None: ...


class EventChannels:
    """One domain's ports. Port 0 is never used."""

    def __init__(self, domid: DomId, events: Abi, router: Router) -> None:
        self.domid = domid
        self.events = events
        self.router = router
        self.channels: list[Channel] = [Channel(ChannelState.FREE)]
        self.virqs: dict[tuple[int, int], int] = {}

    # -- lookup

    def _channel(self, port: int) -> Channel:
        if not 0 < port < len(self.channels) or self.channels[port].state is ChannelState.FREE:
            raise XenError(errno.EINVAL, f"port {port} is not open")
        return self.channels[port]

    def _allocate(self) -> Port:
        for port in range(1, len(self.channels)):
            if self.channels[port].state is ChannelState.FREE:
                return Port(port)
        if len(self.channels) >= self.events.max_ports:
            raise XenError(errno.ENOSPC, "all event channel ports are in use")
        self.channels.append(Channel())
        return Port(len(self.channels) - 1)

    def _open(self, channel: Channel) -> Port:
        port = self._allocate()
        self.channels[port] = channel
        self.events.clear(port)
        return port

    def _resolve(self, domid: int) -> int:
        return self.domid if domid == DOMID_SELF else domid

    # -- operations

    def alloc_unbound(self, dom: int, remote: int) -> Port:
        if self._resolve(dom) != self.domid:
            raise XenError(errno.EPERM, "ports are allocated in one's own domain")
        return self._open(Channel(ChannelState.UNBOUND, peer=self._resolve(remote)))

    def open_host(self, port: int) -> None:
        """For the toolstack: make `port` an interdomain channel to the host's backend before the guest runs."""
        while len(self.channels) <= port:
            self.channels.append(Channel())
        self.channels[port] = Channel(ChannelState.INTERDOMAIN, peer=0, peer_port=port)

    def bind_interdomain(self, remote: int, remote_port: int) -> Port:
        remote = self._resolve(remote)
        if remote != self.domid:
            port = self._open(Channel(ChannelState.INTERDOMAIN, peer=remote, peer_port=remote_port))
            try:
                self.router.bind(remote, remote_port, port)
            except XenError:
                self.channels[port] = Channel()
                raise
            return port
        far = self._channel(remote_port)
        if far.state is not ChannelState.UNBOUND or far.peer != self.domid:
            raise XenError(errno.EINVAL, f"port {remote_port} does not wait for this domain")
        port = self._open(Channel(ChannelState.INTERDOMAIN, peer=self.domid, peer_port=remote_port))
        far.state, far.peer_port = ChannelState.INTERDOMAIN, port
        # The far end may have missed a notification: it is told to look (evtchn_bind_interdomain does the same).
        self.events.set_pending(port, 0)
        return port

    def bind_virq(self, virq: int, vcpu: int, max_vcpus: int) -> Port:
        if not 0 <= virq < NR_VIRQS:
            raise XenError(errno.EINVAL, f"no VIRQ {virq}")
        if virq not in VCPU_VIRQS and vcpu != 0:
            raise XenError(errno.EINVAL, f"VIRQ {virq} is bound on vCPU 0")
        if not 0 <= vcpu < max_vcpus:
            raise XenError(errno.ENOENT, f"no vCPU {vcpu}")
        if (vcpu, virq) in self.virqs:
            raise XenError(errno.EEXIST, f"VIRQ {virq} is bound on vCPU {vcpu}")
        port = self._open(Channel(ChannelState.VIRQ, vcpu=vcpu, virq=virq))
        self.virqs[vcpu, virq] = port
        return port

    def bind_ipi(self, vcpu: int, max_vcpus: int) -> Port:
        if not 0 <= vcpu < max_vcpus:
            raise XenError(errno.ENOENT, f"no vCPU {vcpu}")
        return self._open(Channel(ChannelState.IPI, vcpu=vcpu))

    def close(self, port: int) -> None:
        channel = self._channel(port)
        if channel.state is ChannelState.VIRQ:
            self.virqs.pop((channel.vcpu, channel.virq), None)
        elif channel.state is ChannelState.INTERDOMAIN:
            if channel.peer == self.domid:
                far = self.channels[channel.peer_port]
                far.state, far.peer_port = ChannelState.UNBOUND, 0
            else:
                self.router.closed(channel.peer, channel.peer_port, port)
        self.channels[port] = Channel()
        self.events.clear(port)

    def send(self, port: int) -> None:
        channel = self._channel(port)
        if channel.state is ChannelState.INTERDOMAIN:
            if channel.peer == self.domid:
                self.pend(channel.peer_port)
            else:
                self.router.send(channel.peer, channel.peer_port, port)
        elif channel.state is ChannelState.IPI:
            self.pend(port)
        elif channel.state is not ChannelState.UNBOUND:
            raise XenError(errno.EINVAL, f"port {port} cannot be sent to")

    def status(self, port: int) -> Channel:
        """The channel itself; a port in range that is closed is a FREE one, as port 0 always is."""
        if not 0 <= port < self.events.max_ports:
            raise XenError(errno.EINVAL, f"no port {port}")
        return self.channels[port] if port < len(self.channels) else Channel()

    def bind_vcpu(self, port: int, vcpu: int, max_vcpus: int) -> None:
        if not 0 <= vcpu < max_vcpus:
            raise XenError(errno.ENOENT, f"no vCPU {vcpu}")
        channel = self._channel(port)
        if channel.state is ChannelState.VIRQ and channel.virq in VCPU_VIRQS:
            raise XenError(errno.EINVAL, "a per-vCPU VIRQ stays where it is")
        if channel.state is ChannelState.IPI:
            raise XenError(errno.EINVAL, "an IPI stays where it is")
        channel.vcpu = vcpu

    def unmask(self, port: int) -> None:
        """No error, and no effect, when the port is in range and closed."""
        channel = self.status(port)
        if channel.state is not ChannelState.FREE:
            self.events.unmask(port, channel.vcpu)

    def reset(self) -> None:
        for port in range(1, len(self.channels)):
            if self.channels[port].state is not ChannelState.FREE:
                self.close(port)

    # -- from the hypervisor

    def pend(self, port: int) -> None:
        """Mark a local port pending, if it is open."""
        if 0 < port < len(self.channels):
            channel = self.channels[port]
            if channel.state is not ChannelState.FREE:
                self.events.set_pending(port, channel.vcpu)

    def raise_virq(self, virq: int, vcpu: int = 0) -> None:
        port = self.virqs.get((vcpu, virq))
        if port is not None:
            self.events.set_pending(port, vcpu)

    # -- save and restore

    def save(self) -> dict[str, Any]:
        return {
            "channels": [[int(c.state), c.vcpu, c.peer, c.peer_port, c.virq] for c in self.channels],
        }

    def restore(self, data: dict[str, Any]) -> None:
        self.channels = [Channel(ChannelState(s), v, p, pp, q) for s, v, p, pp, q in data["channels"]]
        self.virqs = {(c.vcpu, c.virq): port for port, c in enumerate(self.channels) if c.state is ChannelState.VIRQ}
