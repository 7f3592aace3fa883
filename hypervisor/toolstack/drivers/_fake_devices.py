"""The fake driver's devices, resize, and what looks inside a guest."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import time
from collections.abc import Iterator, Mapping
from typing import Any

from hypervisor.errors import (
    DeviceNotFound,
    HostFailure,
    InsufficientMemory,
    InsufficientVcpus,
    OperationTimeout,
    SpecInvalid,
)
from hypervisor.toolstack.api import DomainSpec, DomainState, check_scheduling
from hypervisor.toolstack.devices import (
    MAX_DISK_BYTES,
    SECTOR,
    DeviceInfo,
    DeviceState,
    DiskFormat,
    DiskSpec,
    NicSpec,
    check_devices,
)
from hypervisor.toolstack.drivers import _fake_guest as guest
from hypervisor.toolstack.drivers._devices import attached, check_disk, check_nic, image_size, with_one_more
from hypervisor.toolstack.drivers._fake_store import FakeDomain, Store
from hypervisor.toolstack.drivers._optional import OptionalVerbs

DISK_STATS = ("read_bytes", "write_bytes", "read_requests", "write_requests", "flushes", "discards", "errors")
NIC_STATS = ("rx_bytes", "tx_bytes", "rx_packets", "tx_packets", "rx_dropped", "tx_dropped")


class DeviceVerbs(OptionalVerbs):
    """Half of `hypervisor.toolstack.drivers.fake.FakeToolstack`; the other half gives what is declared here."""

    store: Store
    cpus: int
    networks: frozenset[str]

    def _verb(self, verb: str) -> contextlib.AbstractContextManager[None]:
        raise NotImplementedError

    def _readable(self, uuid: str) -> FakeDomain:
        raise NotImplementedError

    def _live(self, uuid: str, verb: str) -> FakeDomain:
        raise NotImplementedError

    # devices

    def list_devices(self, uuid: str) -> list[DeviceInfo]:
        with self._verb("list_devices"):
            return devices(self.store.get(uuid))

    def attach_disk(self, uuid: str, disk: DiskSpec) -> DeviceInfo:
        with self._verb("attach_disk"):
            domain = self._live(uuid, "attach a disk to")
            disk.validate()
            if attached(domain.spec.disks, disk, "disk"):
                return _device(domain, "disk", disk.id)
            spec = dataclasses.replace(domain.spec, disks=with_one_more(domain.spec.disks, disk))
            check_devices(spec.disks, spec.nics)
            self.check_disk(domain.uuid, disk)
            return self._attached(domain, spec, "disk", disk.id)

    def attach_nic(self, uuid: str, nic: NicSpec) -> DeviceInfo:
        with self._verb("attach_nic"):
            domain = self._live(uuid, "attach a nic to")
            nic.validate()
            if attached(domain.spec.nics, nic, "nic"):
                return _device(domain, "nic", str(nic.id))
            spec = dataclasses.replace(domain.spec, nics=with_one_more(domain.spec.nics, nic))
            self.check_nic(domain.uuid, nic)
            check_devices(spec.disks, spec.nics)
            return self._attached(domain, spec, "nic", str(nic.id))

    def detach_device(self, uuid: str, kind: str, ident: str, timeout: float, *, force: bool = False) -> None:
        if kind not in ("disk", "nic"):
            raise SpecInvalid(f"device kind {kind!r} is not known: give disk or nic")
        end = time.monotonic() + timeout
        with self._verb("detach_device"):
            pass
        with self.store.changed:
            while not self._let_go(uuid, kind, ident, force and time.monotonic() >= end):
                left = end - time.monotonic()
                if left <= 0 and not force:
                    raise OperationTimeout(
                        f"the guest keeps {kind} {ident} of domain {uuid} after {timeout:g} s: unmount it there, wait"
                        " longer, or use force"
                    )
                self.store.wait_change(max(0.0, left))

    def _let_go(self, uuid: str, kind: str, ident: str, force: bool) -> bool:
        """The device is gone now; False: the guest keeps it."""
        with self.store.transaction():
            domain = self._live(uuid, "detach a device from")
            key = f"{kind}:{ident}"
            if key not in domain.devices:
                return True
            obeys = domain.state is DomainState.RUNNING and guest.option(domain, "devices") != "keep"
            if not (obeys or force):
                return False
            del domain.devices[key]
            domain.spec = dataclasses.replace(
                domain.spec,
                disks=tuple(disk for disk in domain.spec.disks if f"disk:{disk.id}" != key),
                nics=tuple(nic for nic in domain.spec.nics if f"nic:{nic.id}" != key),
            )
            self.store.put(domain)
            return True

    def _attached(self, domain: FakeDomain, spec: DomainSpec, kind: str, ident: str) -> DeviceInfo:
        domain.spec = spec
        domain.devices[f"{kind}:{ident}"] = new_device(spec, kind, ident)
        if domain.state is DomainState.RUNNING:
            guest.follow(self.store, domain)
        self.store.put(domain)
        return _device(domain, kind, ident)

    def new_devices(self, spec: DomainSpec) -> dict[str, dict[str, Any]]:
        """Those of a domain that is being made. :raises ToolstackError: one cannot be."""
        for disk in spec.disks:
            self.check_disk(spec.uuid, disk)
        for nic in spec.nics:
            self.check_nic(spec.uuid, nic)
        idents = [*(("disk", disk.id) for disk in spec.disks), *(("nic", str(nic.id)) for nic in spec.nics)]
        return {f"{kind}:{ident}": new_device(spec, kind, ident) for kind, ident in idents}

    def check_disk(self, uuid: str, disk: DiskSpec) -> None:
        """:raises ImageInvalid, ImageInUse: domain `uuid` cannot have this disk."""
        check_disk(uuid, disk, (other.spec for other in self.store.domains()))

    def check_nic(self, uuid: str, nic: NicSpec) -> None:
        """:raises NetworkUnknown, DeviceExists: domain `uuid` cannot have this nic."""
        check_nic(nic, (other.spec for other in self.store.domains()), self.networks)

    # resize

    def set_vcpus(self, uuid: str, vcpus: int) -> None:
        with self._verb("set_vcpus"):
            domain = self._live(uuid, "change the vCPUs of")
            if not 1 <= vcpus <= domain.max_vcpus:
                raise SpecInvalid(f"vcpus is {vcpus}: give 1 to {domain.max_vcpus} (max_vcpus)")
            domain.spec, domain.wanted_vcpus = domain.spec.with_vcpus(vcpus), vcpus
            self._changed(domain)

    def set_memory(self, uuid: str, memory_mib: int) -> None:
        with self._verb("set_memory"):
            domain = self._live(uuid, "change the memory of")
            if not 1 <= memory_mib <= domain.max_memory_mib:
                raise SpecInvalid(f"memory_mib is {memory_mib}: give 1 to {domain.max_memory_mib} (max_memory_mib)")
            free = self.store.free_mib(without=domain)
            if memory_mib > free:
                raise InsufficientMemory(f"{memory_mib} MiB asked for, the host has {free} MiB for it: ask for less")
            domain.spec, domain.target_mib = domain.spec.with_memory(memory_mib), memory_mib
            self._changed(domain)

    def redefine(self, uuid: str, spec: DomainSpec) -> None:
        with self._verb("redefine"):
            domain = self._readable(uuid)
            spec.validate()
            for name in ("uuid", "name", "owner", "type", "disks", "nics"):
                if getattr(spec, name) != getattr(domain.spec, name):
                    raise SpecInvalid(f"{name} cannot be redefined: leave it as it is")
            if spec.effective_max_vcpus > self.cpus:
                raise InsufficientVcpus(f"{spec.effective_max_vcpus} vCPUs asked for, the host has {self.cpus}")
            domain.spec = spec
            self.store.put(domain)

    def set_scheduling(self, uuid: str, weight: int, cap: int) -> None:
        with self._verb("set_scheduling"):
            check_scheduling(weight, cap)
            domain = self._readable(uuid)
            domain.spec = dataclasses.replace(domain.spec, weight=weight, cap=cap)
            self.store.put(domain)

    def resize_disk(self, uuid: str, disk: str, size_bytes: int) -> DeviceInfo:
        with self._verb("resize_disk"):
            domain = self._readable(uuid)
            spec = next((item for item in domain.spec.disks if item.id == disk), None)
            if spec is None:
                raise DeviceNotFound(f"domain {uuid} has no disk {disk!r}: list its devices")
            device = domain.devices[f"disk:{disk}"]
            if size_bytes % SECTOR or size_bytes > MAX_DISK_BYTES:
                raise SpecInvalid(f"disk {disk}: {size_bytes} bytes are no size: give whole sectors of {SECTOR} bytes")
            if size_bytes < device["size_bytes"]:
                raise SpecInvalid(f"disk {disk} has {device['size_bytes']} bytes and cannot be made smaller")
            if spec.readonly:
                raise SpecInvalid(f"disk {disk} is read-only: attach it writable to make it larger")
            if spec.format is DiskFormat.RAW and os.path.isfile(spec.path):
                try:
                    os.truncate(spec.path, size_bytes)
                except OSError as exc:
                    raise HostFailure(f"disk {disk}: {spec.path} cannot grow: {exc.strerror}: free space") from exc
            device["size_bytes"] = size_bytes
            self.store.put(domain)
            return _device(domain, "disk", disk)

    def _changed(self, domain: FakeDomain) -> None:
        if domain.state is DomainState.RUNNING:
            guest.follow(self.store, domain)
        self.store.put(domain)

    # looking inside

    def stats(self, uuid: str) -> dict[str, Any]:
        with self._verb("stats"):
            domain = self.store.get(uuid)
            least = guest.option(domain, "min")
            return {
                "cpu_time_ns": domain.cpu_time_ns,
                "vcpus": domain.online,
                "memory_mib": domain.memory_mib,
                "devices": [device.to_json() for device in devices(domain)],
                **({"memory_min_mib": int(least)} if least else {}),
            }

    def sysrq(self, uuid: str, key: str) -> None:
        with self._verb("sysrq"):
            if len(key) != 1 or not key.isascii() or not key.isalnum():
                raise SpecInvalid(f"sysrq key {key!r} is not usable: give one letter or digit")
            domain = self._live(uuid, "send a key to")
            if domain.state is DomainState.RUNNING:
                self.store.print(uuid, f"sysrq: {key}\r\n".encode())

    def dump_core(self, uuid: str, path: str) -> None:
        with self._verb("dump_core"):
            domain = self._readable(uuid)
            if not path.startswith("/") or "\0" in path or os.path.lexists(path):
                raise SpecInvalid(f"core file {path!r}: give a full path where nothing is yet")
            try:
                with appearing(path) as file:
                    file.write(json.dumps({"fake core of": domain.uuid, "memory_mib": domain.memory_mib}))
            except OSError as exc:
                raise HostFailure(f"core file {path} cannot be written: {exc.strerror}") from exc

    # test hooks

    def guest_work(self, uuid: str, cpu_time_ns: int = 0, **counters: Mapping[str, int]) -> None:
        """The guest used CPU time; and of its devices (``xvda={"read_bytes": 4096}``, ``nic0={…}``)."""
        with self.store.transaction():
            domain = self.store.get(uuid)
            domain.cpu_time_ns += cpu_time_ns
            for name, added in counters.items():
                key = f"nic:{name[3:]}" if name.startswith("nic") else f"disk:{name}"
                stats = domain.devices[key]["stats"]
                for counter, value in added.items():
                    stats[counter] += value
            self.store.put(domain)


def new_device(spec: DomainSpec, kind: str, ident: str) -> dict[str, Any]:
    """What the store keeps of a device that was just attached."""
    names = (*(DISK_STATS if kind == "disk" else NIC_STATS), "restarts")
    size = image_size(next(disk for disk in spec.disks if disk.id == ident)) if kind == "disk" else 0
    return {"state": DeviceState.CONNECTING, "size_bytes": size, "stats": dict.fromkeys(names, 0)}


def devices(domain: FakeDomain) -> list[DeviceInfo]:
    return [
        *(_device(domain, "disk", disk.id) for disk in domain.spec.disks),
        *(_device(domain, "nic", str(nic.id)) for nic in domain.spec.nics),
    ]


def _device(domain: FakeDomain, kind: str, ident: str) -> DeviceInfo:
    kept = domain.devices[f"{kind}:{ident}"]
    specs: tuple[DiskSpec | NicSpec, ...] = domain.spec.disks if kind == "disk" else domain.spec.nics
    spec = next(item for item in specs if str(item.id) == ident)
    state = DeviceState.CLOSED if domain.ended else DeviceState(kept["state"])
    return DeviceInfo(kind, ident, state, spec.to_json(), kept["size_bytes"], stats=dict(kept["stats"]))


@contextlib.contextmanager
def appearing(path: str) -> Iterator[Any]:
    """A new file that is there when it is whole."""
    part = f"{path}.part"
    try:
        with open(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600), "w") as file:
            yield file
        os.link(part, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(part)
