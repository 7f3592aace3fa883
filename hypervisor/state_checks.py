"""A domain's state from elsewhere: is it of the form it should be, and does it stay within the domain?

What native code takes from it unseen is checked to the last byte: a vCPU's place in the memory (`VcpuState.vcpu_info`,
used by the native fast path), and the engine's registers (`Registers.checked`). What only Python uses is checked for
type and range, so that a wrong state is refused here and not noticed by a running guest.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from hypervisor import abi
from hypervisor.engines.x86 import is_canonical
from hypervisor.types import PAGE_SIZE

if TYPE_CHECKING:
    from hypervisor.cpu.state import Vcpu
    from hypervisor.domain import Domain

_TYPES: Mapping[str, type | tuple[type, ...]] = {
    "area": int,
    "limit": int,
    "linear": list,
    "vcpus": list,
    "running": int,
    "events": dict,
    "grants": dict,
    "clock": dict,
    "watchdogs": list,
    "vm_assist": int,
    "architectural_iopl": bool,
    "shutdown_code": (int, type(None)),
    "declared_code": (int, type(None)),
}
_RUNSTATES = 4
_MAX_GDT_FRAMES = _MAX_LDT_FRAMES = 16
_U64 = 1 << 64


def check_form(data: Mapping[str, Any]) -> None:
    """:raises ValueError: something is missing, or of another type."""
    for name, kind in _TYPES.items():
        if not isinstance(data.get(name), kind):
            raise ValueError(f"a domain's state whose {name} is of no use")
    if not 0 <= data["vm_assist"] < _U64 or data["limit"] < 0:
        raise ValueError("a domain's state with numbers out of range")
    _numbers("clock", data["clock"].values(), -_U64, _U64)


def _numbers(what: str, values: Iterable[object], low: int, high: int) -> None:
    for value in values:
        if not isinstance(value, int) or not low <= value < high:
            raise ValueError(f"a domain's state with {what} {value!r}")


def check_vcpu(domain: Domain, vcpu: Vcpu) -> None:
    """:raises ValueError: it reaches outside of the domain, or is in no state that there is."""
    memory, state = domain.memory, vcpu.state
    where = f"vCPU {vcpu.id}"
    if state.vcpu_info % 8 or state.vcpu_info > memory.frames * PAGE_SIZE - abi.SIZEOF_VCPU_INFO:
        raise ValueError(f"{where}'s vcpu_info is outside of the domain's memory")
    if state.vcpu_info % PAGE_SIZE > PAGE_SIZE - abi.SIZEOF_VCPU_INFO:
        raise ValueError(f"{where}'s vcpu_info crosses a page")
    for cr3 in (state.kernel_cr3, state.user_cr3):
        if cr3 and (cr3 % PAGE_SIZE or memory.index(cr3 >> 12) < 0):
            raise ValueError(f"{where} has a page table that is none")
    if domain.config.bits == 32 and state.kernel_cr3 != domain.vcpus[vcpu.id].state.kernel_cr3:
        raise ValueError(f"{where} has a root that is not Xen's")
    if state.kernel_mode > 1 or state.iopl > 3:
        raise ValueError(f"{where} is in no mode that there is")
    _numbers(f"{where}'s frames", (*vcpu.gdt_frames, *vcpu.ldt_frames), 0, memory.frames)
    if max(len(vcpu.gdt_frames), len(vcpu.ldt_frames)) > _MAX_GDT_FRAMES:
        raise ValueError(f"{where} has more descriptor frames than there can be")
    if len(vcpu.debug_registers) != 8 or len(vcpu.runstate_times) != _RUNSTATES:
        raise ValueError(f"{where} is of another form")
    counters = (vcpu.runstate_since, vcpu.poll_deadline, vcpu.periodic_ns, vcpu.periodic_next)
    _numbers(f"{where}'s numbers", (*counters, *vcpu.runstate_times, *vcpu.debug_registers), 0, _U64)
    _numbers(f"{where}'s runstate", (vcpu.runstate,), 0, _RUNSTATES)
    _numbers(f"{where}'s sizes", (vcpu.gdt_entries, vcpu.ldt_entries), 0, 8193)
    _numbers(f"{where}'s ports", (*(vcpu.poll or ()), *vcpu.virq_ports.values()), 0, 1 << 32)
    _numbers(f"{where}'s addresses", (vcpu.runstate_area, vcpu.time_area, vcpu.ldt_base), 0, _U64)
    if not all(is_canonical(at) for at in (vcpu.runstate_area, vcpu.time_area, vcpu.ldt_base)):
        raise ValueError(f"{where} has addresses that there are not")
    for flag in (vcpu.up, vcpu.initialised, vcpu.blocked, vcpu.timer_pending):
        if not isinstance(flag, bool):
            raise ValueError(f"{where} is neither up nor down")
