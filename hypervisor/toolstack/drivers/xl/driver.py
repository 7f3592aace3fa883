"""The driver's verbs. See docs/xl.md."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Any

from hypervisor.errors import DomainNotFound, ToolstackError
from hypervisor.toolstack.api import (
    Capability,
    Console,
    DomainEvent,
    DomainInfo,
    DomainSpec,
    DomainState,
    HostInfo,
    SaveInfo,
)
from hypervisor.toolstack.devices import DeviceInfo, DiskSpec, NicSpec
from hypervisor.toolstack.drivers._optional import OptionalVerbs
from hypervisor.toolstack.drivers.xl import capabilities, console
from hypervisor.toolstack.drivers.xl.devices import Devices
from hypervisor.toolstack.drivers.xl.events import EVENTS
from hypervisor.toolstack.drivers.xl.host import Host, Settings, state
from hypervisor.toolstack.drivers.xl.life import Life
from hypervisor.toolstack.drivers.xl.saving import Saving
from hypervisor.toolstack.drivers.xl.sizing import Sizing
from hypervisor.toolstack.drivers.xl.sweep import sweep
from hypervisor.toolstack.info import still

LOG = logging.getLogger(__name__)

LOOK_AGAIN = 5.0
"""Seconds after which `wait` looks even if no watch fired."""


class XlToolstack(OptionalVerbs):
    """A `hypervisor.toolstack.api.Toolstack` over ``xl`` and xenstore."""

    name = "xl"

    def __init__(self, settings: Settings) -> None:
        self._host = Host(settings)
        self._life = Life(self._host)
        self._sizing = Sizing(self._host, self._life)
        self._devices = Devices(self._host, self._life)
        self._saving = Saving(self._host, self._life)
        self._changed = threading.Condition()
        self._changes = 0
        self._capabilities: frozenset[Capability] | None = None
        self._watching = False

    # what there is

    def capabilities(self) -> frozenset[Capability]:
        if self._capabilities is None:  # what a host can do does not change while it runs
            self._capabilities = capabilities.here(self._host.facts())
        return self._capabilities

    def host_info(self) -> HostInfo:
        rows, facts = self._life.rows(), self._host.facts()
        return HostInfo(
            hostname=facts["host"],
            driver=self.name,
            driver_version=f"Xen {facts['xen_version']}",
            cpus=int(facts["nr_cpus"]),
            memory_total_mib=int(facts["total_memory"]),
            memory_free_mib=self._host.free(facts, rows),
            domains=len(rows),
            capabilities=tuple(sorted(item.value for item in capabilities.here(facts))),
            detail=tuple((key, facts[key]) for key in ("virt_caps", "xen_caps", "xen_version")),
        )

    def list_domains(self) -> list[DomainInfo]:
        return [self._host.info(row) for row in self._life.rows()]

    def get_domain(self, uuid: str) -> DomainInfo:
        return self._host.info(self._life.row(uuid))

    def get_spec(self, uuid: str) -> DomainSpec:
        self._life.row(uuid)
        return self._host.record(uuid).spec

    # life

    def create(self, spec: DomainSpec) -> DomainInfo:
        self._watch()
        return self._life.create(spec)

    def unpause(self, uuid: str) -> None:
        self._switch(uuid, "unpause", DomainState.PAUSED)

    def pause(self, uuid: str) -> None:
        self._switch(uuid, "pause", DomainState.RUNNING)

    def shutdown(self, uuid: str) -> None:
        self._ask(uuid, "shutdown")

    def reboot(self, uuid: str) -> None:
        self._ask(uuid, "reboot")

    def reset(self, uuid: str) -> None:
        self._life.reset(uuid)

    def destroy(self, uuid: str) -> None:
        self._life.destroy(uuid)

    def wait(self, uuid: str, states: frozenset[DomainState], timeout: float) -> DomainInfo | None:
        deadline = time.monotonic() + timeout
        self._watch()
        while True:
            before = self._changes
            try:
                info = self.get_domain(uuid)
            except DomainNotFound:
                return None
            if info.state in states:
                return info
            left = deadline - time.monotonic()
            if left <= 0:
                raise still(uuid, info.state, states, timeout)
            with self._changed:
                self._changed.wait_for(lambda seen=before: self._changes != seen, min(left, LOOK_AGAIN))  # type: ignore[misc]

    def _switch(self, uuid: str, verb: str, when: DomainState) -> None:
        with self._life.acting(uuid, verb) as (row, _):
            if state(row) is not when:
                return
            self._host.xl.run(verb, str(row.domid))
        self._host.events.publish(f"{verb}d", uuid)

    def _ask(self, uuid: str, verb: str) -> None:
        """With ``-F``: a guest without the PV interface gets the ACPI button instead."""
        with self._life.acting(uuid, verb) as (row, _):
            self._host.xl.run(verb, "-F", str(row.domid))

    # devices

    def list_devices(self, uuid: str) -> list[DeviceInfo]:
        return self._devices.listed(uuid)

    def attach_disk(self, uuid: str, disk: DiskSpec) -> DeviceInfo:
        return self._devices.attach_disk(uuid, disk)

    def attach_nic(self, uuid: str, nic: NicSpec) -> DeviceInfo:
        return self._devices.attach_nic(uuid, nic)

    def detach_device(self, uuid: str, kind: str, ident: str, timeout: float, *, force: bool = False) -> None:
        self._devices.detach(uuid, kind, ident, timeout, force=force)

    # save and restore

    def save(self, uuid: str, path: str, *, keep_running: bool = False, timeout: float = 60.0) -> SaveInfo:
        return self._saving.save(uuid, path, keep_running=keep_running, timeout=timeout)

    def restore(self, path: str, *, owner: str, name: str = "", uuid: str = "") -> DomainInfo:
        self._watch()
        return self._saving.restore(path, owner=owner, name=name, uuid=uuid)

    # resize, and looking inside

    def set_vcpus(self, uuid: str, vcpus: int) -> None:
        self._sizing.set_vcpus(uuid, vcpus)

    def set_memory(self, uuid: str, memory_mib: int) -> None:
        self._sizing.set_memory(uuid, memory_mib)

    def redefine(self, uuid: str, spec: DomainSpec) -> None:
        self._sizing.redefine(uuid, spec)

    def set_scheduling(self, uuid: str, weight: int, cap: int) -> None:
        self._sizing.set_scheduling(uuid, weight, cap)

    def stats(self, uuid: str) -> dict[str, Any]:
        info = self.get_domain(uuid)
        devices = [device.to_json() for device in self.list_devices(uuid)]
        counters = {"cpu_time_ns": info.cpu_time_ns, "vcpus": info.vcpus, "memory_mib": info.memory_mib}
        return {**counters, "devices": devices}

    # console and events

    def console_log(self, uuid: str, max_bytes: int = 65536) -> bytes:
        self._life.row(uuid)
        record = self._host.record(uuid)
        return console.log(self._host.log(record.spec), record.log_start, max_bytes)

    def open_console(self, uuid: str) -> Console:
        row = self._life.row(uuid)
        self._host.ours(row)
        return console.XlConsole(self._host.xl, row.domid)

    def subscribe(self, listener: Callable[[DomainEvent], None]) -> Callable[[], None]:
        self._watch()
        return self._host.events.subscribe(listener)

    def close(self) -> None:
        self._host.store.close()

    def _watch(self) -> None:
        """From now on every change of a domain's life is looked at."""
        with self._changed:
            if self._watching:
                return
            for path in ("@introduceDomain", "@releaseDomain", EVENTS):
                self._host.store.watch(path, self._look)
            self._watching = True

    def _look(self, path: str) -> None:
        try:
            if path == "@releaseDomain":
                sweep(self._host, self._life)
        except ToolstackError as exc:
            LOG.warning("domains that ended cannot be looked at now: %s", exc)
        with self._changed:
            self._changes += 1
            self._changed.notify_all()
