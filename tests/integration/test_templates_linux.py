"""Debian's kernel as a template: domains that begin from it run at once, each with a MAC and a disk of its own.

The guest works while it suspends, on its memory and its disk, and so do all that begin from it.
"""

from __future__ import annotations

import dataclasses
import re
import shutil
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))
from host_rig import until
from net_guests import Guest, build_net_image, build_netload, net_host

from hypervisor.devices.block.image import overlay
from hypervisor.toolstack.api import DomainState, Toolstack
from hypervisor.toolstack.devices import DeviceState, DiskFormat, DiskSpec, NicSpec

pytestmark = [
    pytest.mark.timeout(600),
    pytest.mark.skipif(shutil.which("qemu-storage-daemon") is None, reason="apt-get install qemu-utils"),
]
MIB = 1 << 20
CLONES = 2
TROUBLE = re.compile(rb"I/O error|WARNING:|BUG:|Call Trace|WORK-BAD|Oops|rcu_sched|soft lockup")

WORK = """#!/bin/busybox sh
# Checks what it knows by heart, again and again; says how often in /tmp/rounds.
dd if=/dev/urandom of=/tmp/data bs=64k count=16 2>/dev/null
sum=$(sha256sum </tmp/data)
dd if=/tmp/data of=/dev/xvda bs=64k conv=fsync 2>/dev/null
n=0
while true; do
    [ "$(sha256sum </tmp/data)" = "$sum" ] || echo WORK-BAD memory >/dev/hvc0
    echo 3 >/proc/sys/vm/drop_caches
    [ "$(dd if=/dev/xvda bs=64k count=16 2>/dev/null | sha256sum)" = "$sum" ] || echo WORK-BAD disk >/dev/hvc0
    dd if=/tmp/data of=/dev/xvda bs=64k seek=16 conv=fsync 2>/dev/null || echo WORK-BAD write >/dev/hvc0
    n=$((n + 1))
    echo $n >/tmp/rounds.new && mv /tmp/rounds.new /tmp/rounds
done
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("host")


@pytest.fixture(scope="module")
def toolstack(folder: Path) -> Iterator[Toolstack]:
    with net_host(folder, ["lan internal"], memory_mib=1024) as made:
        yield made


@pytest.fixture
def template(toolstack: Toolstack, folder: Path, tmp_path: Path) -> Iterator[str]:
    """Of a guest that is at work."""
    work = tmp_path / "work"
    work.write_text(WORK)
    work.chmod(0o755)
    modules = ("drivers/net/xen-netfront.ko", "drivers/block/xen-blkfront.ko")
    image = build_net_image(tmp_path, build_netload(tmp_path), modules, [(work, "bin/work")])
    disk = folder / "images" / "disk.img"
    disk.parent.mkdir(exist_ok=True)
    with disk.open("wb") as file:
        file.truncate(16 * MIB)
    guest = Guest(toolstack, image, [nic(1)], 128, disks=(DiskSpec("xvda", str(disk)),))
    guest.booted().address("10.9.0.1/24")
    guest.run("(work >/dev/null 2>&1 &)")
    guest.run("until [ -s /tmp/rounds ]; do usleep 100000; done", 120)
    guest.console.close()
    toolstack.template_create(guest.uuid, "base", ident="base")
    yield "base"
    for info in toolstack.list_domains():
        toolstack.destroy(info.uuid)
    toolstack.template_remove("base")


def nic(number: int) -> NicSpec:
    return NicSpec(0, f"00:16:3e:00:00:{number:02x}", network="lan")


def begun(toolstack: Toolstack, template: str, number: int, folder: Path) -> Guest:
    known, ident = toolstack.template_get(template).spec, str(uuid.uuid4())
    path = folder / "images" / f"{ident}.qcow2"
    overlay.create(path, known.disks[0].path, "raw")
    disk = dataclasses.replace(known.disks[0], path=str(path), format=DiskFormat.QCOW2)
    spec = dataclasses.replace(
        known, uuid=ident, name=f"c{number}", owner="tests", disks=(disk,), nics=(nic(number + 1),)
    )
    toolstack.clone(template, spec)
    return Guest.joined(toolstack, ident)


def rounds(guest: Guest) -> int:
    found = re.search(r"ROUNDS (\d+)", guest.run('echo "ROUNDS" $(cat /tmp/rounds)'))
    assert found is not None
    return int(found[1])


def test_domains_work_on_from_a_template(toolstack: Toolstack, template: str, folder: Path) -> None:
    base = Path(toolstack.template_get(template).spec.disks[0].path)
    before = base.read_bytes()
    guests = [begun(toolstack, template, number, folder) for number in range(1, CLONES + 1)]
    for number, guest in enumerate(guests, 1):
        counted = rounds(guest)
        until(lambda guest=guest, counted=counted: rounds(guest) > counted, "more rounds of work", 120)
        until(
            lambda guest=guest: all(
                device.state is DeviceState.CONNECTED for device in toolstack.list_devices(guest.uuid)
            ),
            "its devices to be connected",
        )
        assert nic(number + 1).mac in guest.run("cat /sys/class/net/eth0/address")
        guest.run(f"ip addr flush dev eth0; ip addr add 10.9.0.{number + 1}/24 dev eth0 && ip link set eth0 up")
        guest.run(f"echo own {number} | dd of=/dev/xvda bs=512 seek=20000 conv=fsync 2>/dev/null")
    guests[0].run("n=0; until ping -c 1 -W 1 10.9.0.3 >/dev/null || [ $n -gt 30 ]; do n=$((n+1)); done; "
                  "ping -c 2 -W 5 10.9.0.3")  # fmt: skip
    for number, guest in enumerate(guests, 1):
        assert f"own {number}" in guest.run("dd if=/dev/xvda bs=512 skip=20000 count=1 2>/dev/null | head -1")
        log = toolstack.console_log(guest.uuid, 1 << 20)
        assert not TROUBLE.search(log), log[-3000:].decode(errors="replace")
        guest.console.close()
    assert base.read_bytes() == before, "nobody writes to the image below"
    assert {info.state for info in toolstack.list_domains()} == {DomainState.RUNNING}
