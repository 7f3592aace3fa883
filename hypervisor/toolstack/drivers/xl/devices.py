"""Disks and nics of a domain that is there: what is attached, attaching, and having the guest let go.

A device is in the domain's record before ``xl`` attaches it and until it is gone: whoever dies in between leaves a
device that is listed as failed, and that attaching again or detaching mends.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import threading
import time
from collections.abc import Mapping

from hypervisor.errors import (
    DeviceExists,
    DomainNotFound,
    HostFailure,
    ImageInvalid,
    OperationTimeout,
    SpecInvalid,
    ToolstackError,
)
from hypervisor.toolstack.devices import DeviceInfo, DeviceState, DiskSpec, NicSpec, check_devices
from hypervisor.toolstack.drivers._devices import attached, check_disk, check_nic, image_size, with_one_more
from hypervisor.toolstack.drivers.xl import config, parsers
from hypervisor.toolstack.drivers.xl.host import ENDED, Host, state
from hypervisor.toolstack.drivers.xl.life import Life
from hypervisor.toolstack.drivers.xl.records import Record
from hypervisor.toolstack.drivers.xl.runner import ATTACH
from hypervisor.toolstack.drivers.xl.store import CLOSED

LOG = logging.getLogger(__name__)

LOOK_AGAIN = 5.0
"""Seconds after which a back end's state is read even if no watch fired."""

_KINDS = {"disk": ("block", parsers.disk_rows), "nic": ("network", parsers.nic_rows)}
_STATES = {
    1: DeviceState.CONNECTING,
    2: DeviceState.CONNECTING,
    3: DeviceState.CONNECTING,
    4: DeviceState.CONNECTED,
    5: DeviceState.CLOSING,
    6: DeviceState.CLOSED,
    7: DeviceState.CONNECTED,
    8: DeviceState.CONNECTED,
}
"""Of XenbusState (public/io/xenbus.h)."""
MISSING = "it is not on the host: attach it again or detach it"


class Devices:
    """The verbs of `Capability.DISK`, `NIC` and `HOTPLUG`; see `hypervisor.toolstack.api.Toolstack`."""

    def __init__(self, host: Host, life: Life) -> None:
        self._host, self._life = host, life
        self._xl, self._records, self._store = host.xl, host.records, host.store

    def listed(self, uuid: str) -> list[DeviceInfo]:
        """None of a domain that is not ours: nobody here knows their specs."""
        row, record = self._life.row(uuid), self._records.find(uuid)
        if record is None:
            return []
        found: list[DeviceInfo] = []
        for kind, specs in (("disk", record.spec.disks), ("nic", record.spec.nics)):
            there = self._there(row, kind) if specs else {}
            found += [_info(row, kind, spec, there) for spec in specs]
        return found

    def attach_disk(self, uuid: str, disk: DiskSpec) -> DeviceInfo:
        disk.validate()
        return self._attach(uuid, "disk", disk, [config.disk(disk)])

    def attach_nic(self, uuid: str, nic: NicSpec) -> DeviceInfo:
        nic.validate()
        return self._attach(uuid, "nic", nic, config.nic_words(nic, self._host.settings.networks))

    def detach(self, uuid: str, kind: str, ident: str, timeout: float, *, force: bool) -> None:
        if kind not in _KINDS:
            raise SpecInvalid(f"device kind {kind!r} is not known: give disk or nic")
        end = time.monotonic() + timeout
        while True:
            with self._life.acting(uuid, "detach a device from") as (row, record):
                left = end - time.monotonic()
                path = self._let_go(row, record, kind, ident, force=force and left <= 0)
            if path is None:
                return
            if left <= 0:
                raise OperationTimeout(
                    f"the guest keeps {kind} {ident} of domain {uuid} after {timeout:g} s: unmount it there, wait"
                    " longer, or use force"
                )
            self._until_closed(path, left)  # others may act on the domain meanwhile

    # attaching

    def _attach(self, uuid: str, kind: str, device: DiskSpec | NicSpec, words: list[str]) -> DeviceInfo:
        self._host.claim()
        with contextlib.ExitStack() as claims:
            claims.enter_context(self._records.lock())  # nobody else takes the image or the MAC meanwhile
            with self._life.acting(uuid, f"attach a {kind} to") as (row, record):
                new = self._claim(record, device)
                there = self._there(row, kind)
                if device.devid in there and new is not record:
                    raise DeviceExists(f"{kind} {device.id} was attached by another: detach it with xl itself")
                if device.devid not in there:
                    self._records.put(new)
                    claims.close()
                    self._run(row, record, kind, device, words)
                    there = self._there(row, kind)
                return _info(row, kind, device, there)

    def _claim(self, record: Record, device: DiskSpec | NicSpec) -> Record:
        """The record with the device; the same if it is in it. :raises ToolstackError: the domain cannot have it."""
        spec = record.spec
        if isinstance(device, DiskSpec):
            if attached(spec.disks, device, "disk"):
                return record
            check_disk(spec.uuid, device, self._host.specs())
            disks, nics = with_one_more(spec.disks, device), spec.nics
        else:
            if attached(spec.nics, device, "nic"):
                return record
            check_nic(device, self._host.specs(), self._host.settings.networks)
            disks, nics = spec.disks, with_one_more(spec.nics, device)
        check_devices(disks, nics)
        return _with(record, disks, nics)

    def _run(self, row: parsers.Row, before: Record, kind: str, device: DiskSpec | NicSpec, words: list[str]) -> None:
        """Attach it; what fails leaves nothing, as far as that can be seen."""
        try:
            self._xl.run(f"{_KINDS[kind][0]}-attach", str(row.domid), *words, timeout=ATTACH)
        except BaseException:
            try:
                if device.devid in self._there(row, kind):
                    self._remove(row, kind, str(device.id), device.devid, force=True)
                self._records.put(before)
            except ToolstackError as exc:
                LOG.warning("%s %s of domain %s may be half attached: %s", kind, device.id, row.uuid, exc)
            raise

    # detaching

    def _let_go(self, row: parsers.Row, record: Record, kind: str, ident: str, *, force: bool) -> str | None:
        """None: it is gone now; or its back end's path, and both ends were asked to close."""
        spec = record.spec
        disks = tuple(disk for disk in spec.disks if kind != "disk" or disk.id != ident)
        nics = tuple(nic for nic in spec.nics if kind != "nic" or str(nic.id) != ident)
        ours: tuple[DiskSpec | NicSpec, ...] = spec.disks if kind == "disk" else spec.nics
        device = next((item for item in ours if str(item.id) == ident), None)
        if device is None:
            return None
        found = self._there(row, kind).get(device.devid)
        if found is not None:
            if not force and self._store.read(f"{found.path}/state") not in (None, CLOSED):
                self._store.close_device(found.path)
                return found.path
            self._remove(row, kind, ident, device.devid, force=force)
        self._records.put(_with(record, disks, nics))
        return None

    def _remove(self, row: parsers.Row, kind: str, ident: str, devid: int, *, force: bool) -> None:
        """Have ``xl`` take it away. ``network-detach`` forces by itself, after libxl's 10 s."""
        verb = f"{_KINDS[kind][0]}-detach"
        self._xl.run(verb, *(["--force"] if force and kind == "disk" else []), str(row.domid), ident, timeout=ATTACH)
        if devid in self._there(row, kind):
            raise HostFailure(f"xl {verb} left {kind} {ident} of domain {row.uuid} there: look at /var/log/xen")

    def _until_closed(self, path: str, seconds: float) -> None:
        """Wait until a back end is closed or gone, not longer than `seconds`."""
        end, fired = time.monotonic() + seconds, threading.Event()
        stop = self._store.watch(f"{path}/state", lambda _: fired.set())
        try:
            while self._store.read(f"{path}/state") not in (None, CLOSED):
                left = end - time.monotonic()
                if left <= 0:
                    return
                fired.wait(min(left, LOOK_AGAIN))
                fired.clear()
        finally:
            stop()

    def _there(self, row: parsers.Row, kind: str) -> dict[int, parsers.DeviceRow]:
        """Of each device's number what the host has.

        :raises DomainNotFound: it ended meanwhile: of a domain that is not there ``xl`` prints a table without rows.
        """
        verb, parse = _KINDS[kind]
        found = {found.devid: found for found in parse(self._xl.run(f"{verb}-list", str(row.domid)))}
        if not found and self._host.row(row.uuid).domid != row.domid:
            raise DomainNotFound(f"domain {row.uuid} started anew meanwhile: look again")
        return found


def _with(record: Record, disks: tuple[DiskSpec, ...], nics: tuple[NicSpec, ...]) -> Record:
    spec, run = (dataclasses.replace(old, disks=disks, nics=nics) for old in (record.spec, record.run))
    return dataclasses.replace(record, spec=spec, run=run)


def _info(row: parsers.Row, kind: str, spec: DiskSpec | NicSpec, there: Mapping[int, parsers.DeviceRow]) -> DeviceInfo:
    size, detail, found = 0, "", there.get(spec.devid)
    if isinstance(spec, DiskSpec):
        try:
            size = image_size(spec)
        except ImageInvalid as exc:
            detail = exc.message
    if state(row) in ENDED:
        how = DeviceState.CLOSED
    elif found is None:
        how, detail = DeviceState.FAILED, MISSING
    elif found.state in _STATES:
        how = _STATES[found.state]
    else:
        how, detail = DeviceState.FAILED, f"the guest says that its state is {found.state}"
    return DeviceInfo(kind, str(spec.id), how, spec.to_json(), size, detail)
