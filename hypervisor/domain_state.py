"""A domain as a whole, saved and restored: all that its memory does not hold.

What is restored is checked in form and range (`hypervisor.state_checks`), and the frame table against the page tables:
it may come from another host.

`save` is for a domain that does not run, between two guest instructions. Its memory, Xen's own frames in it included,
is the caller's to copy. `restore` is for a domain of the same shape on the same machine frames that was made but not
started, whose memory holds the copy already; the guest goes on at the next instruction, its system time where it
stopped. The registers have the form of the engine build (`Engine.save_cpu`): a stream between hosts has its own.
"""

from __future__ import annotations

import base64
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from hypervisor import state_checks
from hypervisor.cpu.state import Vcpu

if TYPE_CHECKING:
    from hypervisor.domain import Domain

VERSION = 1
_SHAPE = ("base_mfn", "max_pages", "max_vcpus", "bits", "domid", "linear_page_tables")
"""What of the configuration a saved state depends on."""


def save(domain: Domain) -> dict[str, Any]:
    """JSON form.

    :raises ValueError: frames of other domains are mapped, which only this host knows.
    """
    return {**save_but_frames(domain), "frames": _text(domain.frames.save())}


def save_but_frames(domain: Domain) -> dict[str, Any]:
    """The same without the frame table, which is large."""
    running = domain.running
    running.cpu = domain.engine.save_cpu()
    try:
        vcpus = [vcpu.save() for vcpu in domain.vcpus]
    finally:
        running.cpu = None
    return {
        "version": VERSION,
        "engine": domain.engine.name,
        "config": {**domain.config.to_json(), "cpu_policy": domain.cpuid.policy.save()},
        "clock": domain.clock.save(),
        "area": domain.area.save(),
        "limit": domain.reservation.limit,
        "linear": domain.tables.linear.save(),
        "vcpus": vcpus,
        "running": running.id,
        "events": domain.events.save(),
        "grants": domain.grants.save(),
        "watchdogs": domain.watchdogs.save(),
        "vm_assist": domain.vm_assist,
        "architectural_iopl": domain.traps.architectural_iopl,
        "shutdown_code": domain.shutdown_code,
        "declared_code": domain.declared_code,
    }


def restore(domain: Domain, data: dict[str, Any]) -> None:
    """Take over what `save` gave; the domain runs nothing meanwhile.

    :raises ValueError: the state is of another version, engine or shape of domain, or contradicts itself; the domain is
        of no use then.
    """
    _check(domain, data)
    domain.frames.load(_bytes(data["frames"]))
    restore_but_frames(domain, data, lambda: not domain.recount())


def make_ready(domain: Domain) -> None:
    """What can be done before there is a state: it saves `restore_but_frames` about a millisecond."""
    domain.engine.reset_pv64(domain.vcpus[0].state.kernel_cr3, domain.area.gdt_va(0), 0xFFFF)


def restore_but_frames(
    domain: Domain, data: dict[str, Any], agrees: Callable[[], bool], *, ready: bool = False
) -> None:
    """Take over the rest, when the frame table is in place already.

    :param agrees: whether page tables and frame table are of one mind. :param ready: `make_ready` was called, and
        nothing else since. :raises ValueError: as `restore`.
    """
    _check(domain, data)
    state_checks.check_form(data)
    domain.area.restore(data["area"])
    domain.reservation.limit = int(data["limit"])
    domain.tables.linear.restore(data["linear"])
    for number, saved in enumerate(data["vcpus"]):
        vcpu = Vcpu.restore(saved)
        if vcpu.id != number:
            raise ValueError(f"a domain's state with vCPU {vcpu.id} in the place of {number}")
        state_checks.check_vcpu(domain, vcpu)
        domain.vcpus[number] = vcpu
    domain.clock.restore(data["clock"])
    domain.fifo.restore(data["events"])
    domain.grants.restore(data["grants"])
    domain.watchdogs.restore(data["watchdogs"])
    domain.vm_assist = int(data["vm_assist"])
    domain.traps.architectural_iopl = bool(data["architectural_iopl"])
    domain.shutdown_code, domain.declared_code = data["shutdown_code"], data["declared_code"]
    running = domain.vcpus[data["running"]]
    if not ready or running.id:
        domain.engine.reset_pv64(running.state.kernel_cr3, domain.area.gdt_va(running.id), 0xFFFF)
    _load(domain, running)
    domain.clock.update_wallclock(domain.memory, domain.area.shared_info)
    if not agrees() and (wrong := domain.recount()):
        raise ValueError(f"the saved state and the memory do not belong together: {wrong[0]}")


def _check(domain: Domain, data: dict[str, Any]) -> None:
    if data["version"] != VERSION:
        raise ValueError(f"a domain's state of version {data['version']}; this is version {VERSION}")
    if data["engine"] != domain.engine.name:
        raise ValueError(f"a domain's state of engine {data['engine']}, not {domain.engine.name}")
    mine = domain.config.to_json()
    for name in _SHAPE:
        if data["config"][name] != mine[name]:
            raise ValueError(f"a domain's state with {name} {data['config'][name]}, not {mine[name]}")
    if data["config"]["cpu_policy"] != domain.cpuid.policy.save():
        raise ValueError("a domain's state with another cpu policy: make the domain with the saved one")
    if len(data["vcpus"]) != len(domain.vcpus) or not 0 <= data["running"] < len(domain.vcpus):
        raise ValueError("a domain's state with other vCPUs")


def _load(domain: Domain, vcpu: Vcpu) -> None:
    """Put the vCPU that ran last on the engine, which was reset."""
    engine = domain.engine
    if vcpu.cpu is None:
        raise ValueError(f"vCPU {vcpu.id} ran, but has no registers")
    for each in domain.vcpus:
        if each.cpu is not None:
            each.cpu = engine.regs.checked(each.cpu)
    engine.restore_cpu(vcpu.cpu)
    vcpu.cpu = None
    domain.running = vcpu
    domain.traps.set_vcpu(vcpu)
    domain.load_ldt(vcpu)


def _text(state: dict[str, Any]) -> dict[str, Any]:
    return {name: base64.b64encode(v).decode() if isinstance(v, bytes) else v for name, v in state.items()}


def _bytes(state: dict[str, Any]) -> dict[str, Any]:
    return {name: base64.b64decode(v) if isinstance(v, str) else v for name, v in state.items()}
