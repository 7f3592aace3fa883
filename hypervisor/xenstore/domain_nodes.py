"""The standard nodes of a domain, as libxl lays them out, and our own marker.

Paths, values and permissions are those that libxl of Xen 4.17 gives a PV guest
(``xl create``), so that guests, Debian's tools and people find what they
know. One node is ours, ``/local/domain/<domid>/reeve/owner``: the marker that
proves whose domain this is (`DomainSpec.owner`). Only dom0 may write it, and
the guest cannot read it. ``/local/domain/<domid>/clone`` is ours too, of guests that began from a template.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

from hypervisor.xenstore.handle import Handle
from hypervisor.xenstore.path import domain_path

OWNER_NODE = "reeve/owner"

SHUTDOWN_REASONS = ("poweroff", "reboot", "suspend", "halt")

_GUEST_OWNED = ("data", "drivers", "feature", "attr", "error")
_GUEST_CONTROL = ("shutdown", "feature-poweroff", "feature-reboot", "feature-suspend", "sysrq")


@dataclass(frozen=True, slots=True)
class DomainNodes:
    """What the nodes of one domain say.

    :ivar memory_kib: boot memory (``memory/target``), KiB; `max_memory_kib` the static maximum.
    :ivar vcpus: online ones at boot; `max_vcpus` how many there are at most.
    :ivar store_port, console_port: event channel ports of the guest; `store_mfn` and `console_mfn` the ring
        pages' machine frames (``ring-ref``).
    :ivar console_tty: what a person opens to get to the console, or empty.
    :ivar template: name or ident of the template that the guest began from, with `generation`, a secret number of this
        domain alone, under ``clone``: the guest is told that others remember what it does; "" for none.
    :ivar start_time: seconds since the epoch.
    """

    domid: int
    uuid: str
    name: str
    memory_kib: int
    max_memory_kib: int
    vcpus: int
    max_vcpus: int
    store_port: int
    store_mfn: int
    console_port: int
    console_mfn: int
    owner: str = ""
    kernel: str = ""
    ramdisk: str = ""
    cmdline: str = ""
    console_tty: str = ""
    console_limit: int = 1 << 20
    template: str = ""
    generation: str = ""
    start_time: float = 0.0


def lay_out(handle: Handle, nodes: DomainNodes) -> None:
    """Write every node of a new domain, all or none; before it is introduced.

    :raises XenstoreError: nothing was written.
    """
    read_only = f"n0,r{nodes.domid}"
    guest_owned = f"n{nodes.domid}"
    with handle.transaction():
        # What an earlier domain of this number left, should its host have died at the wrong moment.
        handle.remove(domain_path(nodes.domid))
        for path, value, perms in _nodes(nodes, read_only, guest_owned):
            handle.write(path, value)
            handle.set_perms(path, perms)


def remove(handle: Handle, domid: int, uuid: str) -> None:
    """Remove what `lay_out` made, and the backends' side of it. Nodes that are not there are no error."""
    with handle.transaction():
        for path in (
            domain_path(domid),
            f"/vm/{uuid}",
            f"/libxl/{domid}",
            f"/local/domain/0/backend/console/{domid}",
        ):
            handle.remove(path)


def owner_of(handle: Handle, domid: int) -> str | None:
    """The marker of a domain, None when it has none: then it is not ours."""
    return handle.read(f"{domain_path(domid)}/{OWNER_NODE}")


def request_shutdown(handle: Handle, domid: int, reason: str) -> None:
    """Ask the guest to end itself (``control/shutdown``).

    :param reason: ``poweroff``, ``reboot``, ``suspend`` or ``halt``.
    :raises NotFound: there is no such domain.
    """
    path = f"{domain_path(domid)}/control/shutdown"
    handle.perms(path)
    handle.write(path, reason)


def request_sysrq(handle: Handle, domid: int, key: str) -> None:
    """Press a SysRq key (``control/sysrq``); the guest empties the node when it takes it.

    :param key: one letter or digit. :raises NotFound: there is no such domain.
    """
    path = f"{domain_path(domid)}/control/sysrq"
    handle.perms(path)
    handle.write(path, key)


def shutdown_acknowledged(handle: Handle, domid: int) -> bool:
    """Whether the guest has taken the last request: it empties the node when it begins to act."""
    return handle.read(f"{domain_path(domid)}/control/shutdown") == ""


def prepare_host(handle: Handle) -> None:
    """The nodes that every Xen host has: dom0's own. Does nothing to those that are there."""
    for path, value in (
        ("/tool/xenstored", ""),
        ("/local/domain/0/domid", "0"),
        ("/local/domain/0/name", "Domain-0"),
        ("/local/domain/0/backend", ""),
        ("/local/pool/0/name", "Pool-0"),
        ("/vm", ""),
        ("/libxl", ""),
    ):
        if not handle.exists(path):
            handle.write(path, value)


def _nodes(n: DomainNodes, read_only: str, guest_owned: str) -> Iterator[tuple[str, str, str]]:
    home = domain_path(n.domid)
    vm = f"/vm/{n.uuid}"
    backend = f"/local/domain/0/backend/console/{n.domid}/0"
    yield home, "", read_only
    for name, value in _host_values(n, vm):
        yield f"{home}/{name}", value, read_only
    yield f"{home}/device/suspend/event-channel", "", guest_owned
    for name in _GUEST_CONTROL:
        # A guest says itself what it can; until then the value is empty.
        yield f"{home}/control/{name}", "", guest_owned
    for name in ("multiprocessor-suspend", "xs_reset_watches"):
        yield f"{home}/control/platform-feature-{name}", "1", read_only
    for name in _GUEST_OWNED:
        yield f"{home}/{name}", "", guest_owned
    for name, value in _console_values(n, backend):
        yield f"{home}/console/{name}", value, read_only
    yield f"{home}/console/backend-id", "0", f"n{n.domid},r0"
    if n.template:
        for name, value in (("clone", ""), ("clone/template", n.template), ("clone/generation", n.generation)):
            yield f"{home}/{name}", value, read_only
    yield f"{home}/reeve", "", "n0"
    yield f"{home}/{OWNER_NODE}", n.owner, "n0"
    yield vm, "", read_only
    for name, value in _vm_values(n):
        yield f"{vm}/{name}", value, read_only
    yield backend, "", read_only
    for name, value in _backend_values(n, home):
        yield f"{backend}/{name}", value, read_only
    yield f"/libxl/{n.domid}", "", "n0"
    yield f"/libxl/{n.domid}/type", "pv", "n0"
    for name, value in (("backend", backend), *_backend_values(n, home)):
        yield f"/libxl/{n.domid}/device/console/0/{name}", value, "n0"


def _host_values(n: DomainNodes, vm: str) -> Iterator[tuple[str, str]]:
    yield "vm", vm
    yield "name", n.name
    yield "cpu", ""
    for vcpu in range(n.max_vcpus):
        yield f"cpu/{vcpu}", ""
        yield f"cpu/{vcpu}/availability", "online" if vcpu < n.vcpus else "offline"
    yield "memory", ""
    yield "memory/static-max", str(n.max_memory_kib)
    yield "memory/target", str(n.memory_kib)
    yield "memory/videoram", "0"
    yield "device", ""
    yield "device/suspend", ""
    yield "control", ""
    yield "domid", str(n.domid)
    yield "store", ""
    yield "store/port", str(n.store_port)
    yield "store/ring-ref", str(n.store_mfn)
    yield "console", ""


def _console_values(n: DomainNodes, backend: str) -> Iterator[tuple[str, str]]:
    yield "backend", backend
    yield "limit", str(n.console_limit)
    yield "type", "xenconsoled"
    yield "output", "pty"
    yield "tty", n.console_tty
    yield "port", str(n.console_port)
    yield "ring-ref", str(n.console_mfn)


def _vm_values(n: DomainNodes) -> Iterator[tuple[str, str]]:
    yield "name", n.name
    yield "uuid", n.uuid
    yield "image", ""
    yield "image/ostype", "linux"
    yield "image/kernel", n.kernel
    yield "image/ramdisk", n.ramdisk
    yield "image/cmdline", n.cmdline
    yield "start_time", f"{n.start_time or time.time():.2f}"


def _backend_values(n: DomainNodes, home: str) -> Iterator[tuple[str, str]]:
    yield "frontend", f"{home}/console"
    yield "frontend-id", str(n.domid)
    yield "online", "1"
    yield "state", "1"
    yield "protocol", "vt100"
