"""The devices that a domain's spec names."""

from __future__ import annotations

import dataclasses
from typing import Any

from hypervisor.toolstack.api import DomainSpec
from hypervisor.toolstack.devices import DiskSpec, NicSpec

Spec = DiskSpec | NicSpec

KINDS: dict[str, type[DiskSpec] | type[NicSpec]] = {"disk": DiskSpec, "nic": NicSpec}
FIELDS = {"disk": "disks", "nic": "nics"}


def specs_of(spec: DomainSpec) -> list[Spec]:
    return [*spec.disks, *spec.nics]


def kind_of(spec: Spec) -> str:
    return "disk" if isinstance(spec, DiskSpec) else "nic"


def key_of(spec: Spec) -> str:
    return f"{kind_of(spec)}/{spec.id}"


def with_device(spec: DomainSpec, device: Spec) -> DomainSpec:
    if isinstance(device, DiskSpec):
        return dataclasses.replace(spec, disks=(*spec.disks, device))
    return dataclasses.replace(spec, nics=(*spec.nics, device))


def without_device(spec: DomainSpec, kind: str, ident: str) -> DomainSpec:
    kept: Any = tuple(device for device in getattr(spec, FIELDS[kind]) if str(device.id) != ident)
    change: dict[str, Any] = {FIELDS[kind]: kept}
    return dataclasses.replace(spec, **change)
