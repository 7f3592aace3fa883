"""Disks of a Debian guest: its own blkfront against our drivers, which are killed while it works.

REEVE_KILLS: how often the driver is killed under load (20; the whole is 100). Needs Debian's packages, a gcc that links
statically and, for qcow2, qemu-utils and qemu-system-common.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import re
import shutil
import signal
import stat
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))
from block_guest import Guest, daemons, guest, make_image, missing, new_disk, reconnect
from host_rig import HostRig, until

from agent.images import Image
from hypervisor.devices.block.image import overlay
from hypervisor.errors import ImageInUse, ImageInvalid, SpecInvalid
from hypervisor.host.settings import REAL_RUNTIME
from hypervisor.toolstack.api import DomainSpec, KernelBoot
from hypervisor.toolstack.devices import DeviceState, DiskFormat, DiskSpec, Limits

KILLS = int(os.environ.get("REEVE_KILLS") or 20)
CYCLES = 20
MIB = 1 << 20
LOAD_SECONDS = 15.0
TROUBLE = re.compile(rb"I/O error|blk_update_request|WARNING:|BUG:|disabled for further use|Call Trace")


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HostRig]:
    made = HostRig(
        tmp_path_factory.mktemp("block"), REAL_RUNTIME, log_level="info", memory_mib=1024, sandbox="required"
    )
    try:
        yield made.start()
    finally:
        made.stop()


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Image:
    return make_image(tmp_path_factory.mktemp("image"))


@pytest.fixture(scope="module")
def debian(rig: HostRig, image: Image) -> Iterator[Guest]:
    """One guest for all tests that leave it whole: a boot takes its time."""
    with guest(rig, image) as made:
        yield made


def need_qemu() -> None:
    for program, package in (("qemu-img", "qemu-utils"), ("qemu-storage-daemon", "qemu-system-common")):
        if shutil.which(program) is None:
            missing(f"{program} is not installed: apt-get install {package}")


def make(rig: HostRig, kind: str, mib: int) -> Path:
    if kind == "raw":
        return new_disk(rig, mib)
    need_qemu()
    base = new_disk(rig, mib)
    path = base.with_suffix(".qcow2")
    overlay.create(path, base, "raw")
    return path


def attach(debian: Guest, path: Path, kind: str = "raw", name: str = "xvdb", **fields: object) -> DiskSpec:
    disk = DiskSpec(id=name, path=str(path), format=DiskFormat(kind), **fields)  # type: ignore[arg-type]
    debian.toolstack.attach_disk(debian.uuid, disk)
    debian.connected(name)
    debian.run(f"until [ -b /dev/{name} ]; do usleep 20000; done")
    return disk


def detach(debian: Guest, name: str = "xvdb") -> None:
    debian.toolstack.detach_device(debian.uuid, "disk", name, 30.0)
    # Linux notices that a device went only if it has not come again meanwhile (xenbus_dev_changed).
    number = DiskSpec(id=name, path="/").devid
    debian.run(f"while [ -e /sys/bus/xen/devices/vbd-{number} ]; do usleep 20000; done")


# -- what a disk is


@pytest.mark.parametrize("kind", ["raw", "qcow2"])
def test_data_and_growth(rig: HostRig, debian: Guest, kind: str) -> None:
    path = make(rig, kind, 32)
    attach(debian, path, kind)
    try:
        said = debian.run("dd if=/dev/urandom of=/tmp/r bs=64k count=64 2>/dev/null; dd if=/tmp/r of=/dev/xvdb bs=256k "
                          "seek=4 conv=fsync 2>/dev/null; sha256sum /tmp/r; cat /sys/block/xvdb/size")  # fmt: skip
        expected = re.search(r"^([0-9a-f]{64}) ", said, re.M)
        assert expected and "\n65536\n" in said, said
        debian.toolstack.resize_disk(debian.uuid, "xvdb", 48 * MIB)
        debian.run("until [ $(cat /sys/block/xvdb/size) = 98304 ]; do usleep 20000; done", 30)
        said = debian.run("dd if=/tmp/r of=/dev/xvdb bs=1M seek=40 conv=fsync; echo 3 >/proc/sys/vm/drop_caches; "
                          "dd if=/dev/xvdb bs=1M skip=40 count=4 | sha256sum")  # fmt: skip
        assert expected[1] in said, said
        with pytest.raises(SpecInvalid, match="smaller"):
            debian.toolstack.resize_disk(debian.uuid, "xvdb", 32 * MIB)
        with pytest.raises(SpecInvalid):
            debian.toolstack.resize_disk(debian.uuid, "xvdb", 48 * MIB + 1)
    finally:
        detach(debian)
    data = as_raw(path, kind)
    assert hashlib.sha256(data[MIB : 5 * MIB]).hexdigest() == expected[1]
    assert hashlib.sha256(data[40 * MIB : 44 * MIB]).hexdigest() == expected[1]
    assert len(data) == 48 * MIB
    until(lambda: not daemons(rig), "the storage daemon to end")


def as_raw(path: Path, kind: str) -> bytes:
    if kind == "raw":
        return path.read_bytes()
    out = path.with_suffix(".out")
    subprocess.run(["qemu-img", "check", "-q", "-f", "qcow2", str(path)], check=True)
    subprocess.run(["qemu-img", "convert", "-f", "qcow2", "-O", "raw", str(path), str(out)], check=True)
    try:
        return out.read_bytes()
    finally:
        out.unlink()


def test_overlays_share_a_base(rig: HostRig, debian: Guest) -> None:
    need_qemu()
    base = new_disk(rig, 16)
    base.write_bytes(b"base" * (4 * MIB))
    overlays = [base.with_suffix(f".{number}.qcow2") for number in range(2)]
    for path in overlays:
        overlay.create(path, base, "raw")
    for path, name in zip(overlays, ("xvdb", "xvdc"), strict=True):
        attach(debian, path, "qcow2", name)
    try:
        debian.run("echo changed | dd of=/dev/xvdb bs=512 conv=notrunc,fsync; echo 3 >/proc/sys/vm/drop_caches")
        assert "changed" in debian.run("dd if=/dev/xvdb bs=8 count=1")
        assert "basebase" in debian.run("dd if=/dev/xvdc bs=8 count=1")
    finally:
        detach(debian, "xvdb")
        detach(debian, "xvdc")
    assert base.read_bytes() == b"base" * (4 * MIB)


def test_readonly_disk(rig: HostRig, debian: Guest) -> None:
    path = new_disk(rig, 4)
    attach(debian, path, readonly=True)
    try:
        said = debian.run(
            "cat /sys/block/xvdb/ro; dd if=/dev/zero of=/dev/xvdb bs=4k count=1 conv=fsync || echo refused"
        )
        assert "\n1\n" in said and "refused" in said
    finally:
        detach(debian)


def test_raw_bytes_are_not_probed(rig: HostRig, debian: Guest) -> None:
    """A guest that writes a qcow2 header with a backing file into its raw disk finds its own bytes there."""
    need_qemu()
    path = make(rig, "qcow2", 4)
    path.write_bytes(path.read_bytes().ljust(4 * MIB, b"\0"))
    attach(debian, path, "raw")
    try:
        assert "QFI" in debian.run("dd if=/dev/xvdb bs=3 count=1")
        assert "\n8192\n" in debian.run("cat /sys/block/xvdb/size")
    finally:
        detach(debian)


@pytest.fixture
def loop_device(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A file of 16 MiB, and the block device that shows it."""
    if os.geteuid() != 0 or shutil.which("losetup") is None:
        pytest.skip("only root makes a loop device, with losetup")
    file = tmp_path / "device.img"
    with file.open("wb") as image:
        image.truncate(16 * MIB)
    made = subprocess.run(["losetup", "--find", "--show", str(file)], capture_output=True, text=True, check=False)
    if made.returncode:
        pytest.skip(f"this machine has no loop devices: {made.stderr}")
    name = made.stdout.strip()
    yield file, name
    subprocess.run(["losetup", "--detach", name], check=True)


@contextlib.contextmanager
def exclusive(name: str) -> Iterator[None]:
    """As a mounted file system has it."""
    fd = os.open(name, os.O_RDONLY | os.O_EXCL)
    try:
        yield
    finally:
        os.close(fd)


@pytest.mark.parametrize("direct", [False, True])
def test_a_block_device(rig: HostRig, debian: Guest, loop_device: tuple[Path, str], direct: bool) -> None:
    file, name = loop_device
    nodes = [rig.state / "images" / f"device-{direct}-{number}" for number in range(2)]
    for node in nodes:
        node.parent.mkdir(parents=True, exist_ok=True)
        os.mknod(node, stat.S_IFBLK | 0o600, os.stat(name).st_rdev)
    attach(debian, nodes[0], direct=direct)
    try:
        with pytest.raises(ImageInUse, match=debian.uuid):
            debian.toolstack.attach_disk(debian.uuid, DiskSpec("xvdc", str(nodes[1])))
        said = debian.run("dd if=/dev/urandom of=/tmp/r bs=64k count=16 2>/dev/null; sha256sum /tmp/r; "
                          "dd if=/tmp/r of=/dev/xvdb bs=256k seek=4 conv=fsync; cat /sys/block/xvdb/size")  # fmt: skip
        expected = re.search(r"^([0-9a-f]{64}) ", said, re.M)
        assert expected and "\n32768\n" in said, said
        with pytest.raises(ImageInvalid, match="make the block device larger first"):
            debian.toolstack.resize_disk(debian.uuid, "xvdb", 24 * MIB)
        os.truncate(file, 24 * MIB)
        subprocess.run(["losetup", "--set-capacity", name], check=True)
        debian.toolstack.resize_disk(debian.uuid, "xvdb", 24 * MIB)
        debian.run("until [ $(cat /sys/block/xvdb/size) = 49152 ]; do usleep 20000; done", 30)
        debian.run("dd if=/tmp/r of=/dev/xvdb bs=1M seek=20 conv=fsync")
    finally:
        detach(debian)
    with pytest.raises(ImageInUse, match="in use by the host"), exclusive(name):
        debian.toolstack.attach_disk(debian.uuid, DiskSpec("xvdc", str(nodes[1])))
    for at in (1, 20):
        with open(name, "rb") as device:
            device.seek(at * MIB)
            assert hashlib.sha256(device.read(MIB)).hexdigest() == expected[1]


@pytest.mark.parametrize("kind", ["raw", "qcow2"])
def test_discard_gives_room_back(rig: HostRig, debian: Guest, kind: str) -> None:
    path = make(rig, kind, 16)
    attach(debian, path, kind)
    try:
        debian.run("dd if=/dev/urandom of=/dev/xvdb bs=1M count=16 conv=fsync")
        before = path.stat().st_blocks
        assert before >= 16 * MIB // 512
        assert "BLOCK OK" in debian.run("blockload discard /dev/xvdb; sync")
        assert path.stat().st_blocks < before // 8
        assert debian.device("xvdb").stats["discards"] > 0
        assert "OK" in debian.run("dd if=/dev/xvdb bs=1M count=16 | tr -d '\\0' | wc -c | grep -x 0 && echo OK")
    finally:
        detach(debian)
    attach(debian, path, kind, discard=False)
    try:
        assert "BLOCK FAIL BLKDISCARD" in debian.run("blockload discard /dev/xvdb")
    finally:
        detach(debian)


def test_limit_holds(rig: HostRig, debian: Guest) -> None:
    path = new_disk(rig, 16)
    attach(debian, path, limits=Limits(bytes_per_second=2 * MIB, burst_seconds=0.5))
    try:
        start = time.monotonic()
        debian.run("dd if=/dev/xvdb of=/dev/null bs=256k count=32", 60)
        assert time.monotonic() - start > (8 - 1) / 2 - 0.5
    finally:
        detach(debian)


@pytest.mark.parametrize("kind", ["raw", "qcow2"])
def test_full_disk_under_the_image(rig: HostRig, debian: Guest, kind: str) -> None:
    """The guest gets an error for what does not fit, and goes on when there is room."""
    if os.geteuid() != 0:
        pytest.skip("a small file system can only be mounted by root")
    small = rig.state / "images" / "small"
    small.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "reeve-test", str(small)], check=True)
    try:
        path = small / "disk"
        if kind == "raw":
            with path.open("wb") as file:
                file.truncate(32 * MIB)
        else:
            need_qemu()
            subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(path), "32M"], check=True)
        filler = small / "filler"
        filler.write_bytes(bytes(2 * MIB))
        attach(debian, path, kind)
        try:
            said = debian.run("dd if=/dev/zero of=/dev/xvdb bs=1M count=16 conv=fsync || echo no room")
            assert "no room" in said, said
            assert debian.device("xvdb").state is DeviceState.CONNECTED
            assert debian.device("xvdb").stats["errors"] > 0
            filler.unlink()
            said = debian.run("dd if=/dev/zero of=/dev/xvdb bs=4k count=1 conv=fsync && echo written")
            assert "written" in said, said
        finally:
            detach(debian)
    finally:
        until(lambda: subprocess.run(["umount", str(small)], check=False).returncode == 0, "the file system to be free")
        small.rmdir()


# -- drivers and daemons that die


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kind", ["raw", "qcow2"])
def test_checksums_hold_while_drivers_are_killed(rig: HostRig, debian: Guest, kind: str) -> None:
    path = make(rig, kind, 64)
    attach(debian, path, kind)
    killed = 0
    before = len(debian.log())
    dice = random.Random(kind)
    try:
        while killed < KILLS:
            debian.start(f"blockload verify /dev/xvdb {LOAD_SECONDS:g} 4")
            end = time.monotonic() + LOAD_SECONDS - 1
            while time.monotonic() < end and killed < KILLS:
                debian.connected("xvdb")
                time.sleep(dice.uniform(0.0, 0.3))  # under load, at no moment in particular
                pid = debian.kill_driver()
                killed += 1
                until(lambda pid=pid: debian.driver_pid() not in (pid, None), "the next driver", 30)
            said = debian.result(LOAD_SECONDS + 60)
            assert "BLOCK OK" in said, said[-2000:]
        assert debian.connected("xvdb").stats["restarts"] == killed
        assert debian.connected("xvdb").stats["errors"] == 0
    finally:
        detach(debian)
    trouble = [line for line in debian.log()[before:].splitlines() if TROUBLE.search(line)]
    assert not trouble, trouble
    if kind == "qcow2":
        subprocess.run(["qemu-img", "check", "-q", "-f", "qcow2", str(path)], check=True)


@pytest.mark.timeout(300)
def test_a_storage_daemon_that_is_killed_costs_nothing(rig: HostRig, debian: Guest) -> None:
    """It takes its cache with it; the driver has what was not flushed, and gives it to the next one."""
    path = make(rig, "qcow2", 32)
    before = len(debian.log())
    attach(debian, path, "qcow2")
    try:
        for driver_too in (False, False, True):
            debian.start("blockload verify /dev/xvdb 10 2")
            debian.until(rb"FLUSHED 1 \d\d+")
            for _ in range(4):
                (pid,) = until(lambda: daemons(rig), "the storage daemon")
                if driver_too:
                    debian.kill_driver()
                os.kill(pid, signal.SIGKILL)
                until(lambda pid=pid: [found for found in daemons(rig) if found != pid], "the next storage daemon", 30)
            said = debian.result(90)
            assert "BLOCK OK" in said, said[-2000:]
        assert debian.device("xvdb").stats["errors"] == 0
    finally:
        detach(debian)
    until(lambda: not daemons(rig), "the storage daemon to end")
    assert b"flush op failed" not in debian.log()[before:]
    subprocess.run(["qemu-img", "check", "-q", "-f", "qcow2", str(path)], check=True)


def test_hotplug_cycles(rig: HostRig, debian: Guest) -> None:
    paths = [new_disk(rig, 8) for _ in range(2)]
    before = len(debian.log())
    for cycle in range(CYCLES):
        path = paths[cycle % 2]
        attach(debian, path)
        debian.run(f"echo cycle {cycle} | dd of=/dev/xvdb bs=512 seek={cycle} conv=notrunc,fsync 2>/dev/null")
        detach(debian)
        assert path.read_bytes()[cycle * 512 :].startswith(f"cycle {cycle}\n".encode())
        assert "gone" in debian.run("[ -b /dev/xvdb ] || echo gone")
    assert not [line for line in debian.log()[before:].splitlines() if TROUBLE.search(line)]
    assert not list((rig.state / "disks").iterdir())


@pytest.mark.timeout(300)
def test_a_disk_goes_while_it_is_read(rig: HostRig, debian: Guest) -> None:
    """Linux stops its queue with requests in it, and waits for them when the disk goes: see `host.finishing`."""
    path = new_disk(rig, 64)
    for flag, skip in (("direct", 0), ("fullblock", 0), ("fullblock", 8192)):
        read = f"dd if=/dev/xvdb of=/dev/null bs=4k count=8192 skip={skip} iflag={flag} 2>/dev/null"
        debian.run(f"(until [ -e /tmp/enough ]; do {read} || usleep 20000; done &)")
    try:
        for _ in range(4):
            attach(debian, path)
            detach(debian)
    finally:
        debian.run("touch /tmp/enough")


@pytest.mark.timeout(300)
def test_load_goes_on_over_a_restart_of_the_host_process(rig: HostRig, debian: Guest) -> None:
    kinds = ("raw", "qcow2")
    for kind, name in zip(kinds, ("xvdb", "xvdc"), strict=True):
        attach(debian, make(rig, kind, 32), kind, name)
    before = daemons(rig)
    length = len(debian.log())
    debian.start("blockload verify /dev/xvdb 15 2 >/dev/hvc0 & blockload verify /dev/xvdc 15 2; wait")
    debian.until(rb"FLUSHED")
    rig.restart()
    reconnect(debian)
    until(
        lambda: debian.log()[length:].count(b"BLOCK OK") == 2 or b"BLOCK FAIL" in debian.log()[length:], "verdicts", 90
    )
    assert b"BLOCK FAIL" not in debian.log()[length:]
    assert daemons(rig) == before, "the storage daemon did not outlive the host process"
    for name in ("xvdb", "xvdc"):
        assert debian.connected(name).stats["restarts"] == 1
        debian.toolstack.resize_disk(debian.uuid, name, 40 * MIB)
        detach(debian, name)
    until(lambda: not daemons(rig), "the storage daemon to end")


@pytest.mark.timeout(300)
def test_what_was_flushed_outlives_everything(
    image: Image, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    """SIGKILL for the driver, the storage daemon, the domain and the host process at once."""
    need_qemu()
    own = HostRig(tmp_path_factory.mktemp("all"), REAL_RUNTIME, log_level="info").start()
    try:
        paths = {"xvda": make(own, "raw", 32), "xvdb": make(own, "qcow2", 32)}
        disks = tuple(
            DiskSpec(id=name, path=str(path), format=DiskFormat.QCOW2 if name == "xvdb" else DiskFormat.RAW)
            for name, path in paths.items()
        )
        debian = Guest(own, image, disks)
        for name in paths:
            debian.console.write(f"blockload verify /dev/{name} 200 2 | sed 's/^/{name} /' &\n".encode())
        tags = [f"{name} FLUSHED {worker} ".encode() for name in paths for worker in (0, 1)]
        until(lambda: all(debian.log().count(tag) > 3 for tag in tags), "flushes", 120)
        time.sleep(1.0)  # under load
        pids = [debian.driver_pid(), *daemons(own), own.process_of(debian.uuid), own.pid]
        log = debian.log()
        for pid in pids:
            assert pid is not None
            os.kill(pid, signal.SIGKILL)
    finally:
        own.stop()
    program = Path(image.directory).parents[1] / "blockload"
    for name, path in paths.items():
        told = {}
        for number, record in re.findall(rf"{name} FLUSHED (\d) (\d+)\r*\n".encode(), log):
            told[int(number)] = max(told.get(int(number), 0), int(record))
        assert len(told) == 2, log[-2000:]
        raw = tmp_path / name
        raw.write_bytes(as_raw_whatever(path, tmp_path))
        said = subprocess.run([program, "check", raw, "2"], capture_output=True, text=True, check=True).stdout
        found = {
            int(n): (int(newest), int(bad)) for n, newest, bad in re.findall(r"FOUND (\d) newest (\d+) bad (\d+)", said)
        }
        for number, record in told.items():
            newest, bad = found[number]
            assert newest >= record, f"{name}: worker {number} was told that {record} is on disk, found {newest}"
            # What was being written when it all ended may be torn.
            assert bad <= 16


def as_raw_whatever(path: Path, folder: Path) -> bytes:
    """Nobody closed it: leaked clusters are no harm, anything else is (exit code 3 against 2)."""
    if path.suffix != ".qcow2":
        return path.read_bytes()
    done = subprocess.run(["qemu-img", "check", "-q", "-f", "qcow2", str(path)], check=False)
    assert done.returncode in (0, 3), "qemu-img check"
    subprocess.run(["qemu-img", "convert", "-f", "qcow2", "-O", "raw", str(path), str(folder / "raw")], check=True)
    return (folder / "raw").read_bytes()


# -- what cannot be


def spec(image: Image, *disks: DiskSpec) -> DomainSpec:
    ident = str(uuid.uuid4())
    boot = KernelBoot(kernel=image.kernel, ramdisk=image.ramdisk, cmdline=image.cmdline)
    return DomainSpec(uuid=ident, name=f"bad-{ident[:8]}", boot=boot, memory_mib=128, owner="tests", disks=disks)


def test_bad_images_are_refused_with_cause_and_cure(rig: HostRig, image: Image, tmp_path: Path) -> None:
    toolstack = rig.connect()
    folder = rig.state / "images"
    raw = new_disk(rig, 1)
    outside = tmp_path / "outside.img"
    outside.write_bytes(bytes(MIB))
    (folder / "link").symlink_to(outside)
    os.mkfifo(folder / "pipe")
    (folder / "empty").touch()
    bad = [
        (DiskSpec("xvda", str(folder / "missing.img")), ImageInvalid, "cannot be opened"),
        (DiskSpec("xvda", str(outside)), ImageInvalid, "outside of the allowed folders"),
        (DiskSpec("xvda", str(folder / "link")), ImageInvalid, "outside of the allowed folders"),
        (DiskSpec("xvda", str(folder / "pipe")), ImageInvalid, "neither a file nor a block device"),
        (DiskSpec("xvda", str(folder / "empty")), ImageInvalid, "at least one sector"),
        (DiskSpec("xvda", str(raw), DiskFormat.QCOW2), ImageInvalid, "no qcow2 image"),
    ]
    for disk, error, text in bad:
        with pytest.raises(error, match=text):
            toolstack.create(spec(image, disk))
    assert not toolstack.list_domains() or all(not d.name.startswith("bad-") for d in toolstack.list_domains())
    toolstack.close()


def test_image_of_another_domain(rig: HostRig, image: Image) -> None:
    toolstack = rig.connect()
    path = new_disk(rig, 1)
    alias = path.with_suffix(".alias")
    os.link(path, alias)
    first = spec(image, DiskSpec("xvda", str(path)))
    toolstack.create(first)
    try:
        for again in (
            DiskSpec("xvda", str(path)),
            DiskSpec("xvda", str(alias)),
            DiskSpec("xvda", str(path), readonly=True),
        ):
            with pytest.raises(ImageInUse, match=first.uuid):
                toolstack.create(spec(image, again))
    finally:
        toolstack.destroy(first.uuid)
    both = [spec(image, DiskSpec("xvda", str(path), readonly=True)) for _ in range(2)]
    for one in both:
        toolstack.create(one)
    assert all(info.state is DeviceState.CONNECTING for one in both for info in toolstack.list_devices(one.uuid))
    for one in both:
        toolstack.destroy(one.uuid)
    toolstack.close()
