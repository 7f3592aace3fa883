"""Disks of scripted guests: xenbus, driver processes and their ends, all real; the test is the front end."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "support"))
from host_rig import HostRig, alive, until
from xs_client import XsClient

from hypervisor.toolstack.devices import DeviceInfo, DeviceState, DiskSpec
from hypervisor.toolstack.drivers.embedded import EmbeddedToolstack


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[HostRig]:
    made = HostRig(tmp_path / "host").start()
    yield made
    made.stop()


@pytest.fixture
def toolstack(rig: HostRig) -> Iterator[EmbeddedToolstack]:
    made = rig.connect()
    yield made
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
