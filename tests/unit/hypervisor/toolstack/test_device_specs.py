"""Specs of disks and nics: what is accepted, what is refused, and their JSON forms."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from hypervisor.errors import SpecInvalid
from hypervisor.toolstack.api import DomainSpec, KernelBoot
from hypervisor.toolstack.devices import DeviceInfo, DeviceState, DiskFormat, DiskSpec, Limits, NicSpec

UUID = "12345678-1234-4234-8234-1234567890ab"
DISK = DiskSpec("xvda", "/images/a.qcow2", DiskFormat.QCOW2, limits=Limits(10_000_000, 500, 2.5))
NIC = NicSpec(0, "00:16:3e:00:00:01", "lan", ("10.0.0.2", "fe80::1"), 2)


def spec(disks: tuple[DiskSpec, ...] = (), nics: tuple[NicSpec, ...] = (), **fields: Any) -> DomainSpec:
    return DomainSpec(UUID, "web", KernelBoot("/boot/vmlinuz"), 64, disks=disks, nics=nics, **fields)


def test_devices_survive_the_json_form_of_their_domain() -> None:
    whole = spec((DISK, dataclasses.replace(DISK, id="xvdb", path="/b")), (NIC,), weight=512, cap=150)
    whole.validate()
    assert DomainSpec.from_json(json.loads(json.dumps(whole.to_json()))) == whole


def test_device_info_survives_its_json_form() -> None:
    info = DeviceInfo("disk", "xvda", DeviceState.CONNECTED, DISK.to_json(), 1 << 30, "", {"read_bytes": 4096})
    assert DeviceInfo.from_json(json.loads(json.dumps(info.to_json()))) == info


@pytest.mark.parametrize(("disk", "devid"), [("xvda", 51712), ("xvdb", 51728), ("xvdp", 51952)])
def test_disks_are_numbered_as_blkfront_expects(disk: str, devid: int) -> None:
    assert dataclasses.replace(DISK, id=disk).devid == devid


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (spec((dataclasses.replace(DISK, id="sda"),)), "xvda"),
        (spec((dataclasses.replace(DISK, path="a.img"),)), "full path"),
        (spec((DISK, DISK)), "xvda is given twice"),
        (spec((DISK, dataclasses.replace(DISK, id="xvdb"))), "/images/a.qcow2 is given twice"),
        (spec((dataclasses.replace(DISK, limits=Limits(iops=-1)),)), "iops"),
        (spec((dataclasses.replace(DISK, limits=Limits(burst_seconds=float("nan"))),)), "burst_seconds"),
        (spec(nics=(dataclasses.replace(NIC, mac="00:16:3E:00:00:01"),)), "mac"),
        (spec(nics=(dataclasses.replace(NIC, mac="01:00:5e:00:00:01"),)), "one interface"),
        (spec(nics=(dataclasses.replace(NIC, id=8),)), "0 to 7"),
        (spec(nics=(dataclasses.replace(NIC, network="../x"),)), "network"),
        (spec(nics=(dataclasses.replace(NIC, addresses=("10.0.0.300",)),)), "no IPv4"),
        (spec(nics=(NIC, dataclasses.replace(NIC, id=1))), "mac 00:16:3e:00:00:01 is given twice"),
        (spec(weight=0), "weight"),
        (spec(cap=3201), "cap"),
    ],
)
def test_what_is_refused_names_the_field(wrong: DomainSpec, says: str) -> None:
    with pytest.raises(SpecInvalid, match=says):
        wrong.validate()


@pytest.mark.parametrize(
    "fields",
    [
        {"disks": 5},
        {"disks": [5]},
        {"disks": [{"id": "xvda"}]},
        {"disks": [{"id": "xvda", "path": "/a", "format": "vmdk"}]},
        {"disks": [{"id": "xvda", "path": "/a", "size": 5}]},
        {"disks": [{"id": "xvda", "path": "/a", "limits": {"speed": 5}}]},
        {"nics": [{"id": 0}]},
        {"nics": [{"id": 0, "mac": "00:16:3e:00:00:01", "addresses": "10.0.0.1"}]},
        {"weight": "high"},
    ],
)
def test_ill_typed_json_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(SpecInvalid):
        DomainSpec.from_json({**spec().to_json(), **fields})
