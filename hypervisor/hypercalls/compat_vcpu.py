"""sched_op, set_timer_op and vcpu_op of 32-bit guests (common/compat/domain.c, arch/x86/x86_64/domain.c)."""

from __future__ import annotations

from hypervisor import abi, vcpu_context32
from hypervisor.domain import Domain
from hypervisor.hypercalls.compat_registry import compat, guest_of, native
from hypervisor.hypercalls.xlat import Pair

_POLL = Pair("sched_poll")
_RUNSTATE = Pair("vcpu_runstate_info")
_TRANSLATED = {
    abi.VCPUOP_set_singleshot_timer: Pair("vcpu_set_singleshot_timer"),
    abi.VCPUOP_register_runstate_memory_area: Pair("vcpu_register_runstate_memory_area"),
    abi.VCPUOP_register_vcpu_time_memory_area: Pair("vcpu_register_time_memory_area"),
}


@compat(abi.HYPERVISOR_sched_op)
def sched_op(domain: Domain, command: int, argument: int, _3: int, _4: int, _5: int, _6: int) -> int:
    if command == abi.SCHEDOP_poll:
        guest = guest_of(domain)
        argument = guest.put(bytes(_POLL.read(guest, argument)))
    return native(abi.HYPERVISOR_sched_op)(domain, command, argument, 0, 0, 0, 0)


@compat(abi.HYPERVISOR_set_timer_op)
def set_timer_op(domain: Domain, low: int, high: int, _3: int, _4: int, _5: int, _6: int) -> int:
    return native(abi.HYPERVISOR_set_timer_op)(domain, low | high << 32, 0, 0, 0, 0, 0)


@compat(abi.HYPERVISOR_vcpu_op)
def vcpu_op(domain: Domain, command: int, number: int, argument: int, _4: int, _5: int, _6: int) -> int:
    guest = guest_of(domain)
    handler = native(abi.HYPERVISOR_vcpu_op)
    if command == abi.VCPUOP_initialise:
        given = vcpu_context32.read_context(domain, argument)
        vcpu_context32.initialise(domain, domain.vcpu(number), given)
        return 0
    if command == abi.VCPUOP_get_runstate_info:
        answer = guest.put(bytes(_RUNSTATE.native_size))
        result = handler(domain, command, number, answer, 0, 0, 0)
        guest.write(argument, _RUNSTATE.narrow(guest.read(answer, _RUNSTATE.native_size)))
        return result
    pair = _TRANSLATED.get(command)
    if pair is not None:
        argument = guest.put(bytes(pair.read(guest, argument)))
    return handler(domain, command, number, argument, 0, 0, 0)
