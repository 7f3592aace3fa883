"""What the driver can do, and what of it a host allows."""

from __future__ import annotations

from collections.abc import Mapping

from hypervisor.toolstack.api import Capability

DECLARED = frozenset(
    {
        Capability.PV,
        Capability.PVH,
        Capability.HVM,
        Capability.SMP,
        Capability.CONSOLE,
        Capability.REBOOT,
        Capability.ADOPTION,
        Capability.DISK,
        Capability.NIC,
        Capability.HOTPLUG,
        Capability.RESIZE,
        Capability.SAVE,
    }
)
OF_XEN = {Capability.PV: "pv", Capability.PVH: "hvm", Capability.HVM: "hvm"}
"""Of those that depend on the host what ``virt_caps`` of ``xl info`` must name."""


def here(facts: Mapping[str, str]) -> frozenset[Capability]:
    """:param facts: of ``xl info``."""
    has = set(facts["virt_caps"].split())
    return frozenset(item for item in DECLARED if item not in OF_XEN or OF_XEN[item] in has)
