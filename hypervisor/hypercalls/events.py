"""event_channel_op: decoding over `hypervisor.evtchn.core`."""

from __future__ import annotations

import struct

from hypervisor import abi
from hypervisor.abi import errno
from hypervisor.domain import Domain
from hypervisor.errors import XenError
from hypervisor.evtchn.core import ChannelState
from hypervisor.hypercalls.registry import hypercall

_TWO = struct.Struct("<2I")
_ONE = struct.Struct("<I")
_DOM_PORT = struct.Struct("<HxxI")


def _alloc_unbound(domain: Domain, argument: int) -> None:
    dom, remote = struct.unpack("<2H", domain.guest.read(argument, 4))
    port = domain.events.alloc_unbound(dom, remote)
    domain.guest.write(argument + 4, _ONE.pack(port))


def _bind_interdomain(domain: Domain, argument: int) -> None:
    remote, remote_port = _DOM_PORT.unpack(domain.guest.read(argument, 8))
    port = domain.events.bind_interdomain(remote, remote_port)
    domain.guest.write(argument + 8, _ONE.pack(port))


def _bind_virq(domain: Domain, argument: int) -> None:
    virq, vcpu = _TWO.unpack(domain.guest.read(argument, 8))
    port = domain.events.bind_virq(virq, vcpu, len(domain.vcpus))
    domain.guest.write(argument + 8, _ONE.pack(port))


def _bind_ipi(domain: Domain, argument: int) -> None:
    (vcpu,) = _ONE.unpack(domain.guest.read(argument, 4))
    port = domain.events.bind_ipi(vcpu, len(domain.vcpus))
    domain.guest.write(argument + 4, _ONE.pack(port))


def _bind_pirq(_domain: Domain, _argument: int) -> None:
    raise XenError(errno.EPERM, "no physical interrupts")


def _close(domain: Domain, argument: int) -> None:
    domain.events.close(_ONE.unpack(domain.guest.read(argument, 4))[0])


def _send(domain: Domain, argument: int) -> None:
    domain.events.send(_ONE.unpack(domain.guest.read(argument, 4))[0])


def _status(domain: Domain, argument: int) -> None:
    dom, port = _DOM_PORT.unpack(domain.guest.read(argument, 8))
    if dom not in (abi.DOMID_SELF, domain.config.domid):
        raise XenError(errno.ESRCH, f"status of domain {dom}'s port")
    channel = domain.events.status(port)
    first = second = 0
    if channel.state is ChannelState.UNBOUND:
        first = channel.peer
    elif channel.state is ChannelState.INTERDOMAIN:
        first, second = channel.peer, channel.peer_port
    elif channel.state is ChannelState.VIRQ:
        first = channel.virq
    domain.guest.write(argument + 8, struct.pack("<4I", channel.state, channel.vcpu, first, second))


def _bind_vcpu(domain: Domain, argument: int) -> None:
    port, vcpu = _TWO.unpack(domain.guest.read(argument, 8))
    domain.events.bind_vcpu(port, vcpu, len(domain.vcpus))


def _unmask(domain: Domain, argument: int) -> None:
    domain.events.unmask(_ONE.unpack(domain.guest.read(argument, 4))[0])


def _reset(domain: Domain, argument: int) -> None:
    (dom,) = struct.unpack("<H", domain.guest.read(argument, 2))
    if dom not in (abi.DOMID_SELF, domain.config.domid):
        raise XenError(errno.ESRCH, f"reset of domain {dom}")
    domain.events.reset()


_OPERATIONS = {
    abi.EVTCHNOP_alloc_unbound: _alloc_unbound,
    abi.EVTCHNOP_bind_interdomain: _bind_interdomain,
    abi.EVTCHNOP_bind_virq: _bind_virq,
    abi.EVTCHNOP_bind_ipi: _bind_ipi,
    abi.EVTCHNOP_bind_pirq: _bind_pirq,
    abi.EVTCHNOP_close: _close,
    abi.EVTCHNOP_send: _send,
    abi.EVTCHNOP_status: _status,
    abi.EVTCHNOP_bind_vcpu: _bind_vcpu,
    abi.EVTCHNOP_unmask: _unmask,
    abi.EVTCHNOP_reset: _reset,
}


@hypercall(abi.HYPERVISOR_event_channel_op)
def event_channel_op(domain: Domain, command: int, argument: int, _3: int, _4: int, _5: int, _6: int) -> int:
    operation = _OPERATIONS.get(command & 0xFFFF_FFFF)
    if operation is None:
        # init_control and its kin among them: a guest then stays with the 2-level ABI.
        raise XenError(errno.ENOSYS, f"event_channel_op {command}")
    operation(domain, argument)
    return 0
