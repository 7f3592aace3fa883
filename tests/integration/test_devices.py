"""Disks of scripted guests: xenbus, driver processes and their ends, all real; the test is the front end."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "support"))
from host_rig import HostRig, alive, kill_process, until
from xs_client import XsClient

from hypervisor.errors import DeviceExists, ImageInUse, ImageInvalid, OperationTimeout, SpecInvalid, WrongState
from hypervisor.toolstack.api import DomainState
from hypervisor.toolstack.devices import DeviceInfo, DeviceState, DiskSpec, NicSpec
from hypervisor.toolstack.drivers.embedded import EmbeddedToolstack


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HostRig]:
    made = HostRig(tmp_path_factory.mktemp("devices")).start()
    yield made
    made.stop()


@pytest.fixture
def toolstack(rig: HostRig) -> Iterator[EmbeddedToolstack]:
    made = rig.connect()
    yield made
    for info in made.list_domains():
        made.destroy(info.uuid)
    assert rig.left_behind() == []
    made.close()


class Front:
    """A disk's front end, and what its driver noted."""

    def __init__(self, rig: HostRig, toolstack: EmbeddedToolstack, uuid: str, disk: DiskSpec) -> None:
        self.rig, self.toolstack, self.uuid, self.disk = rig, toolstack, uuid, disk
        self.xs = XsClient(rig.state / "xenstored.sock")

    @property
    def domid(self) -> int:
        return self.toolstack.get_domain(self.uuid).domid

    @property
    def front(self) -> str:
        return f"/local/domain/{self.domid}/device/vbd/{self.disk.devid}"

    @property
    def back(self) -> str:
        return f"/local/domain/0/backend/vbd/{self.domid}/{self.disk.devid}"

    def state(self, value: int, ring: str | None = None) -> None:
        if ring is not None:
            self.xs.write(f"{self.front}/ring-ref", ring)
        self.xs.write(f"{self.front}/state", str(value))

    def until_back(self, *values: int) -> None:
        wanted = {str(value) for value in values}
        until(lambda: self.xs.read(f"{self.back}/state") in wanted, f"back end state {wanted}")

    def connect(self, ring: str = "8") -> None:
        self.until_back(2)
        self.state(3, ring)
        self.until_back(4)
        self.state(4)

    def info(self) -> DeviceInfo:
        return next(info for info in self.toolstack.list_devices(self.uuid) if info.id == self.disk.id)

    def until_state(self, state: DeviceState) -> DeviceInfo:
        until(lambda: self.info().state is state, f"the disk to be {state}")
        return self.info()

    def notes(self) -> list[dict[str, Any]]:
        lines = Path(self.disk.path).read_text().splitlines()
        return [json.loads(line) for line in lines]

    def pid(self) -> int:
        return int(self.notes()[-1]["pid"])


def image(rig: HostRig, name: str = "image", sectors: int = 2048) -> str:
    path = rig.folder / f"{name}.{sectors}"
    path.touch()
    return str(path)


Make = Callable[..., Front]


@pytest.fixture
def make(rig: HostRig, toolstack: EmbeddedToolstack) -> Make:
    def made(script: str = "print hello", **fields: Any) -> Front:
        disk = DiskSpec("xvda", image(rig, f"image{time.monotonic_ns()}"))
        spec = rig.spec(script, disks=(disk,), **fields)
        toolstack.create(spec)
        toolstack.unpause(spec.uuid)
        return Front(rig, toolstack, spec.uuid, disk)

    return made


def test_a_disk_from_the_start(rig: HostRig, toolstack: EmbeddedToolstack, make: Make) -> None:
    disk = make()
    assert disk.info().state is DeviceState.CONNECTING
    domid = disk.domid
    assert disk.xs.perms(disk.front) == f"n{domid},r0"
    assert disk.xs.perms(disk.back) == f"n0,r{domid}"
    assert disk.xs.perms(f"{disk.back}/state") == f"n0,r{domid}"
    assert disk.xs.read(f"{disk.front}/backend") == disk.back
    assert disk.xs.read(f"{disk.back}/frontend") == disk.front
    assert disk.xs.read(f"{disk.front}/virtual-device") == "51712"
    disk.connect()
    assert disk.xs.read(f"{disk.back}/sectors") == "2048"
    info = disk.until_state(DeviceState.CONNECTED)
    assert (info.kind, info.size_bytes, info.stats) == ("disk", 1 << 20, {"read_requests": 3, "restarts": 0})
    assert [note["what"] for note in disk.notes()] == ["connect"]
    pid = disk.pid()
    log = rig.state / "domains" / disk.uuid / "driver-disk.log"
    assert alive(pid) and log.exists()
    toolstack.destroy(disk.uuid)
    assert not alive(pid)
    assert disk.xs.names("/local/domain/0/backend/vbd") == []
    assert rig.left_behind() == []


def test_a_killed_driver_is_replaced_and_told_the_same(make: Make, toolstack: EmbeddedToolstack) -> None:
    disk = make()
    disk.connect("17")
    until(lambda: disk.info().stats["read_requests"] == 3, "the first counters")
    first = disk.pid()
    counted = disk.rig.state / "domains" / disk.uuid / "driver-disk.stats"
    until(lambda: counted.stat().st_size, "the counters to be noted")
    disk.xs.write(f"{disk.front}/ring-ref", "99")  # a guest that changes its mind while it is connected
    kill_process(first)
    until(lambda: len(disk.notes()) == 2, "the next driver")
    info = disk.until_state(DeviceState.CONNECTED)
    assert [(note["what"], note["wish"]) for note in disk.notes()] == [("connect", "17")] * 2
    assert disk.pid() != first
    assert info.stats == {"read_requests": 6, "restarts": 1}
    assert disk.xs.read(f"{disk.back}/state") == "4", "the guest sees nothing of it"


def test_a_driver_that_dies_at_once_is_started_less_often(make: Make) -> None:
    disk = make()
    disk.until_back(2)
    disk.state(3, "explode")
    until(lambda: len(disk.notes()) >= 4, "some attempts")
    begun = time.monotonic()
    before = len(disk.notes())
    until(lambda: len(disk.notes()) > before, "another attempt")
    assert time.monotonic() - begun > 0.2
    # The guest gives up, and does better.
    disk.state(6)
    disk.until_back(6)
    disk.state(1)
    disk.connect("8")
    disk.until_state(DeviceState.CONNECTED)


@pytest.mark.parametrize(
    ("ring", "why"), [("refuse", "ring-ref"), ("broken", "the ring is broken"), ("later", "ran away")]
)
def test_a_device_that_cannot_be_served_is_closed_alone(
    make: Make, toolstack: EmbeddedToolstack, ring: str, why: str
) -> None:
    disk = make()
    toolstack.attach_disk(disk.uuid, other := DiskSpec("xvdb", image(disk.rig, "other")))
    second = Front(disk.rig, toolstack, disk.uuid, other)
    second.connect()
    second.until_state(DeviceState.CONNECTED)
    disk.until_back(2)
    disk.state(3, ring)
    info = disk.until_state(DeviceState.FAILED)
    assert why in info.detail
    error = f"/local/domain/0/error/backend/vbd/{disk.domid}/51712/error"
    assert why in (disk.xs.read(error) or "")
    disk.until_back(5)
    assert second.info().state is DeviceState.CONNECTED
    assert second.info().stats["restarts"] == 0
    # It begins anew.
    disk.state(6)
    disk.until_back(6)
    disk.state(1)
    disk.connect()
    assert disk.until_state(DeviceState.CONNECTED).detail == ""
    assert disk.xs.read(error) is None


def test_a_guest_closes_and_opens_again(make: Make) -> None:
    disk = make()
    disk.connect("1")
    disk.until_state(DeviceState.CONNECTED)
    disk.state(5)
    disk.until_back(5)
    disk.state(6)
    disk.until_back(6)
    assert disk.info().state is DeviceState.CLOSED
    disk.state(1)
    disk.connect("2")
    # A kexec: the new kernel's front end begins without closing.
    disk.state(1)
    disk.connect("3")
    disk.until_state(DeviceState.CONNECTED)
    assert [(n["what"], n.get("wish")) for n in disk.notes()] == [
        ("connect", "1"), ("disconnect", None), ("connect", "2"), ("disconnect", None), ("connect", "3")
    ]  # fmt: skip
    assert len({note["pid"] for note in disk.notes()}) == 1
    assert disk.info().stats == {"read_requests": 9, "restarts": 0}


def test_a_front_end_that_removes_itself(make: Make) -> None:
    disk = make()
    disk.connect()
    disk.until_state(DeviceState.CONNECTED)
    disk.xs.remove(disk.front)
    disk.until_back(6)
    assert disk.notes()[-1]["what"] == "disconnect"


def test_a_front_end_gone_mad_costs_little(make: Make, toolstack: EmbeddedToolstack) -> None:
    disk = make()
    disk.until_back(2)
    other = make()
    values = ["3", "4", "1", "5", "6", "0", "-1", "99999999999", "", "4\x01", "x" * 500, "2", "7", "8"]
    for number in range(3000):
        disk.xs.write(f"{disk.front}/state", values[number % len(values)])
    before = time.monotonic()
    other.connect()
    other.until_state(DeviceState.CONNECTED)
    assert time.monotonic() - before < 10
    for value in (6, 1):
        disk.state(value)
        until(lambda: disk.xs.read(f"{disk.back}/state") in ("2", "6"), "the back end to calm down", 60)
    disk.until_back(2)
    disk.connect()
    disk.until_state(DeviceState.CONNECTED)
    assert len(disk.notes()) < 600


def test_attach_and_detach(rig: HostRig, make: Make, toolstack: EmbeddedToolstack) -> None:
    first = make()
    disk = DiskSpec("xvdc", image(rig, "hot"))
    info = toolstack.attach_disk(first.uuid, disk)
    assert (info.id, info.state) == ("xvdc", DeviceState.CONNECTING)
    assert toolstack.attach_disk(first.uuid, disk).id == "xvdc", "once more has no effect"
    with pytest.raises(DeviceExists, match="xvdc"):
        toolstack.attach_disk(first.uuid, DiskSpec("xvdc", image(rig, "another")))
    with pytest.raises(ImageInvalid):
        toolstack.attach_disk(first.uuid, DiskSpec("xvdd", "/nonexistent.5"))
    with pytest.raises(SpecInvalid):
        toolstack.attach_disk(first.uuid, DiskSpec("xvdd", disk.path))
    with pytest.raises(ImageInUse):
        toolstack.attach_disk(make().uuid, DiskSpec("xvdd", disk.path))
    hot = Front(rig, toolstack, first.uuid, disk)
    hot.connect()
    hot.until_state(DeviceState.CONNECTED)
    assert [item.id for item in toolstack.get_spec(first.uuid).disks] == ["xvda", "xvdc"]

    with pytest.raises(OperationTimeout, match="held by the guest"):
        toolstack.detach_device(first.uuid, "disk", "xvdc", 0.2)
    assert hot.info().state is DeviceState.CLOSING
    assert hot.xs.read(f"{hot.back}/online") == "0"
    hot.until_back(5)
    assert [note["what"] for note in hot.notes()] == ["connect"], "it is served as long as it is held"
    with pytest.raises(DeviceExists):
        toolstack.attach_disk(first.uuid, disk)
    hot.state(6)
    toolstack.detach_device(first.uuid, "disk", "xvdc", 10)
    assert [note["what"] for note in hot.notes()] == ["connect", "disconnect"]
    assert hot.xs.read(f"{hot.back}/state") is None and hot.xs.read(f"{hot.front}/state") is None
    assert [item.id for item in toolstack.get_spec(first.uuid).disks] == ["xvda"]
    toolstack.detach_device(first.uuid, "disk", "xvdc", 1)

    toolstack.attach_disk(first.uuid, disk)
    toolstack.detach_device(first.uuid, "disk", "xvdc", 5)  # no front end had taken it up
    toolstack.attach_disk(first.uuid, disk)
    hot.connect()
    hot.until_state(DeviceState.CONNECTED)
    toolstack.detach_device(first.uuid, "disk", "xvdc", 0.1, force=True)
    assert hot.xs.read(f"{hot.back}/state") is None
    assert [item.id for item in toolstack.list_devices(first.uuid)] == ["xvda"]


def test_create_with_a_device_that_cannot_be_opened_leaves_nothing(rig: HostRig, toolstack: EmbeddedToolstack) -> None:
    good = DiskSpec("xvda", image(rig, "good"))
    with pytest.raises(ImageInvalid):
        toolstack.create(rig.spec("print hello", disks=(good, DiskSpec("xvdb", "/nonexistent.1"))))
    assert rig.left_behind() == []
    toolstack.create(rig.spec("print hello", disks=(good,)))  # nobody holds it


def test_a_mac_is_one_domains(rig: HostRig, toolstack: EmbeddedToolstack) -> None:
    nic = NicSpec(0, "00:16:3e:00:00:01")
    spec = rig.spec("print hello", nics=(nic,))
    toolstack.create(spec)
    with pytest.raises(DeviceExists, match="00:16:3e:00:00:01"):
        toolstack.create(rig.spec("print hello", nics=(nic,)))
    other = rig.spec("print hello")
    toolstack.create(other)
    with pytest.raises(DeviceExists):
        toolstack.attach_nic(other.uuid, nic)
    toolstack.destroy(spec.uuid)
    assert toolstack.attach_nic(other.uuid, nic).kind == "nic"


def test_resize_of_a_disk(make: Make, toolstack: EmbeddedToolstack) -> None:
    disk = make()
    disk.connect()
    disk.until_state(DeviceState.CONNECTED)
    assert toolstack.resize_disk(disk.uuid, "xvda", 2 << 20).size_bytes == 2 << 20
    assert disk.xs.read(f"{disk.back}/sectors") == "4096"
    assert disk.notes()[-1] == {**disk.notes()[-1], "what": "update", "size": 2 << 20}
    with pytest.raises(SpecInvalid):
        toolstack.resize_disk(disk.uuid, "xvda", 1 << 20)
    kill_process(disk.pid())
    until(lambda: disk.notes()[-1]["what"] == "connect", "the next driver")
    assert disk.notes()[-1]["size"] == 2 << 20


def test_a_reboot_keeps_what_was_attached(rig: HostRig, make: Make, toolstack: EmbeddedToolstack) -> None:
    disk = make()
    disk.connect()
    toolstack.attach_disk(disk.uuid, DiskSpec("xvdb", image(rig, "more")))
    old, pid = disk.domid, disk.pid()
    toolstack.reset(disk.uuid)
    assert disk.domid != old
    assert not alive(pid)
    assert disk.xs.names(f"/local/domain/0/backend/vbd/{old}") == []
    disk.connect()
    disk.until_state(DeviceState.CONNECTED)
    assert [item.id for item in toolstack.list_devices(disk.uuid)] == ["xvda", "xvdb"]


def test_a_killed_host_process_and_its_disks(rig: HostRig, make: Make, toolstack: EmbeddedToolstack) -> None:
    disk, waiting = make(), make()
    disk.connect("5")
    disk.until_state(DeviceState.CONNECTED)
    counted = rig.state / "domains" / disk.uuid / "driver-disk.stats"
    until(lambda: counted.stat().st_size, "the counters to be noted")
    first = disk.pid()
    rig.kill()
    assert alive(first), "the guest's disk goes on without the host process"
    rig.start()
    disk.xs = XsClient(rig.state / "xenstored.sock")
    waiting.xs = XsClient(rig.state / "xenstored.sock")
    info = disk.until_state(DeviceState.CONNECTED)
    assert not alive(first)
    assert [(note["what"], note["wish"]) for note in disk.notes()] == [("connect", "5")] * 2
    assert info.stats == {"read_requests": 6, "restarts": 1}
    assert disk.xs.read(f"{disk.back}/state") == "4"
    waiting.connect()
    waiting.until_state(DeviceState.CONNECTED)
    pid = disk.pid()
    toolstack.destroy(disk.uuid)
    assert not alive(pid)


def test_a_domain_that_died_with_the_host_process_leaves_no_driver(
    rig: HostRig, make: Make, toolstack: EmbeddedToolstack
) -> None:
    disk = make()
    disk.connect()
    disk.until_state(DeviceState.CONNECTED)
    driver = disk.pid()
    rig.kill()
    kill_process(rig.process_of(disk.uuid))
    rig.start()
    until(lambda: toolstack.get_domain(disk.uuid).state is DomainState.CRASHED, "the crash to be seen")
    until(lambda: not alive(driver), "the driver to be ended")
    toolstack.destroy(disk.uuid)


def test_devices_of_a_guest_that_has_ended(make: Make, toolstack: EmbeddedToolstack) -> None:
    disk = make("await\ncrash")
    disk.connect()
    disk.until_state(DeviceState.CONNECTED)
    os.kill(disk.rig.process_of(disk.uuid), signal.SIGUSR1)
    until(lambda: toolstack.get_domain(disk.uuid).state is DomainState.CRASHED, "the crash")
    disk.until_state(DeviceState.CLOSED)
    assert disk.notes()[-1]["what"] == "disconnect"
    with pytest.raises(WrongState):
        toolstack.detach_device(disk.uuid, "disk", "xvda", 1)


def test_replacing_drivers_leaves_nothing_behind(rig: HostRig, make: Make, toolstack: EmbeddedToolstack) -> None:
    disk = make()
    disk.connect()
    disk.until_state(DeviceState.CONNECTED)
    zygote = int(dict(toolstack.host_info().detail)["zygote_pid"])

    def descriptors() -> list[int]:
        return [len(list(Path(f"/proc/{pid}/fd").iterdir())) for pid in (rig.pid, zygote, rig.process_of(disk.uuid))]

    before, children = descriptors(), len(rig.children(zygote))
    for number in range(1, 7):
        kill_process(disk.pid())
        until(lambda n=number: len(disk.notes()) == n + 1, "the next driver")
    disk.until_state(DeviceState.CONNECTED)
    until(lambda: descriptors() == before, f"as many descriptors as before: {before}, {descriptors()}")
    assert len(rig.children(zygote)) == children
    assert disk.info().stats["restarts"] == 6


def test_a_driver_without_its_zygote(make: Make, toolstack: EmbeddedToolstack) -> None:
    disk = make()
    disk.connect()
    disk.until_state(DeviceState.CONNECTED)
    zygote = int(dict(toolstack.host_info().detail)["zygote_pid"])
    kill_process(zygote)
    first = disk.pid()
    assert alive(first)
    kill_process(first)
    until(lambda: len(disk.notes()) == 2, "a driver of another zygote")
    disk.until_state(DeviceState.CONNECTED)
    assert int(dict(toolstack.host_info().detail)["zygote_pid"]) != zygote
    until(lambda: not Path(f"/proc/{first}").exists(), "the dead driver to be reaped")
