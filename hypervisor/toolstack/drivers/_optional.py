"""The verbs that a driver may lack: each refuses, naming the capability that is missing."""

from __future__ import annotations

from typing import Any, NoReturn

from hypervisor.errors import MigrationNotFound, TemplateNotFound, Unsupported
from hypervisor.toolstack.api import (
    Capability,
    DomainInfo,
    DomainSpec,
    MigrationMode,
    MigrationOffer,
    MigrationOptions,
    MigrationStatus,
    MigrationTicket,
    SaveInfo,
    TemplateInfo,
)
from hypervisor.toolstack.devices import DeviceInfo, DiskSpec, NicSpec


class OptionalVerbs:
    """Base of a driver: it overrides what it can do, and says so in its capabilities."""

    name: str

    def _lacks(self, capability: Capability) -> NoReturn:
        raise Unsupported(f"the {self.name} driver cannot do this (it lacks {capability}): see reeve node show")

    def list_devices(self, uuid: str) -> list[DeviceInfo]:
        return []

    def attach_disk(self, uuid: str, disk: DiskSpec) -> DeviceInfo:
        self._lacks(Capability.DISK)

    def attach_nic(self, uuid: str, nic: NicSpec) -> DeviceInfo:
        self._lacks(Capability.NIC)

    def detach_device(self, uuid: str, kind: str, ident: str, timeout: float, *, force: bool = False) -> None:
        self._lacks(Capability.HOTPLUG)

    def set_vcpus(self, uuid: str, vcpus: int) -> None:
        self._lacks(Capability.RESIZE)

    def set_memory(self, uuid: str, memory_mib: int) -> None:
        self._lacks(Capability.RESIZE)

    def redefine(self, uuid: str, spec: DomainSpec) -> None:
        self._lacks(Capability.RESIZE)

    def resize_disk(self, uuid: str, disk: str, size_bytes: int) -> DeviceInfo:
        self._lacks(Capability.DISK_RESIZE)

    def set_scheduling(self, uuid: str, weight: int, cap: int) -> None:
        self._lacks(Capability.RESIZE)

    def stats(self, uuid: str) -> dict[str, Any]:
        self._lacks(Capability.RESIZE)

    def sysrq(self, uuid: str, key: str) -> None:
        self._lacks(Capability.SYSRQ)

    def dump_core(self, uuid: str, path: str) -> None:
        self._lacks(Capability.DUMP_CORE)

    def save(self, uuid: str, path: str, *, keep_running: bool = False, timeout: float = 60.0) -> SaveInfo:
        self._lacks(Capability.SAVE)

    def restore(self, path: str, *, owner: str, name: str = "", uuid: str = "") -> DomainInfo:
        self._lacks(Capability.SAVE)

    def template_create(
        self, uuid: str, name: str, *, ident: str, keep_running: bool = False, timeout: float = 60.0
    ) -> TemplateInfo:
        self._lacks(Capability.TEMPLATES)

    def template_list(self) -> list[TemplateInfo]:
        return []

    def template_get(self, name: str) -> TemplateInfo:
        raise TemplateNotFound(f"there is no template {name!r} on this host: the {self.name} driver has none")

    def template_remove(self, name: str, *, force: bool = False) -> None:
        self.template_get(name)

    def clone(self, template: str, spec: DomainSpec) -> DomainInfo:
        self._lacks(Capability.TEMPLATES)

    def migration_offer(self, uuid: str) -> MigrationOffer:
        self._lacks(Capability.LIVE_MIGRATION)

    def migration_prepare(
        self,
        offer: MigrationOffer,
        *,
        ident: str,
        token: str,
        owner: str,
        mode: MigrationMode = MigrationMode.LIVE,
        peer: str = "",
    ) -> MigrationTicket:
        self._lacks(Capability.LIVE_MIGRATION)

    def migration_start(
        self,
        uuid: str,
        *,
        ident: str,
        token: str,
        ticket: MigrationTicket,
        options: MigrationOptions,
        peer: str = "",
    ) -> None:
        self._lacks(Capability.LIVE_MIGRATION)

    def migration_status(self, ident: str) -> MigrationStatus:
        raise MigrationNotFound(f"no migration {ident} on this host: the {self.name} driver has none")

    def migration_list(self) -> list[MigrationStatus]:
        return []

    def migration_cancel(self, ident: str) -> None:
        self.migration_status(ident)

    def migration_resolve(self, ident: str, *, keep: bool) -> None:
        self.migration_status(ident)

    def migration_takeover(self, ident: str, *, force: bool = False) -> None:
        self.migration_status(ident)

    def migration_forget(self, ident: str) -> None:
        """There is none."""
