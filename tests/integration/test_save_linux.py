"""Debian's kernel saved and restored: with one and four vCPUs, ballooned, with a disk and a nic, while it works.

Its work has checksums: of memory, of what it wrote to its disk, of what it reads from there. With REEVE_XEN_TREE naming
a source tree of Xen its own checker looks at the images.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))
import xen_tree
from net_guests import Guest, build_net_image, build_netload, net_host

from agent.api import Host, JsonDict, NoPeers, Plugin
from agent.cli.local import NoClaims, NoImages
from agent.context import StepContext
from agent.images import Image
from agent.images.remote.disks import Disks
from hypervisor.toolstack.api import DomainState, Toolstack
from hypervisor.toolstack.devices import DeviceState, DiskSpec, NicSpec
from plugins.revert import Revert
from plugins.snapshot import Snapshot

pytestmark = pytest.mark.timeout(1200)
MIB = 1 << 20
TROUBLE = re.compile(rb"I/O error|WARNING:|BUG:|Call Trace|WORK-BAD|Oops|rcu_sched|soft lockup")

WORK = """#!/bin/busybox sh
# Checks what it knows by heart, again and again; says how often in /tmp/rounds.
dd if=/dev/urandom of=/tmp/data bs=64k count=64 2>/dev/null
sum=$(sha256sum </tmp/data)
[ -b /dev/xvda ] && dd if=/tmp/data of=/dev/xvda bs=64k conv=fsync 2>/dev/null
n=0
while true; do
    [ "$(sha256sum </tmp/data)" = "$sum" ] || echo WORK-BAD memory >/dev/hvc0
    if [ -b /dev/xvda ]; then
        echo 3 >/proc/sys/vm/drop_caches
        [ "$(dd if=/dev/xvda bs=64k count=64 2>/dev/null | sha256sum)" = "$sum" ] || echo WORK-BAD disk >/dev/hvc0
        dd if=/tmp/data of=/dev/xvda bs=64k seek=64 conv=fsync 2>/dev/null || echo WORK-BAD write >/dev/hvc0
    fi
    n=$((n + 1))
    echo $n >/tmp/rounds.new && mv /tmp/rounds.new /tmp/rounds
done
"""


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Image:
    folder = tmp_path_factory.mktemp("image")
    work = folder / "work"
    work.write_text(WORK)
    work.chmod(0o755)
    modules = ("drivers/net/xen-netfront.ko", "drivers/block/xen-blkfront.ko")
    return build_net_image(folder, build_netload(folder), modules, [(work, "bin/work")])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("host")


@pytest.fixture(scope="module")
def toolstack(folder: Path) -> Iterator[Toolstack]:
    with net_host(folder, ["lan internal"], memory_mib=1536, options=["cpus = 4"]) as made:
        yield made


def nic(number: int) -> NicSpec:
    return NicSpec(0, f"00:16:3e:00:00:{number:02x}", network="lan")


def working(guest: Guest, number: int) -> Guest:
    """Booted, with an address, and at work."""
    guest.booted().address(f"10.9.0.{number}/24")
    guest.run("(work >/dev/null 2>&1 &)")
    guest.run("until [ -s /tmp/rounds ]; do usleep 100000; done", 120)
    return guest


@pytest.fixture(scope="module")
def small(toolstack: Toolstack, image: Image, folder: Path) -> Iterator[Guest]:
    """One vCPU, a disk, and part of its memory given back."""
    path = folder / "images" / "disk.img"
    path.parent.mkdir(exist_ok=True)
    with path.open("wb") as file:
        file.truncate(16 * MIB)
    guest = Guest(toolstack, image, [nic(1)], 192, disks=(DiskSpec("xvda", str(path)),))
    try:
        working(guest, 1)
        toolstack.set_memory(guest.uuid, 160)
        _until(lambda: toolstack.get_domain(guest.uuid).memory_mib <= 160, "the balloon")
        yield guest
    finally:
        guest.destroy()


@pytest.fixture(scope="module")
def large(toolstack: Toolstack, image: Image) -> Iterator[Guest]:
    """Four vCPUs."""
    guest = Guest(toolstack, image, [nic(2)], 256, vcpus=4)
    try:
        yield working(guest, 2)
    finally:
        guest.destroy()


def _until(ready: object, what: str, seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while not ready():  # type: ignore[operator]
        assert time.monotonic() < end, f"waited too long for {what}"
        time.sleep(0.1)  # a poll with a deadline


def rounds(guest: Guest) -> int:
    found = re.search(r"ROUNDS (\d+)", guest.run('echo "ROUNDS" $(cat /tmp/rounds)'))
    assert found is not None
    return int(found[1])


def goes_on(guest: Guest) -> None:
    """It works on, has no complaint, and its devices are connected."""
    before = rounds(guest)
    _until(lambda: rounds(guest) > before + 1, "more rounds of work")
    _until(
        lambda: all(d.state is DeviceState.CONNECTED for d in guest.toolstack.list_devices(guest.uuid)),
        "its devices to be connected",
    )
    log = guest.toolstack.console_log(guest.uuid, 1 << 20)
    assert not TROUBLE.search(log), log[-3000:].decode(errors="replace")


def seconds_of(guest: Guest, what: str) -> float:
    found = re.search(r"CLOCK ([0-9.]+)", guest.run(f"echo CLOCK $({what})"))
    assert found is not None
    return float(found[1])


def save(guest: Guest, folder: Path, *, keep_running: bool = False) -> str:
    path = str(folder / f"{uuid.uuid4()}.save")
    saved = guest.toolstack.save(guest.uuid, path, keep_running=keep_running)
    assert saved.pages > 30000 and saved.bytes == os.path.getsize(path) > saved.pages * 4096
    if not xen_tree.missing():
        assert "64bit guest" in xen_tree.verify(path)
    return path


def through_a_file(guest: Guest, folder: Path) -> None:
    path = save(guest, folder)
    restored = guest.toolstack.restore(path, owner="tests")
    assert restored.state is DomainState.PAUSED
    guest.reconnect()
    guest.toolstack.unpause(guest.uuid)
    os.unlink(path)


@pytest.mark.parametrize("which", ["small", "large"])
def test_it_works_on(request: pytest.FixtureRequest, tmp_path: Path, small: Guest, large: Guest, which: str) -> None:
    guest = request.getfixturevalue(which)
    other, address = (large, "10.9.0.1") if which == "small" else (small, "10.9.0.2")
    before = guest.toolstack.get_domain(guest.uuid)
    uptime = seconds_of(guest, "cut -d' ' -f1 /proc/uptime")
    for _ in range(2):
        through_a_file(guest, tmp_path)
        goes_on(guest)
    after = guest.toolstack.get_domain(guest.uuid)
    assert (after.vcpus, after.memory_mib, after.max_memory_mib) == (
        before.vcpus, before.memory_mib, before.max_memory_mib,
    )  # fmt: skip
    assert after.domid != before.domid
    assert f"\n{before.vcpus}\r\n" in guest.run("nproc")
    assert abs(seconds_of(guest, "date +%s") - time.time()) < 10
    assert 0 < seconds_of(guest, "cut -d' ' -f1 /proc/uptime") - uptime < 600
    other.run(f"n=0; until ping -c 1 -W 1 {address} >/dev/null || [ $n -gt 30 ]; do n=$((n+1)); done; "
              f"ping -c 3 -W 5 {address}")  # fmt: skip


def test_a_checkpoint_disturbs_nobody(small: Guest, tmp_path: Path) -> None:
    path = save(small, tmp_path, keep_running=True)
    goes_on(small)
    small.toolstack.destroy(small.uuid)
    small.toolstack.restore(path, owner="tests")
    small.reconnect()
    small.toolstack.unpause(small.uuid)
    goes_on(small)


def test_the_balloon_and_vcpus_still_follow(small: Guest, large: Guest, tmp_path: Path) -> None:
    toolstack = small.toolstack
    through_a_file(small, tmp_path)
    for target in (184, 152):
        toolstack.set_memory(small.uuid, target)
        _until(lambda target=target: toolstack.get_domain(small.uuid).memory_mib == target, f"{target} MiB")
    goes_on(small)
    toolstack.set_vcpus(large.uuid, 2)
    _until(lambda: toolstack.get_domain(large.uuid).vcpus == 2, "two vCPUs")
    through_a_file(large, tmp_path)
    goes_on(large)
    assert toolstack.get_domain(large.uuid).vcpus == 2
    toolstack.set_vcpus(large.uuid, 4)
    large.run("for n in 2 3; do until [ -e /sys/devices/system/cpu/cpu$n/online ]; do usleep 100000; done; "
              "echo 1 >/sys/devices/system/cpu/cpu$n/online || true; done")  # fmt: skip
    _until(lambda: toolstack.get_domain(large.uuid).vcpus == 4, "four vCPUs")
    goes_on(large)


def marked(guest: Guest) -> str:
    """What memory and disk say that was written to both."""
    read = "dd if=/dev/xvda bs=512 skip=30000 count=1 iflag=direct 2>/dev/null | head -c 3"
    found = re.search(r"MARKS (\w+) (\w+)", guest.run(f"echo MARKS $(cat /tmp/mark) $({read})"))
    assert found is not None and found[1] == found[2], found
    return found[1]


def carry_out(plugin: Plugin, args: JsonDict, host: Host) -> JsonDict:
    plan = plugin.plan(args, host)
    ctx = StepContext(host, str(uuid.uuid4()), threading.Event())
    for step in plan.steps:
        ctx.outputs[step.name] = step.run(ctx) or {}
    return plugin.result(args, plan, ctx) or {}


@pytest.mark.skipif(shutil.which("qemu-img") is None, reason="apt-get install qemu-utils")
def test_a_snapshot_of_memory_and_disks(small: Guest, folder: Path) -> None:
    toolstack = small.toolstack
    sources: Any = SimpleNamespace(disks=Disks(folder / "images"))
    owner = toolstack.get_domain(small.uuid).owner
    host = Host("node1", owner, toolstack, NoClaims(), NoImages(), {}, NoPeers(), sources)

    def mark(word: str) -> None:
        small.run(f"echo {word} >/tmp/mark; dd if=/tmp/mark of=/dev/xvda bs=512 seek=30000 conv=sync,fsync 2>/dev/null")
        assert marked(small) == word

    mark("one")
    before = toolstack.get_spec(small.uuid).disks[0].path
    made = carry_out(Snapshot(), {"uuid": small.uuid, "name": "one"}, host)
    image = Path(before).read_bytes()
    small.reconnect()
    mark("two")
    kept = carry_out(Revert(), {"uuid": small.uuid, "name": "one"}, host)["kept_as"]
    small.reconnect()
    assert marked(small) == "one"
    goes_on(small)
    carry_out(Revert(), {"uuid": small.uuid, "name": kept}, host)
    small.reconnect()
    assert marked(small) == "two"
    goes_on(small)
    assert Path(before).read_bytes() == image, "the image below is as it was"
    assert Path(made["disks"]["xvda"]).exists()
