"""The driver of Reeve's own hypervisor: speaks with ``reeve-hypervisor`` over its control socket.

Settings (optional): ``socket``, the control socket's path.
"""

from __future__ import annotations

import base64
import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from hypervisor.errors import HostFailure, HostUnavailable, OperationTimeout, SpecInvalid
from hypervisor.host import protocol
from hypervisor.toolstack.api import (
    Capability,
    Console,
    DomainEvent,
    DomainInfo,
    DomainSpec,
    DomainState,
    HostInfo,
    MigrationMode,
    MigrationOffer,
    MigrationOptions,
    MigrationStatus,
    MigrationTicket,
    SaveInfo,
    TemplateInfo,
)
from hypervisor.toolstack.devices import DeviceInfo, DiskSpec, NicSpec
from hypervisor.toolstack.drivers._embedded_client import Client, SocketConsole

LOG = logging.getLogger(__name__)

QUICK = 20.0
"""Seconds for a verb that only looks or switches."""

BUILD = 180.0
"""Seconds for one that builds a domain."""

STREAM = 1800.0
"""Seconds for one that writes or reads all of a domain's memory."""

_SETTINGS = {"socket"}


def create(settings: Mapping[str, str]) -> EmbeddedToolstack:
    """The driver's factory (entry point ``reeve.drivers``: ``embedded``). Connects when the first verb is used."""
    unknown = sorted(set(settings) - _SETTINGS)
    if unknown:
        raise SpecInvalid(f"embedded driver: unknown setting {unknown[0]!r}: known are {', '.join(sorted(_SETTINGS))}")
    return EmbeddedToolstack(settings.get("socket") or None)


class EmbeddedToolstack:
    """A `hypervisor.toolstack.api.Toolstack` over a control socket.

    Whatever only looks is asked again once after the host process was restarted; what
    changes something is not, because its effect is unknown then: `HostUnavailable`.
    """

    name = "embedded"

    def __init__(self, socket: str | Path | None = None) -> None:
        self._path = Path(socket) if socket is not None else protocol.default_socket()
        self._client = Client(self._path)

    def capabilities(self) -> frozenset[Capability]:
        has = set(self.host_info().capabilities)  # a newer host may have some that are not known here
        return frozenset(item for item in Capability if item.value in has)

    def host_info(self) -> HostInfo:
        return HostInfo.from_json(self._look("host.info"))

    def list_domains(self) -> list[DomainInfo]:
        return [DomainInfo.from_json(item) for item in self._look("domain.list")]

    def get_domain(self, uuid: str) -> DomainInfo:
        return DomainInfo.from_json(self._look("domain.get", BUILD, uuid=uuid))

    def get_spec(self, uuid: str) -> DomainSpec:
        return DomainSpec.from_json(self._look("domain.spec", BUILD, uuid=uuid))

    def create(self, spec: DomainSpec) -> DomainInfo:
        spec.validate()
        return DomainInfo.from_json(self._client.call("domain.create", {"spec": spec.to_json()}, BUILD))

    def unpause(self, uuid: str) -> None:
        self._act("domain.unpause", uuid)

    def pause(self, uuid: str) -> None:
        self._act("domain.pause", uuid)

    def shutdown(self, uuid: str) -> None:
        self._act("domain.shutdown", uuid)

    def reboot(self, uuid: str) -> None:
        self._act("domain.reboot", uuid)

    def reset(self, uuid: str) -> None:
        self._act("domain.reset", uuid)

    def destroy(self, uuid: str) -> None:
        self._act("domain.destroy", uuid)

    def wait(self, uuid: str, states: frozenset[DomainState], timeout: float) -> DomainInfo | None:
        """Goes on waiting over a restart of the host process, since domains survive it."""
        deadline = time.monotonic() + timeout
        while True:
            left = max(0.0, deadline - time.monotonic())
            try:
                args = {"uuid": uuid, "states": sorted(states), "timeout": left}
                found = self._client.call("domain.wait", args, left)
                return DomainInfo.from_json(found) if found is not None else None
            except HostUnavailable:
                if deadline - time.monotonic() <= 0.2:
                    raise
                time.sleep(0.2)
            except OperationTimeout as exc:
                raise OperationTimeout(exc.message.replace(f"{left:g} s", f"{timeout:g} s", 1)) from None

    def console_log(self, uuid: str, max_bytes: int = 65536) -> bytes:
        answer = self._look("console.log", BUILD, uuid=uuid, max_bytes=max_bytes)
        return base64.b64decode(answer["data"])

    def open_console(self, uuid: str) -> Console:
        return SocketConsole(self._path, uuid)

    # -- devices and resize

    def list_devices(self, uuid: str) -> list[DeviceInfo]:
        return [DeviceInfo.from_json(item) for item in self._look("device.list", BUILD, uuid=uuid)]

    def attach_disk(self, uuid: str, disk: DiskSpec) -> DeviceInfo:
        return self._device("device.attach", uuid, kind="disk", spec=disk.to_json())

    def attach_nic(self, uuid: str, nic: NicSpec) -> DeviceInfo:
        return self._device("device.attach", uuid, kind="nic", spec=nic.to_json())

    def detach_device(self, uuid: str, kind: str, ident: str, timeout: float, *, force: bool = False) -> None:
        args = {"uuid": uuid, "kind": kind, "id": ident, "timeout": float(timeout), "force": int(force)}
        self._client.call("device.detach", args, timeout + QUICK)

    def resize_disk(self, uuid: str, disk: str, size_bytes: int) -> DeviceInfo:
        return self._device("device.resize", uuid, id=disk, size_bytes=size_bytes)

    def set_vcpus(self, uuid: str, vcpus: int) -> None:
        self._client.call("domain.set_vcpus", {"uuid": uuid, "vcpus": vcpus}, BUILD)

    def set_memory(self, uuid: str, memory_mib: int) -> None:
        self._client.call("domain.set_memory", {"uuid": uuid, "memory_mib": memory_mib}, BUILD)

    def redefine(self, uuid: str, spec: DomainSpec) -> None:
        spec.validate()
        self._client.call("domain.redefine", {"uuid": uuid, "spec": spec.to_json()}, QUICK)

    def set_scheduling(self, uuid: str, weight: int, cap: int) -> None:
        self._client.call("domain.set_scheduling", {"uuid": uuid, "weight": weight, "cap": cap}, BUILD)

    def stats(self, uuid: str) -> dict[str, Any]:
        return dict(self._look("domain.stats", uuid=uuid))

    def sysrq(self, uuid: str, key: str) -> None:
        self._client.call("domain.sysrq", {"uuid": uuid, "key": key}, QUICK)

    def dump_core(self, uuid: str, path: str) -> None:
        self._client.call("domain.dump_core", {"uuid": uuid, "path": path}, 10 * BUILD)

    # -- save, restore, migration

    def save(self, uuid: str, path: str, *, keep_running: bool = False, timeout: float = 60.0) -> SaveInfo:
        args = {"uuid": uuid, "path": path, "keep_running": int(keep_running), "timeout": float(timeout)}
        return SaveInfo.from_json(self._client.call("domain.save", args, timeout + STREAM))

    def restore(self, path: str, *, owner: str, name: str = "", uuid: str = "") -> DomainInfo:
        args = {"path": path, "owner": owner, "name": name, "uuid": uuid}
        return DomainInfo.from_json(self._client.call("domain.restore", args, STREAM))

    def template_create(
        self, uuid: str, name: str, *, ident: str, keep_running: bool = False, timeout: float = 60.0
    ) -> TemplateInfo:
        args = {"uuid": uuid, "name": name, "ident": ident, "keep_running": int(keep_running)}
        answer = self._client.call("template.create", {**args, "timeout": float(timeout)}, timeout + STREAM)
        return TemplateInfo.from_json(answer)

    def template_list(self) -> list[TemplateInfo]:
        return [TemplateInfo.from_json(item) for item in self._look("template.list")]

    def template_get(self, name: str) -> TemplateInfo:
        return TemplateInfo.from_json(self._look("template.get", name=name))

    def template_remove(self, name: str, *, force: bool = False) -> None:
        self._client.call("template.remove", {"name": name, "force": int(force)}, BUILD)

    def clone(self, template: str, spec: DomainSpec) -> DomainInfo:
        spec.validate()
        args = {"name": template, "spec": spec.to_json()}
        return DomainInfo.from_json(self._client.call("template.clone", args, BUILD))

    def migration_offer(self, uuid: str) -> MigrationOffer:
        return MigrationOffer.from_json(self._look("migration.offer", BUILD, uuid=uuid))

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
        # Asked again like what only looks: it is idempotent by its ident.
        about = {"ident": ident, "token": token, "owner": owner, "mode": mode.value, "peer": peer}
        return MigrationTicket.from_json(self._look("migration.prepare", BUILD, offer=offer.to_json(), **about))

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
        options.validate()
        given = {"ticket": ticket.to_json(), "options": options.to_json(), "peer": peer}
        self._client.call("migration.start", {"uuid": uuid, "ident": ident, "token": token, **given}, BUILD)

    def migration_status(self, ident: str) -> MigrationStatus:
        return MigrationStatus.from_json(self._look("migration.status", ident=ident))

    def migration_list(self) -> list[MigrationStatus]:
        return [MigrationStatus.from_json(item) for item in self._look("migration.list")]

    def migration_cancel(self, ident: str) -> None:
        self._client.call("migration.cancel", {"ident": ident}, BUILD)

    def migration_resolve(self, ident: str, *, keep: bool) -> None:
        self._client.call("migration.resolve", {"ident": ident, "keep": int(keep)}, BUILD)

    def migration_takeover(self, ident: str, *, force: bool = False) -> None:
        self._client.call("migration.takeover", {"ident": ident, "force": int(force)}, BUILD)

    def migration_forget(self, ident: str) -> None:
        self._client.call("migration.forget", {"ident": ident}, BUILD)

    def subscribe(self, listener: Callable[[DomainEvent], None]) -> Callable[[], None]:
        return self._client.subscribe(listener)

    def close(self) -> None:
        self._client.close()

    def _device(self, verb: str, uuid: str, **args: Any) -> DeviceInfo:
        return DeviceInfo.from_json(self._client.call(verb, {"uuid": uuid, **args}, BUILD))

    def _act(self, verb: str, uuid: str) -> None:
        self._client.call(verb, {"uuid": uuid}, BUILD)

    def _look(self, verb: str, timeout: float = QUICK, **args: Any) -> Any:
        try:
            answer = self._client.call(verb, args, timeout)
        except HostUnavailable as exc:
            LOG.debug("%s once more: %s", verb, exc)
            answer = self._client.call(verb, args, timeout)
        if answer is None:
            raise HostFailure(f"the host process gave no answer to {verb}: is it of this release?")
        return answer
