"""event_channel_op: decoding over `hypervisor.evtchn` (xen/common/event_channel.c, do_event_channel_op).

The whole structure is copied in before anything is done, and copied out after
what succeeded, so an argument that cannot be read changes nothing.
"""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Callable

from hypervisor import abi
from hypervisor.abi import errno
from hypervisor.domain import Domain
from hypervisor.errors import XenError
from hypervisor.evtchn.core import ChannelState
from hypervisor.hypercalls.registry import Continuation, hypercall

_ONE = struct.Struct("<I")
_TWO = struct.Struct("<2I")
_DOMS = struct.Struct("<2H")
_DOM_PORT = struct.Struct("<HxxI")
_CONTROL = struct.Struct("<Q2I")
_FRAME = struct.Struct("<Q")

RESET_CONT = 14
"""Where a reset that gave way goes on: EVTCHNOP_reset_cont, which the public header keeps for Xen itself."""

NR_PIRQS = 56
"""Interrupt numbers of a guest without devices: those of one IO-APIC and 32 more, Xen's default on such a machine."""


def _alloc_unbound(domain: Domain, args: bytearray) -> None:
    dom, remote = _DOMS.unpack_from(args)
    _ONE.pack_into(args, abi.EVTCHN_ALLOC_UNBOUND_PORT, domain.events.alloc_unbound(dom, remote))


def _bind_interdomain(domain: Domain, args: bytearray) -> None:
    remote, remote_port = _DOM_PORT.unpack_from(args)
    port = domain.events.bind_interdomain(remote, remote_port)
    _ONE.pack_into(args, abi.EVTCHN_BIND_INTERDOMAIN_LOCAL_PORT, port)


def _bind_virq(domain: Domain, args: bytearray) -> None:
    virq, vcpu = _TWO.unpack_from(args)
    _ONE.pack_into(args, abi.EVTCHN_BIND_VIRQ_PORT, domain.events.bind_virq(virq, vcpu, len(domain.vcpus)))


def _bind_ipi(domain: Domain, args: bytearray) -> None:
    (vcpu,) = _ONE.unpack_from(args)
    _ONE.pack_into(args, abi.EVTCHN_BIND_IPI_PORT, domain.events.bind_ipi(vcpu, len(domain.vcpus)))


def _bind_pirq(_domain: Domain, args: bytearray) -> None:
    (pirq,) = _ONE.unpack_from(args)
    raise XenError(errno.EINVAL if pirq >= NR_PIRQS else errno.EPERM, f"physical interrupt {pirq}")


def _close(domain: Domain, args: bytearray) -> None:
    domain.events.close(_ONE.unpack_from(args)[0])


def _send(domain: Domain, args: bytearray) -> None:
    domain.events.send(_ONE.unpack_from(args)[0])


def _status(domain: Domain, args: bytearray) -> None:
    dom, port = _DOM_PORT.unpack_from(args)
    domain.events.require_self(dom)
    channel = domain.events.status(port)
    _TWO.pack_into(args, abi.EVTCHN_STATUS_STATUS, channel.state, channel.vcpu)
    if channel.state in (ChannelState.UNBOUND, ChannelState.INTERDOMAIN):
        struct.pack_into("<H", args, abi.EVTCHN_STATUS_U_UNBOUND_DOM, channel.peer)
    if channel.state is ChannelState.INTERDOMAIN:
        _ONE.pack_into(args, abi.EVTCHN_STATUS_U_INTERDOMAIN_PORT, channel.peer_port)
    if channel.state is ChannelState.VIRQ:
        _ONE.pack_into(args, abi.EVTCHN_STATUS_U_VIRQ, channel.virq)


def _bind_vcpu(domain: Domain, args: bytearray) -> None:
    port, vcpu = _TWO.unpack_from(args)
    domain.events.bind_vcpu(port, vcpu, len(domain.vcpus))


def _unmask(domain: Domain, args: bytearray) -> None:
    domain.events.unmask(_ONE.unpack_from(args)[0])


def _init_control(domain: Domain, args: bytearray) -> None:
    mfn, offset, vcpu = _CONTROL.unpack_from(args)
    domain.fifo.init_control(vcpu, mfn, offset, len(domain.vcpus))
    args[abi.EVTCHN_INIT_CONTROL_LINK_BITS] = abi.EVTCHN_FIFO_LINK_BITS


def _expand_array(domain: Domain, args: bytearray) -> None:
    domain.fifo.expand_array(_FRAME.unpack_from(args)[0])


def _set_priority(domain: Domain, args: bytearray) -> None:
    domain.events.set_priority(*_TWO.unpack_from(args))


def _reset(domain: Domain, args: bytearray, *, resume: bool = False) -> None:
    domain.events.require_self(struct.unpack_from("<H", args)[0])
    if not domain.events.reset(resume=resume, preempt=lambda: domain.preempt):
        raise Continuation(RESET_CONT)


def _reset_cont(domain: Domain, args: bytearray) -> None:
    _reset(domain, args, resume=True)


@dataclasses.dataclass(frozen=True, slots=True)
class _Operation:
    """:ivar size: of the argument structure, bytes. :ivar answers: whether it is copied out."""

    run: Callable[[Domain, bytearray], None]
    size: int
    answers: bool = False


_OPERATIONS = {
    abi.EVTCHNOP_alloc_unbound: _Operation(_alloc_unbound, abi.SIZEOF_EVTCHN_ALLOC_UNBOUND, True),
    abi.EVTCHNOP_bind_interdomain: _Operation(_bind_interdomain, abi.SIZEOF_EVTCHN_BIND_INTERDOMAIN, True),
    abi.EVTCHNOP_bind_virq: _Operation(_bind_virq, abi.SIZEOF_EVTCHN_BIND_VIRQ, True),
    abi.EVTCHNOP_bind_ipi: _Operation(_bind_ipi, abi.SIZEOF_EVTCHN_BIND_IPI, True),
    abi.EVTCHNOP_bind_pirq: _Operation(_bind_pirq, abi.SIZEOF_EVTCHN_BIND_PIRQ, True),
    abi.EVTCHNOP_close: _Operation(_close, abi.SIZEOF_EVTCHN_CLOSE),
    abi.EVTCHNOP_send: _Operation(_send, abi.SIZEOF_EVTCHN_SEND),
    abi.EVTCHNOP_status: _Operation(_status, abi.SIZEOF_EVTCHN_STATUS, True),
    abi.EVTCHNOP_bind_vcpu: _Operation(_bind_vcpu, abi.SIZEOF_EVTCHN_BIND_VCPU),
    abi.EVTCHNOP_unmask: _Operation(_unmask, abi.SIZEOF_EVTCHN_UNMASK),
    abi.EVTCHNOP_reset: _Operation(_reset, abi.SIZEOF_EVTCHN_RESET),
    RESET_CONT: _Operation(_reset_cont, abi.SIZEOF_EVTCHN_RESET),
    abi.EVTCHNOP_init_control: _Operation(_init_control, abi.SIZEOF_EVTCHN_INIT_CONTROL, True),
    abi.EVTCHNOP_expand_array: _Operation(_expand_array, abi.SIZEOF_EVTCHN_EXPAND_ARRAY),
    abi.EVTCHNOP_set_priority: _Operation(_set_priority, abi.SIZEOF_EVTCHN_SET_PRIORITY),
}

_COMPAT_LAST = abi.EVTCHNOP_unmask


@hypercall(abi.HYPERVISOR_event_channel_op)
def event_channel_op(domain: Domain, command: int, argument: int, _3: int, _4: int, _5: int, _6: int) -> int:
    operation = _OPERATIONS.get(command & 0xFFFF_FFFF)
    if operation is None:
        raise XenError(errno.ENOSYS, f"event_channel_op {command}")
    args = bytearray(domain.guest.read(argument, operation.size))
    try:
        operation.run(domain, args)
    except Continuation as exc:
        raise Continuation(*exc.arguments, argument) from None
    if operation.answers:
        domain.guest.write(argument, bytes(args))
    return 0


@hypercall(abi.HYPERVISOR_event_channel_op_compat)
def event_channel_op_compat(domain: Domain, argument: int, _2: int, _3: int, _4: int, _5: int, _6: int) -> int:
    """The form before Xen 3.2.2: command and arguments in one structure (arch/x86/compat.c)."""
    (command,) = _ONE.unpack_from(domain.guest.read(argument, abi.SIZEOF_EVTCHN_OP))
    if command > _COMPAT_LAST:
        raise XenError(errno.ENOSYS, f"event_channel_op_compat {command}")
    return event_channel_op(domain, command, argument + abi.EVTCHN_OP_U, 0, 0, 0, 0)
