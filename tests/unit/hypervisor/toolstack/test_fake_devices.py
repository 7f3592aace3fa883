"""The fake driver's devices and resize, beyond the contract: its scripted guests and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hypervisor import errors
from hypervisor.toolstack.api import Capability, DomainSpec, DomainState, KernelBoot, OnEvent
from hypervisor.toolstack.devices import DeviceState, DiskFormat, DiskSpec, NicSpec
from hypervisor.toolstack.drivers.fake import FakeToolstack, create

UUID = "12345678-1234-4234-8234-1234567890ab"
OTHER = UUID[:-1] + "c"
MAC = "00:16:3e:00:00:01"


@pytest.fixture
def host(tmp_path: Path) -> Iterator[FakeToolstack]:
    toolstack = FakeToolstack(str(tmp_path / "state"), cpus=8, memory_mib=1000)
    yield toolstack
    toolstack.close()


@pytest.fixture
def started(host: FakeToolstack, tmp_path: Path) -> Any:
    kernel = tmp_path / "kernel"
    kernel.write_bytes(b"\x7fELF" + bytes(500))

    def make(words: str = "", uuid: str = UUID, **fields: Any) -> str:
        values = {"name": uuid, "memory_mib": 64, "owner": "me", "max_vcpus": 4, "max_memory_mib": 256, **fields}
        host.create(DomainSpec(uuid=uuid, boot=KernelBoot(str(kernel), cmdline=words), **values))
        host.unpause(uuid)
        return uuid

    return make


def image(tmp_path: Path, name: str = "disk.img", size: int = 1 << 20) -> str:
    path = tmp_path / name
    path.write_bytes(bytes(size))
    return str(path)


def test_it_says_what_it_can(host: FakeToolstack) -> None:
    assert {"disk", "nic", "hotplug", "resize", "sysrq", "dump-core"} <= {c.value for c in host.capabilities()}
    assert Capability.HVM not in host.capabilities()


def test_devices_come_and_go_and_survive_another_connection(host: FakeToolstack, started: Any, tmp_path: Path) -> None:
    uuid = started()
    disk, nic = DiskSpec("xvdb", image(tmp_path)), NicSpec(0, MAC)
    assert host.attach_disk(uuid, disk).state is DeviceState.CONNECTED
    host.attach_nic(uuid, nic)
    assert host.attach_disk(uuid, disk).size_bytes == 1 << 20, "the same again is quiet"
    again = FakeToolstack(str(tmp_path / "state"))
    assert [(d.kind, d.id) for d in again.list_devices(uuid)] == [("disk", "xvdb"), ("nic", "0")]
    assert again.get_spec(uuid).disks == (disk,) and again.get_spec(uuid).nics == (nic,)
    for kind, ident in (("disk", "xvdb"), ("nic", "0"), ("nic", "0")):
        again.detach_device(uuid, kind, ident, 0)
    assert host.list_devices(uuid) == []
    again.close()


@pytest.mark.parametrize(
    ("error", "change"),
    [
        (errors.DeviceExists, {"readonly": True}),
        (errors.SpecInvalid, {"id": "xvdc"}),
        (errors.ImageInvalid, {"id": "xvdc", "path": "/nowhere"}),
        (errors.ImageInvalid, {"id": "xvdc", "path": "/dev/null"}),
        (errors.ImageInvalid, {"id": "xvdc", "path": "OTHER", "format": DiskFormat.QCOW2}),
    ],
)
def test_disks_that_cannot_be(
    host: FakeToolstack, started: Any, tmp_path: Path, error: type[Exception], change: dict[str, Any]
) -> None:
    uuid = started()
    fields: dict[str, Any] = {"id": "xvdb", "path": image(tmp_path)}
    host.attach_disk(uuid, DiskSpec(**fields))
    if change.get("path") == "OTHER":
        change = {**change, "path": image(tmp_path, "other.img")}
    before = host.get_spec(uuid)
    with pytest.raises(error):
        host.attach_disk(uuid, DiskSpec(**{**fields, **change}))
    assert host.get_spec(uuid) == before


def test_an_image_belongs_to_one_domain_unless_shared(host: FakeToolstack, started: Any, tmp_path: Path) -> None:
    path = image(tmp_path)
    (tmp_path / "link").symlink_to(path)
    one, two = started(), started(uuid=OTHER)
    host.attach_disk(one, DiskSpec("xvda", path))
    with pytest.raises(errors.ImageInUse, match="in use by domain"):
        host.attach_disk(two, DiskSpec("xvda", str(tmp_path / "link")))
    host.detach_device(one, "disk", "xvda", 0)
    for uuid in (one, two):
        host.attach_disk(uuid, DiskSpec("xvda", path, readonly=True, shared=True))


def test_a_mac_belongs_to_one_domain_and_networks_are_known(host: FakeToolstack, started: Any) -> None:
    one, two = started(), started(uuid=OTHER)
    host.attach_nic(one, NicSpec(0, MAC))
    for uuid, nic in ((two, NicSpec(0, MAC)), (one, NicSpec(1, MAC)), (one, NicSpec(0, MAC[:-1] + "2"))):
        with pytest.raises(errors.DeviceExists):
            host.attach_nic(uuid, nic)
    with pytest.raises(errors.NetworkUnknown, match="give one of default"):
        host.attach_nic(two, NicSpec(0, MAC[:-1] + "3", "moon"))
    assert create({"networks": "blue green"}).networks == {"blue", "green"}


def test_a_guest_that_keeps_a_device(host: FakeToolstack, started: Any, tmp_path: Path) -> None:
    uuid = started("fake.devices=keep", disks=(DiskSpec("xvda", image(tmp_path)),))
    with pytest.raises(errors.OperationTimeout, match="keeps disk xvda"):
        host.detach_device(uuid, "disk", "xvda", 0.01)
    assert [device.state for device in host.list_devices(uuid)] == [DeviceState.CONNECTED]
    host.detach_device(uuid, "disk", "xvda", 0.01, force=True)
    assert host.list_devices(uuid) == []


def test_a_guest_that_takes_no_device_up(host: FakeToolstack, started: Any, tmp_path: Path) -> None:
    uuid = started("fake.devices=ignore")
    assert host.attach_disk(uuid, DiskSpec("xvda", image(tmp_path))).state is DeviceState.CONNECTING


def test_vcpus_and_memory_follow_and_become_part_of_the_spec(host: FakeToolstack, started: Any) -> None:
    uuid = started()
    host.set_vcpus(uuid, 4)
    host.set_memory(uuid, 256)
    info = host.get_domain(uuid)
    assert (info.vcpus, info.max_vcpus, info.memory_mib, info.memory_target_mib, info.max_memory_mib) == (
        4, 4, 256, 256, 256,
    )  # fmt: skip
    host.set_vcpus(uuid, 1)
    host.set_memory(uuid, 32)
    spec = host.get_spec(uuid)
    assert (spec.vcpus, spec.max_vcpus, spec.memory_mib, spec.max_memory_mib) == (1, 4, 32, 256)
    host.reset(uuid)
    assert host.get_domain(uuid).memory_mib == 32 and host.host_info().memory_free_mib == 1000 - 32
    for call, value in ((host.set_vcpus, 5), (host.set_vcpus, 0), (host.set_memory, 257), (host.set_memory, 0)):
        with pytest.raises(errors.SpecInvalid):
            call(uuid, value)


def test_memory_beyond_the_host_s(host: FakeToolstack, started: Any) -> None:
    uuid = started(max_memory_mib=4096)
    with pytest.raises(errors.InsufficientMemory):
        host.set_memory(uuid, 2000)
    assert host.get_domain(uuid).memory_target_mib == 64


def test_guests_that_do_not_follow(host: FakeToolstack, started: Any) -> None:
    keeps = started("fake.memory=keep fake.vcpus=ignore fake.min=48")
    host.set_vcpus(keeps, 3)
    host.set_memory(keeps, 128)
    host.set_memory(keeps, 32)
    info = host.get_domain(keeps)
    assert (info.vcpus, info.memory_mib, info.memory_target_mib) == (1, 128, 32)
    assert host.host_info().memory_free_mib == 1000 - 128, "what it did not give back is not free"
    assert host.stats(keeps)["memory_min_mib"] == 48
    slow = started("fake.memory=slow", uuid=OTHER)
    host.set_memory(slow, 100)
    assert [host.get_domain(slow).memory_mib for _ in range(4)] == [80, 96, 100, 100]


def test_a_disk_grows_and_never_shrinks(host: FakeToolstack, started: Any, tmp_path: Path) -> None:
    path = image(tmp_path)
    uuid = started(disks=(DiskSpec("xvda", path),))
    assert host.resize_disk(uuid, "xvda", 2 << 20).size_bytes == 2 << 20
    assert Path(path).stat().st_size == 2 << 20
    host.resize_disk(uuid, "xvda", 2 << 20)
    for size in (1 << 20, 0, (2 << 20) + 1, 1 << 50):
        with pytest.raises(errors.SpecInvalid):
            host.resize_disk(uuid, "xvda", size)
    with pytest.raises(errors.DeviceNotFound):
        host.resize_disk(uuid, "xvdb", 4 << 20)


def test_redefine_counts_at_the_next_start(host: FakeToolstack, started: Any) -> None:
    uuid = started(on_poweroff=OnEvent.PRESERVE)
    change = {"vcpus": 6, "max_vcpus": 8, "memory_mib": 512, "max_memory_mib": 512, "metadata": {"a": "b"}}
    spec = DomainSpec.from_json(host.get_spec(uuid).to_json() | change)
    host.redefine(uuid, spec)
    info = host.get_domain(uuid)
    assert (info.vcpus, info.max_vcpus, info.memory_mib, info.metadata) == (1, 4, 64, (("a", "b"),))
    host.shutdown(uuid)
    assert host.get_domain(uuid).state is DomainState.SHUTDOWN
    host.reset(uuid)
    info = host.get_domain(uuid)
    assert (info.vcpus, info.max_vcpus, info.memory_mib, info.state) == (6, 8, 512, DomainState.RUNNING)
    for field, value in (("name", "x"), ("owner", "x"), ("vcpus", 9), ("max_vcpus", 32)):
        with pytest.raises((errors.SpecInvalid, errors.InsufficientVcpus)):
            host.redefine(uuid, DomainSpec.from_json(spec.to_json() | {field: value}))


def test_a_restart_without_room_leaves_a_crashed_domain_that_can_be_restarted(
    host: FakeToolstack, started: Any
) -> None:
    uuid = started()
    old = host.get_spec(uuid)
    host.redefine(uuid, DomainSpec.from_json(old.to_json() | {"memory_mib": 2000, "max_memory_mib": 2000}))
    with pytest.raises(errors.InsufficientMemory):
        host.reset(uuid)
    assert host.get_domain(uuid).state is DomainState.CRASHED and host.host_info().memory_free_mib == 1000
    host.redefine(uuid, old)
    host.reset(uuid)
    assert host.get_domain(uuid).state is DomainState.RUNNING


def test_looking_inside(host: FakeToolstack, started: Any, tmp_path: Path) -> None:
    uuid = started(disks=(DiskSpec("xvda", image(tmp_path)),), nics=(NicSpec(0, MAC),))
    host.guest_work(uuid, 5_000, xvda={"read_bytes": 4096}, nic0={"rx_packets": 3})
    stats = host.stats(uuid)
    assert stats["cpu_time_ns"] == host.get_domain(uuid).cpu_time_ns and stats["vcpus"] == 1
    assert stats["devices"][0]["stats"]["read_bytes"] == 4096 and stats["devices"][1]["stats"]["rx_packets"] == 3
    host.sysrq(uuid, "t")
    assert host.console_log(uuid).endswith(b"sysrq: t\r\n")
    for key in ("", "tt", "\n", "ä"):
        with pytest.raises(errors.SpecInvalid):
            host.sysrq(uuid, key)
    core = tmp_path / "core"
    host.dump_core(uuid, str(core))
    assert json.loads(core.read_text())["fake core of"] == uuid and core.stat().st_mode & 0o777 == 0o600
    for path in (str(core), "relative", "/nowhere/core"):
        with pytest.raises((errors.SpecInvalid, errors.HostFailure)):
            host.dump_core(uuid, path)
    assert sorted(p.name for p in tmp_path.iterdir() if "core" in p.name) == ["core"]
