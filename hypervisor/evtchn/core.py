"""Event channels: the port table and the operations on it (xen/common/event_channel.c).

Nothing here decodes hypercall arguments. How a port is marked pending is the
business of the ABI object (`twolevel`, `fifo`); what lies at the other end of
an interdomain channel is the business of a `Router`.

As in Xen a port is *valid* once the table has grown beyond it, in steps of
`PORTS_PER_BUCKET`, and *open* while it is bound to something. Which of the two
an operation asks for shows in its errors.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable, Iterable
from typing import Any, Protocol

from hypervisor import abi
from hypervisor.abi import errno
from hypervisor.errors import XenError
from hypervisor.types import DomId, Port

DOMID_SELF = 0x7FF0
MAX_VCPUS = 32
PORTS_PER_BUCKET = 64
DEFAULT_MAX_PORT = 1023
"""Highest port of a guest unless its configuration says otherwise; the default of Xen's own toolstack."""

# VIRQs bound per vCPU; all others, the unused numbers and VIRQ_ARCH_* too, are bound once per domain, on vCPU 0.
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

    :ivar vcpu: the vCPU that is told of events.
    :ivar peer: domain at the other end (unbound: the only one that may bind), 0 for the host side.
    :ivar peer_port: its port when bound.
    """

    state: ChannelState = ChannelState.FREE
    vcpu: int = 0
    peer: int = 0
    peer_port: int = 0
    virq: int = 0


class Abi(Protocol):
    """How events reach the guest's shared memory. Ports given to it are below `max_ports`.

    :ivar priorities: whether ports have priorities.
    """

    name: str
    max_ports: int
    priorities: bool

    def opened(self, port: int) -> None:
        """A free port was bound."""

    def set_pending(self, port: int, vcpu: int) -> None: ...
    def unmask(self, port: int, vcpu: int) -> None: ...
    def clear(self, port: int) -> None: ...
    def is_pending(self, port: int) -> bool: ...

    def is_busy(self, port: int) -> bool:
        """Whether a closed port must not be bound yet."""

    def set_priority(self, port: int, priority: int) -> None:
        """:raises XenError: ENOSYS without priorities, EINVAL no such priority."""

    def release(self) -> None:
        """Give back the guest's memory that is in use."""

    def save(self) -> dict[str, Any]:
        """JSON form, with the ABI's `name`."""


class Router(Protocol):
    """What lies beyond this domain."""

    def send(self, peer: int, peer_port: int, local_port: int) -> None:
        """Signal the other end."""

    def bind(self, peer: int, peer_port: int, local_port: int) -> None:
        """Join a port that `peer` left unbound for us. :raises XenError: EINVAL, ESRCH."""

    def closed(self, peer: int, peer_port: int, local_port: int) -> None: ...

    def exists(self, domid: int) -> bool:
        """Whether there is such a domain."""
        ...


class EventChannels:
    """One domain's ports. Port 0 is never used.

    :param events: the ABI at boot and after a reset.
    :param max_port: highest port that is given out.
    :ivar events: the ABI in force.
    """

    def __init__(self, domid: DomId, events: Abi, router: Router, max_port: int = DEFAULT_MAX_PORT) -> None:
        self.domid = domid
        self.events = events
        self.router = router
        self.max_port = max_port
        self.channels: list[Channel] = [Channel() for _ in range(PORTS_PER_BUCKET)]
        self.virqs: dict[tuple[int, int], int] = {}
        self._first = events
        self._lowest = 1  # no port below can be given out
        self._reset_at = 0  # where an unfinished reset goes on

    # -- lookup

    def _valid(self, port: int) -> Channel:
        if not 0 <= port < len(self.channels):
            raise XenError(errno.EINVAL, f"no port {port}")
        return self.channels[port]

    def _channel(self, port: int) -> Channel:
        channel = self._valid(port)
        if channel.state is ChannelState.FREE:
            raise XenError(errno.EINVAL, f"port {port} is not open")
        return channel

    def _grow(self, port: int) -> None:
        while port >= len(self.channels):
            self.channels.extend(Channel() for _ in range(PORTS_PER_BUCKET))

    def _allocate(self) -> Port:
        """The lowest port that is free."""
        end = min(self.max_port + 1, self.events.max_ports)
        busy = 0
        for port in range(self._lowest, end):
            self._grow(port)
            if self.channels[port].state is ChannelState.FREE:
                if not self.events.is_busy(port):
                    self._lowest = busy or port
                    return Port(port)
                busy = busy or port
        raise XenError(errno.ENOSPC, "all event channel ports are in use")

    def _open(self, channel: Channel) -> Port:
        port = self._allocate()
        self.channels[port] = channel
        self.events.opened(port)
        return port

    def _free(self, port: int) -> None:
        self.events.clear(port)
        self.channels[port] = Channel()
        self._lowest = min(self._lowest, port)

    def _resolve(self, domid: int) -> int:
        return self.domid if domid == DOMID_SELF else domid

    # -- operations

    def require_self(self, domid: int) -> None:
        """A guest works on its own ports. :raises XenError: EPERM for another domain, ESRCH when there is none."""
        if self._resolve(domid) != self.domid:
            there = domid == 0 or self.router.exists(domid)
            raise XenError(errno.EPERM if there else errno.ESRCH, f"event channels of domain {domid}")

    def alloc_unbound(self, dom: int, remote: int) -> Port:
        """A port that only domain `remote` may bind to; that need not exist yet.

        :raises XenError: ESRCH, EPERM for another domain's port, ENOSPC.
        """
        self.require_self(dom)
        return self._open(Channel(ChannelState.UNBOUND, peer=self._resolve(remote)))

    def open_host(self, port: int) -> None:
        """For the toolstack: make `port` an interdomain channel to the host's backend before the guest runs."""
        self._grow(port)
        self.channels[port] = Channel(ChannelState.INTERDOMAIN, peer=0, peer_port=port)
        self.events.opened(port)

    def bind_interdomain(self, remote: int, remote_port: int) -> Port:
        """:raises XenError: ESRCH no such domain, ENOSPC, EINVAL the port does not wait for this domain."""
        remote = self._resolve(remote)
        port = self._allocate()
        self.channels[port] = Channel(ChannelState.INTERDOMAIN, peer=remote, peer_port=remote_port)
        try:
            if remote != self.domid:
                self.router.bind(remote, remote_port, port)
            else:
                self.accept(remote_port, self.domid, port)
        except XenError:
            self.channels[port] = Channel()
            raise
        self.events.opened(port)
        # The far end may have sent before there was a channel: the near one is told to look.
        self.events.set_pending(port, 0)
        return port

    def accept(self, port: int, peer: int, peer_port: int) -> None:
        """`peer` binds to a port that waits for it. :raises XenError: EINVAL."""
        channel = self._valid(port)
        if channel.state is not ChannelState.UNBOUND or channel.peer != peer:
            raise XenError(errno.EINVAL, f"port {port} does not wait for domain {peer}")
        channel.state, channel.peer_port = ChannelState.INTERDOMAIN, peer_port

    def peer_closed(self, port: int) -> None:
        """The far end went: the port waits for that domain anew, with the vCPU it had."""
        channel = self.channels[port]
        channel.state, channel.peer_port = ChannelState.UNBOUND, 0

    def bind_virq(self, virq: int, vcpu: int, max_vcpus: int) -> Port:
        """:raises XenError: EINVAL no such VIRQ or not on this vCPU, ENOENT no such vCPU, EEXIST, ENOSPC."""
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
        """:raises XenError: ENOENT no such vCPU, ENOSPC."""
        if not 0 <= vcpu < max_vcpus:
            raise XenError(errno.ENOENT, f"no vCPU {vcpu}")
        return self._open(Channel(ChannelState.IPI, vcpu=vcpu))

    def close(self, port: int) -> None:
        """:raises XenError: EINVAL. The console's and the store's ports are channels like any other."""
        channel = self._channel(port)
        if channel.state is ChannelState.VIRQ:
            del self.virqs[_virq_key(channel)]
        self._free(port)
        if channel.state is ChannelState.INTERDOMAIN:
            if channel.peer == self.domid:
                self.peer_closed(channel.peer_port)
            else:
                self.router.closed(channel.peer, channel.peer_port, port)

    def send(self, port: int) -> None:
        """:raises XenError: EINVAL. What is sent to an unbound port is dropped."""
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
        """The channel itself; a valid port that is closed is a FREE one, as port 0 always is."""
        return self._valid(port)

    def bind_vcpu(self, port: int, vcpu: int, max_vcpus: int) -> None:
        """:raises XenError: ENOENT no such vCPU, EINVAL no such port or one that stays where it is."""
        if not 0 <= vcpu < max_vcpus:
            raise XenError(errno.ENOENT, f"no vCPU {vcpu}")
        channel = self._channel(port)
        if channel.state is ChannelState.VIRQ and channel.virq in VCPU_VIRQS:
            raise XenError(errno.EINVAL, "a per-vCPU VIRQ stays where it is")
        if channel.state is ChannelState.IPI:
            raise XenError(errno.EINVAL, "an IPI stays where it is")
        channel.vcpu = vcpu

    def unmask(self, port: int) -> None:
        """No error, and no effect, when the port is valid and closed."""
        channel = self._valid(port)
        if channel.state is not ChannelState.FREE:
            self.events.unmask(port, channel.vcpu)

    def set_priority(self, port: int, priority: int) -> None:
        """:raises XenError: EINVAL, ENOSYS without the FIFO ABI, EACCES for a closed port."""
        channel = self._valid(port)
        if channel.state is ChannelState.FREE and self.events.priorities:
            raise XenError(errno.EACCES, f"port {port} is not open")
        self.events.set_priority(port, priority)

    def is_pending(self, port: int) -> bool:
        """For SCHEDOP_poll. :raises XenError: EINVAL for a port that is not open."""
        self._channel(port)
        return self.events.is_pending(port)

    def reset(self, *, resume: bool = False, preempt: Callable[[], bool] = lambda: False) -> bool:
        """Close all ports and go back to the ABI at boot.

        :param resume: go on with a reset that gave way.
        :param preempt: asked now and then whether to give way.
        :returns: False when it gave way.
        :raises XenError: EBUSY one is under way, or none is to be resumed.
        """
        if resume != bool(self._reset_at):
            raise XenError(errno.EBUSY, "reset: call it once, to the end")
        start = self._reset_at or 1
        for port in range(start, len(self.channels)):
            if self.channels[port].state is not ChannelState.FREE:
                self.close(port)
            if not port % PORTS_PER_BUCKET and port > start and preempt():
                self._reset_at = port
                return False
        self._reset_at = 0
        if self.events is not self._first:
            self.events.release()
            self.events = self._first
            self._lowest = 1
        return True

    def destroy(self) -> None:
        """The domain ends: far ends are told, the guest's memory is given back."""
        self._reset_at = 0
        self.reset()

    # -- from the hypervisor

    def pend(self, port: int) -> None:
        """Mark a local port pending, if it is open."""
        if 0 < port < len(self.channels):
            channel = self.channels[port]
            if channel.state is not ChannelState.FREE:
                self.events.set_pending(port, channel.vcpu)

    def pend_all(self, ports: Iterable[int]) -> None:
        for port in ports:
            self.pend(port)

    def raise_virq(self, virq: int, vcpu: int = 0) -> None:
        """:param vcpu: whose VIRQ it is; without meaning for those of the domain."""
        port = self.virqs.get((vcpu if virq in VCPU_VIRQS else 0, virq))
        if port is not None:
            self.pend(port)

    def switch(self, events: Abi) -> None:
        """Another ABI takes over; open ports that are pending stay so."""
        old, self.events = self.events, events
        self.pend_all([port for port in range(1, min(len(self.channels), old.max_ports)) if self._pends(old, port)])

    def _pends(self, events: Abi, port: int) -> bool:
        return self.channels[port].state is not ChannelState.FREE and events.is_pending(port)

    # -- save and restore

    def save(self) -> dict[str, Any]:
        return {
            "channels": [[int(c.state), c.vcpu, c.peer, c.peer_port, c.virq] for c in self.channels],
            "abi": self.events.save(),
            "reset_at": self._reset_at,
        }

    def restore(self, data: dict[str, Any], events: Abi | None = None) -> None:
        """Take over what `save` gave.

        :param events: the ABI that was in force, already restored, if it was not the first one.
        :raises ValueError: the table is not one that `save` gives.
        """
        channels = [Channel(ChannelState(s), v, p, pp, q) for s, v, p, pp, q in data["channels"]]
        for port, channel in enumerate(channels):
            if not self._consistent(channels, port, channel):
                raise ValueError(f"event channel state: port {port} cannot be {channel}")
        self.channels = channels
        self.virqs = {_virq_key(c): port for port, c in enumerate(self.channels) if c.state is ChannelState.VIRQ}
        self.events = events or self._first
        self._lowest = 1
        self._reset_at = data["reset_at"]

    def _consistent(self, channels: list[Channel], port: int, channel: Channel) -> bool:
        if not (0 <= channel.vcpu < MAX_VCPUS and 0 <= channel.virq < NR_VIRQS):
            return False
        if channel.state is not ChannelState.INTERDOMAIN or channel.peer != self.domid:
            return port > 0 or channel.state is ChannelState.FREE
        if not 0 < channel.peer_port < len(channels):
            return False
        far = channels[channel.peer_port]
        return far.state is ChannelState.INTERDOMAIN and (far.peer, far.peer_port) == (self.domid, port)


def _virq_key(channel: Channel) -> tuple[int, int]:
    """A domain's VIRQ is found on vCPU 0, wherever its events go."""
    return (channel.vcpu if channel.virq in VCPU_VIRQS else 0, channel.virq)
