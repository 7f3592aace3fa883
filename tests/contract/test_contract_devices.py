"""Devices: what is attached, what is refused, and that nothing is left behind.

The guests here take no device up; what a front end sees is tested with real ones in ``tests/integration``.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from kit import POWEROFF, WAITS, Bench, assert_readable

from hypervisor.errors import (
    DeviceExists,
    DeviceNotFound,
    DomainNotFound,
    ImageInUse,
    ImageInvalid,
    NetworkUnknown,
    OperationTimeout,
    SpecInvalid,
    ToolstackError,
    WrongState,
)
from hypervisor.toolstack.api import Capability, DomainState, OnEvent
from hypervisor.toolstack.devices import DeviceState, DiskFormat, DiskSpec, NicSpec

NOBODY = "00000000-0000-4000-8000-000000000000"
MAC = "00:16:3e:00:00:01"
MIB = 1 << 20


@pytest.fixture
def disks(bench: Bench) -> Bench:
    bench.needs(Capability.DISK)
    bench.image()  # or the test is skipped
    return bench


@pytest.fixture
def growing(disks: Bench) -> Bench:
    disks.needs(Capability.DISK_RESIZE)
    return disks


@pytest.fixture
def nics(bench: Bench) -> Bench:
    bench.needs(Capability.NIC)
    bench.image()
    return bench


def refused(error: type[ToolstackError], bench: Bench, uuid: str, device: DiskSpec | NicSpec) -> None:
    before = bench.toolstack.get_spec(uuid)
    attach = bench.toolstack.attach_disk if isinstance(device, DiskSpec) else bench.toolstack.attach_nic
    with pytest.raises(ToolstackError) as caught:
        attach(uuid, device)  # type: ignore[arg-type]
    assert type(caught.value) is error, repr(caught.value)
    assert_readable(caught.value)
    assert bench.toolstack.get_spec(uuid) == before


def test_a_disk_from_the_start_is_listed(disks: Bench) -> None:
    disk = DiskSpec("xvda", disks.image(), readonly=True)
    info = disks.toolstack.create(disks.spec(disks=(disk,)))
    (device,) = disks.toolstack.list_devices(info.uuid)
    assert (device.kind, device.id, device.size_bytes) == ("disk", "xvda", MIB)
    assert DiskSpec.from_json(device.spec) == disk
    assert device.stats.get("read_bytes", 0) == 0 and all(isinstance(value, int) for value in device.stats.values())
    assert disks.toolstack.stats(info.uuid)["devices"][0]["id"] == "xvda"


def test_attach_is_quiet_when_it_is_there_and_becomes_part_of_the_spec(disks: Bench) -> None:
    uuid = disks.start(WAITS).uuid
    disk = DiskSpec("xvdb", disks.image())
    first = disks.toolstack.attach_disk(uuid, disk)
    assert first.size_bytes == MIB and first.state in (DeviceState.CONNECTING, DeviceState.CONNECTED)
    assert disks.toolstack.attach_disk(uuid, disk).id == "xvdb"
    assert disks.toolstack.get_spec(uuid).disks == (disk,)
    refused(DeviceExists, disks, uuid, dataclasses.replace(disk, readonly=True))
    disks.toolstack.reset(uuid)
    assert [device.id for device in disks.toolstack.list_devices(uuid)] == ["xvdb"]


def test_detach_by_force_leaves_nothing(disks: Bench) -> None:
    uuid = disks.start(WAITS).uuid
    disk = DiskSpec("xvda", disks.image())
    disks.toolstack.attach_disk(uuid, disk)
    disks.toolstack.detach_device(uuid, "disk", "xvda", 0.2, force=True)
    assert disks.toolstack.list_devices(uuid) == [] and disks.toolstack.get_spec(uuid).disks == ()
    disks.toolstack.detach_device(uuid, "disk", "xvda", 0.2)  # no effect if there is none
    # The image is free for another domain.
    other = disks.toolstack.create(disks.spec(disks=(disk,)))
    assert len(disks.toolstack.list_devices(other.uuid)) == 1


def test_a_paused_guest_cannot_let_go(disks: Bench) -> None:
    info = disks.toolstack.create(disks.spec(disks=(DiskSpec("xvda", disks.image()),)))
    try:
        disks.toolstack.detach_device(info.uuid, "disk", "xvda", 0.2)
    except OperationTimeout as exc:
        assert_readable(exc)
        assert [device.id for device in disks.toolstack.list_devices(info.uuid)] == ["xvda"]
    else:  # a front end that never came up has nothing to let go of
        assert disks.toolstack.list_devices(info.uuid) == []


def test_disks_that_cannot_be(disks: Bench, tmp_path: Path) -> None:
    uuid, image = disks.start(WAITS).uuid, disks.image()
    good = DiskSpec("xvdb", image)
    disks.toolstack.attach_disk(uuid, good)
    for error, disk in (
        (SpecInvalid, dataclasses.replace(good, id="sda", path=disks.image())),
        (SpecInvalid, dataclasses.replace(good, id="xvdc", path="relative")),
        (ImageInvalid, dataclasses.replace(good, id="xvdc", path=f"{image}.missing")),
        (ImageInvalid, dataclasses.replace(good, id="xvdc", path=str(Path(image).parent))),
        (ImageInvalid, dataclasses.replace(good, id="xvdc", path=disks.image(), format=DiskFormat.QCOW2)),
    ):
        refused(error, disks, uuid, disk)


def test_an_image_is_one_domains(disks: Bench) -> None:
    image = disks.image()
    first, second = disks.start(WAITS).uuid, disks.start(WAITS).uuid
    disks.toolstack.attach_disk(first, DiskSpec("xvda", image))
    refused(ImageInUse, disks, second, DiskSpec("xvda", image))
    refused(ImageInUse, disks, second, DiskSpec("xvda", image, readonly=True))
    disks.refused(ImageInUse, disks.spec(disks=(DiskSpec("xvda", image),)))
    disks.toolstack.destroy(first)
    assert disks.toolstack.attach_disk(second, DiskSpec("xvda", image)).id == "xvda"


def test_a_shared_image_is_many_domains(disks: Bench) -> None:
    image = disks.image()
    for _ in range(2):
        disks.toolstack.attach_disk(disks.start(WAITS).uuid, DiskSpec("xvda", image, readonly=True, shared=True))


def test_a_create_that_fails_leaves_nothing(disks: Bench) -> None:
    image = disks.image()
    disks.refused(ImageInvalid, disks.spec(disks=(DiskSpec("xvda", image), DiskSpec("xvdb", f"{image}.missing"))))
    disks.refused(SpecInvalid, disks.spec(disks=(DiskSpec("xvda", image), DiskSpec("xvda", disks.image()))))
    assert disks.toolstack.create(disks.spec(disks=(DiskSpec("xvda", image),))).uuid


def test_a_disk_grows_and_never_shrinks(growing: Bench) -> None:
    image = growing.image()
    uuid = growing.start(WAITS, disks=(DiskSpec("xvda", image),)).uuid
    assert growing.toolstack.resize_disk(uuid, "xvda", 2 * MIB).size_bytes == 2 * MIB
    assert Path(image).stat().st_size == 2 * MIB
    assert growing.toolstack.resize_disk(uuid, "xvda", 2 * MIB).size_bytes == 2 * MIB
    for size in (MIB, 0, -512, 2 * MIB + 1, 1 << 50):
        with pytest.raises(SpecInvalid) as caught:
            growing.toolstack.resize_disk(uuid, "xvda", size)
        assert_readable(caught.value)
    with pytest.raises(DeviceNotFound):
        growing.toolstack.resize_disk(uuid, "xvdb", 4 * MIB)
    with pytest.raises(DomainNotFound):
        growing.toolstack.resize_disk(NOBODY, "xvda", 4 * MIB)
    assert Path(image).stat().st_size == 2 * MIB


def test_a_read_only_disk_does_not_grow(growing: Bench) -> None:
    uuid = growing.start(WAITS, disks=(DiskSpec("xvda", growing.image(), readonly=True),)).uuid
    with pytest.raises(SpecInvalid):
        growing.toolstack.resize_disk(uuid, "xvda", 2 * MIB)


def test_devices_of_what_has_ended(disks: Bench) -> None:
    disk = DiskSpec("xvda", disks.image())
    info = disks.start(POWEROFF, on_poweroff=OnEvent.PRESERVE, disks=(disk,))
    disks.toolstack.wait(info.uuid, frozenset({DomainState.SHUTDOWN}), disks.kit.boot_timeout)
    assert [device.id for device in disks.toolstack.list_devices(info.uuid)] == ["xvda"]
    for call in (
        lambda: disks.toolstack.detach_device(info.uuid, "disk", "xvda", 5.0, force=True),
        lambda: disks.toolstack.attach_disk(info.uuid, DiskSpec("xvdb", disks.image())),
        lambda: disks.toolstack.attach_nic(info.uuid, NicSpec(0, MAC)),
    ):
        with pytest.raises(WrongState) as caught:
            call()
        assert_readable(caught.value)
    assert disks.toolstack.get_spec(info.uuid).disks == (disk,)


def test_devices_of_nobody(disks: Bench) -> None:
    for call in (
        lambda: disks.toolstack.list_devices(NOBODY),
        lambda: disks.toolstack.attach_disk(NOBODY, DiskSpec("xvda", disks.image())),
        lambda: disks.toolstack.attach_nic(NOBODY, NicSpec(0, MAC)),
        lambda: disks.toolstack.detach_device(NOBODY, "disk", "xvda", 0.1),
    ):
        with pytest.raises(DomainNotFound):
            call()


def test_nics_come_and_go(nics: Bench) -> None:
    uuid = nics.start(WAITS, nics=(NicSpec(0, MAC),)).uuid
    second = NicSpec(1, MAC[:-1] + "2", addresses=("192.0.2.5",))
    nics.toolstack.attach_nic(uuid, second)
    assert [(device.kind, device.id) for device in nics.toolstack.list_devices(uuid)] == [("nic", "0"), ("nic", "1")]
    nics.toolstack.detach_device(uuid, "nic", "0", 0.2, force=True)
    assert nics.toolstack.get_spec(uuid).nics == (second,)


def test_nics_that_cannot_be(nics: Bench) -> None:
    first = nics.start(WAITS, nics=(NicSpec(0, MAC),)).uuid
    second = nics.start(WAITS).uuid
    refused(DeviceExists, nics, second, NicSpec(0, MAC))
    refused(DeviceExists, nics, first, NicSpec(0, MAC[:-1] + "2"))
    refused(SpecInvalid, nics, second, NicSpec(8, MAC[:-1] + "2"))
    refused(SpecInvalid, nics, second, NicSpec(0, "01:00:5e:00:00:01"))
    refused(NetworkUnknown, nics, second, NicSpec(0, MAC[:-1] + "2", network="moon"))
    nics.refused(DeviceExists, nics.spec(nics=(NicSpec(0, MAC),)))
    nics.refused(NetworkUnknown, nics.spec(nics=(NicSpec(0, MAC[:-1] + "2", network="moon"),)))
    nics.toolstack.destroy(first)
    nics.toolstack.attach_nic(second, NicSpec(0, MAC))


def test_what_is_attached_survives_the_host_process(disks: Bench) -> None:
    disks.needs(Capability.ADOPTION)
    assert disks.kit.restart_host is not None
    uuid = disks.start(WAITS).uuid
    disk = DiskSpec("xvda", disks.image())
    disks.toolstack.attach_disk(uuid, disk)
    disks.kit.restart_host()
    assert disks.toolstack.get_spec(uuid).disks == (disk,)
    disks.until(lambda: [d.id for d in disks.toolstack.list_devices(uuid)] == ["xvda"], "the disk to be there again")
