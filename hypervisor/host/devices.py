"""The devices of domains: made with them, attached and detached, and kept over restarts of the host process."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from typing import Any

from hypervisor.devices import registry
from hypervisor.devices.driver import Backend, Opened
from hypervisor.devices.xenbus import BACKEND_HOME, DevicePaths, XenbusDevice
from hypervisor.errors import (
    DeviceExists,
    DeviceNotFound,
    HostUnavailable,
    OperationTimeout,
    SpecInvalid,
    ToolstackError,
)
from hypervisor.host.device import Device
from hypervisor.host.device_memory import DeviceMemory
from hypervisor.host.device_specs import KINDS, Spec, key_of, kind_of, specs_of, with_device, without_device
from hypervisor.host.driver_process import DriverOrder
from hypervisor.host.drivers import Counters, DriverHold, end_stranger
from hypervisor.host.guest_side import DomainSide
from hypervisor.host.records import RecordStore
from hypervisor.host.settings import HostSettings
from hypervisor.host.table import Domain, DomainTable
from hypervisor.host.together import all_of
from hypervisor.host.zygote_client import ZygoteClient
from hypervisor.toolstack.api import DomainSpec
from hypervisor.toolstack.devices import MAX_DISK_BYTES, SECTOR, DeviceInfo, NicSpec, check_devices
from hypervisor.waiting import within
from hypervisor.xenstore.errors import XenstoreError
from hypervisor.xenstore.handle import Handle

LOG = logging.getLogger(__name__)

FORCE_TIMEOUT = 60.0


class HostDevices:
    """Back ends of every kind there is, and the way to a domain's devices."""

    def __init__(
        self, settings: HostSettings, handle: Handle, zygote: ZygoteClient, records: RecordStore, table: DomainTable
    ) -> None:
        self.settings = settings
        self.handle = handle
        self.zygote = zygote
        self.records = records
        self.table = table
        self._backends: dict[str, Backend] = {}

    def backend(self, kind: str) -> Backend:
        """Loaded when it is first needed."""
        if kind not in self._backends:
            name = dict(self.settings.device_backends).get(kind) or registry.BACKENDS[kind]
            self._backends[kind] = registry.load(name, self.settings)
        return self._backends[kind]

    def of(self, domain: Domain) -> DomainDevices:
        return DomainDevices(self, domain)

    def forget_strangers(self, known: frozenset[int]) -> None:
        """Remove back-end nodes of domains that are not there any more."""
        for backend_type in self.handle.directory(BACKEND_HOME):
            if backend_type == "console":
                continue  # belongs to the domain's own nodes
            for domid in self.handle.directory(f"{BACKEND_HOME}/{backend_type}"):
                if not domid.isdecimal() or int(domid) not in known:
                    self.handle.remove(f"{BACKEND_HOME}/{backend_type}/{domid}")

    def check_macs(self, spec: DomainSpec, nics: tuple[NicSpec, ...]) -> None:
        """:raises DeviceExists: another domain has such a MAC address."""
        macs = {nic.mac for nic in nics}
        for domain in self.table.all():
            for nic in domain.record.spec.nics:
                if nic.mac in macs and domain.uuid != spec.uuid:
                    raise DeviceExists(
                        f"mac {nic.mac} is used by nic {nic.id} of domain {domain.uuid}: give another one"
                    )


class DomainDevices:
    """All devices of one domain, over its reboots.

    Devices are opened before the guest is built (`open_all`), begin when its nodes are there (`begin`), and are ended
    with it (`halt`, `end`); then they can be opened again.
    """

    def __init__(self, host: HostDevices, domain: Domain) -> None:
        self._host = host
        self._domain = domain
        self._devices: dict[str, Device] = {}
        self._drivers: dict[str, DriverHold] = {}
        self._adopting: asyncio.Task[None] | None = None

    # -- with the domain ------------------------------------------------------------------------------------------

    async def open_all(self) -> None:
        """Open every device of the spec, for the domid of the record. :raises ToolstackError: none is open then."""
        record = self._domain.record
        record.devices = {}
        self._host.check_macs(record.spec, record.spec.nics)
        try:
            for spec in specs_of(record.spec):
                await self._add(spec)
        except BaseException:
            await self.end()
            raise

    def begin(self) -> None:
        """The domain's nodes are there. :raises HostFailure: xenstore refuses the devices'."""
        for device in self._devices.values():
            device.begin()

    def adopt(self) -> None:
        """Go on with the devices of a domain that lives: they are there at once, and served soon."""
        record = self._domain.record
        try:
            for spec in specs_of(record.spec):
                memory = DeviceMemory.from_json(record.devices.get(key_of(spec), {}))
                self._devices[key_of(spec)] = self._make(spec, memory)
        except ToolstackError as exc:
            LOG.error("devices of domain %s: %s", self._domain.uuid, exc)
            return
        self._adopting = asyncio.get_running_loop().create_task(self._adopt())

    def guest_ended(self) -> None:
        """Finish what the guest had under way, and end the drivers."""
        for device in self._devices.values():
            device.guest_ended()

    async def halt(self) -> None:
        """Do nothing any more of itself: the domain is being ended."""
        await self._stop_adopting()
        for device in self._devices.values():
            await device.let_go()

    async def end(self) -> None:
        """End drivers, give back all that was opened, remove the nodes. :raises HostFailure: a driver does not go."""
        await self.halt()
        for driver in self._drivers.values():
            await driver.stop()
        folder = self._host.records.directory(self._domain.uuid)
        for kind in KINDS:
            await end_stranger(folder, kind)
        for device in self._devices.values():
            await device.end()
            try:
                self._bus(device.spec).remove()
            except XenstoreError as exc:
                LOG.error("nodes of %s %s: %s", device.kind, device.id, exc)
        self._devices.clear()
        self._drivers.clear()

    async def let_go(self) -> None:
        """The host process ends, domain and drivers do not."""
        await self.halt()
        for driver in self._drivers.values():
            driver.let_go()

    # -- to another host, and from one ----------------------------------------------------------------------------

    async def flush(self) -> None:
        """Less is left to do for `pack`. :raises HostFailure: it cannot be done."""
        await all_of(device.flush() for device in self._devices.values())

    async def quiesce(self) -> None:
        """The guest stands still: drivers finish and let go of all devices. :raises HostUnavailable: one does not."""
        await self._stop_adopting()
        await all_of(device.quiesce() for device in self._devices.values())

    def all(self, *kinds: str) -> list[Device]:
        return [device for device in self._devices.values() if not kinds or device.kind in kinds]

    def disk_backend(self) -> Backend:
        """Of all disks of this host."""
        return self._host.backend("disk")

    async def pack(self, copied: frozenset[str] = frozenset()) -> dict[str, Any]:
        """After `quiesce`: give everything back. :returns: what `DomainRecord.devices` is to be on the other host.

        :param copied: keys of disks of which that one has copies.
        :raises HostFailure: not all content of the disks is where that one finds it.
        """
        return dict(await all_of(self._packed(device, copied) for device in self._devices.values()))

    async def _packed(self, device: Device, copied: frozenset[str]) -> tuple[str, dict[str, Any]]:
        return key_of(device.spec), await device.pack(copied=key_of(device.spec) in copied)

    def resume(self) -> None:
        """After `quiesce`, with or without `pack`: it goes on here."""
        for device in self._devices.values():
            device.begin()

    async def check_all(self, elsewhere: frozenset[str]) -> dict[str, int]:
        """Whether all could be opened if nobody else had them. :returns: sizes, bytes. :raises ToolstackError.

        :param elsewhere: keys of disks that are not on this host.
        """
        spec = self._domain.record.spec
        self._host.check_macs(spec, spec.nics)
        here = [device for device in specs_of(spec) if key_of(device) not in elsewhere]
        sizes = await all_of(self._host.backend(kind_of(device)).check(self._domain.uuid, device) for device in here)
        return dict(zip(map(key_of, here), sizes, strict=True))

    async def expect(self) -> None:
        """Have the drivers ready. :raises ToolstackError: one cannot be started; that is tried again by `arrive`."""
        await all_of(
            self._driver(kind).ensure() for kind in {kind_of(spec) for spec in specs_of(self._domain.record.spec)}
        )

    def arrive(self, opened: Mapping[str, Opened] | None = None) -> None:
        """The guest goes on here with the devices that its record tells of; its nodes are there.

        :param opened: by key, what is open already; the others are opened by and by.
        """
        record = self._domain.record
        for spec in specs_of(record.spec):
            device = self._make(spec, DeviceMemory.from_json(record.devices.get(key_of(spec), {})))
            self._devices[key_of(spec)] = device
            device.opened = (opened or {}).get(key_of(spec))
            device.begin()

    # -- verbs ----------------------------------------------------------------------------------------------------

    async def list(self) -> list[DeviceInfo]:
        """Disks, then nics, each by id."""
        devices = sorted(self._devices.values(), key=lambda d: (d.kind, d.devid))
        return list(await asyncio.gather(*(device.info() for device in devices)))

    async def attach(self, kind: str, spec: Spec) -> DeviceInfo:
        """:raises SpecInvalid, DeviceExists, ToolstackError."""
        spec.validate()
        present = self._devices.get(key_of(spec))
        if present is not None and present.spec == spec and not present.memory.leaving:
            return await present.info()
        if present is not None:
            what = "is being detached: try again" if present.memory.leaving else "is in use: give another id"
            raise DeviceExists(f"{kind} {spec.id} of domain {self._domain.uuid} {what}")
        record = self._domain.record
        new = with_device(record.spec, spec)
        check_devices(new.disks, new.nics)
        if isinstance(spec, NicSpec):
            self._host.check_macs(record.spec, (spec,))
        device = await self._add(spec)
        try:
            device.begin()
            record.spec = new
            self._host.records.save(record)
        except BaseException:
            record.spec = without_device(new, kind, device.id)
            del self._devices[key_of(spec)]
            await device.end()
            self._bus(spec).remove()
            raise
        return await device.info()

    async def detach(self, kind: str, ident: str, timeout: float, *, force: bool) -> None:
        """No effect if there is none. :raises OperationTimeout: the guest did not let go; asked it stays."""
        device = self._devices.get(f"{kind}/{ident}")
        if device is None:
            return
        device.leave()
        try:
            await within(device.closed.wait(), timeout)
        except TimeoutError:
            if not force:
                raise OperationTimeout(
                    f"{kind} {ident} of domain {self._domain.uuid} is still held by the guest after {timeout:g} s: "
                    "unmount or shut it down there, or detach it by force"
                ) from None
            device.force()
            try:
                await within(device.closed.wait(), FORCE_TIMEOUT)
            except TimeoutError:
                raise HostUnavailable(f"{kind} {ident}: its driver does not end: try again") from None

    async def resize(self, ident: str, size_bytes: int) -> DeviceInfo:
        """:raises DeviceNotFound, SpecInvalid, HostFailure: see `hypervisor.toolstack.api.Toolstack.resize_disk`."""
        device = self._devices.get(f"disk/{ident}")
        if device is None or device.opened is None:
            raise DeviceNotFound(f"domain {self._domain.uuid} has no disk {ident!r} that is open: list its devices")
        if size_bytes <= 0 or size_bytes % SECTOR or size_bytes > MAX_DISK_BYTES:
            raise SpecInvalid(f"disk {ident}: {size_bytes} bytes are no size: give whole sectors of {SECTOR} bytes")
        if size_bytes < device.opened.size_bytes:
            raise SpecInvalid(f"disk {ident} has {device.opened.size_bytes} bytes and cannot be made smaller")
        if size_bytes != device.opened.size_bytes and getattr(device.spec, "readonly", False):
            raise SpecInvalid(f"disk {ident} is read-only: attach it writable to make it larger")
        if size_bytes != device.opened.size_bytes:
            nodes = await device.backend.resize(device.opened, device.spec, size_bytes)
            await device.changed(device.spec, nodes)
        return await device.info()

    def counters(self) -> dict[str, int]:
        """For people: how many devices there are and how often a driver was replaced."""
        return {
            "devices": len(self._devices),
            "driver_restarts": sum(device.memory.restarts for device in self._devices.values()),
        }

    # -- inside ---------------------------------------------------------------------------------------------------

    async def _add(self, spec: Spec, memory: DeviceMemory | None = None) -> Device:
        """:raises ToolstackError: it cannot be opened, and is not there."""
        device = self._make(spec, memory)
        device.opened = await device.backend.open(self._domain.uuid, self._domain.record.domid, spec)
        self._devices[key_of(spec)] = device
        return device

    def _make(self, spec: Spec, memory: DeviceMemory | None) -> Device:
        kind = kind_of(spec)
        made: Device
        made = Device(
            spec,
            self._host.backend(kind),
            self._bus(spec),
            self._driver(kind),
            save=lambda: self._save(made),
            gone=self._gone,
            memory=memory,
        )
        return made

    async def _adopt(self) -> None:
        """What a driver of the host process before this one counted is kept; the driver is replaced."""
        record = self._domain.record
        counted: Counters = {}
        for kind in {device.kind for device in self._devices.values()}:
            try:
                counted |= await self._driver(kind).clear()
            except ToolstackError as exc:  # its device is tried again until it is gone
                LOG.error("domain %s: %s", self._domain.uuid, exc)
        for device in list(self._devices.values()):
            device.driver_died(counted.get(device.devid, {}))
            try:
                device.opened = await device.backend.open(self._domain.uuid, record.domid, device.spec)
                device.begin()
            except ToolstackError as exc:
                LOG.error("domain %s: %s %s: %s", self._domain.uuid, device.kind, device.id, exc)
                if self._bus(device.spec).is_laid_out():
                    device.begin()
            if record.ended:
                device.guest_ended()

    async def _stop_adopting(self) -> None:
        task, self._adopting = self._adopting, None
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    def _driver(self, kind: str) -> DriverHold:
        if kind not in self._drivers:
            host, domain = self._host, self._domain
            facts = host.zygote.facts
            order = DriverOrder(
                uuid=domain.uuid,
                domid=domain.record.domid,
                kind=kind,
                factory=host.backend(kind).driver,
                link=facts.link if facts is not None else "",
                log_bytes=host.settings.driver_log_kib * 1024,
            )
            folder = host.records.directory(domain.uuid)
            hold = DriverHold(order, folder, host.zygote, DomainSide(domain, order), sandbox=host.settings.sandbox)
            hold.on_death = lambda counters: self._driver_died(kind, counters)
            hold.on_report = lambda devid, what, detail: self._report(kind, devid, what, detail)
            self._drivers[kind] = hold
        return self._drivers[kind]

    def _driver_died(self, kind: str, counters: Counters) -> None:
        for device in self._devices.values():
            if device.kind == kind:
                device.driver_died(counters.get(device.devid, {}))

    def _report(self, kind: str, devid: int, what: str, detail: str) -> None:
        for device in self._devices.values():
            if device.kind == kind and device.devid == devid:
                device.report(what, detail)

    def _gone(self, device: Device) -> None:
        """A device has left the running domain."""
        record = self._domain.record
        self._devices.pop(key_of(device.spec), None)
        record.devices.pop(key_of(device.spec), None)
        record.spec = without_device(record.spec, device.kind, device.id)
        self._host.records.save(record)

    def _save(self, device: Device) -> None:
        record = self._domain.record
        if self._devices.get(key_of(device.spec)) is device:
            record.devices[key_of(device.spec)] = device.memory.to_json()
            self._host.records.save(record)

    def _bus(self, spec: Spec) -> XenbusDevice:
        paths = DevicePaths(self._domain.record.domid, self._host.backend(kind_of(spec)).type, spec.devid)
        return XenbusDevice(self._host.handle, paths)
