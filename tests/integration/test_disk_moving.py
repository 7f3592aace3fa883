"""A Debian guest under load moves between two host processes, each with a folder of images of its own.

By the verbs of the driver, with an eye on the disks; and by the agents' instructions, with a nic besides.
"""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "guests"))
from authority import Authority
from block_guest import MODULES, Guest, daemons, guest, make_image, missing, new_disk
from build import available, build_guest
from host_rig import HostRig, until
from moved_guest import NAMES, Load, Peer, Site, compile_movebench
from moving_pair import moving_pair

from agent.images import Image
from hypervisor.devices.block.image import overlay
from hypervisor.errors import MigrationRefused
from hypervisor.host.settings import REAL_RUNTIME
from hypervisor.toolstack.api import DomainState, MigrationOptions, MigrationPhase, MigrationStatus
from hypervisor.toolstack.devices import DiskFormat, DiskSpec

MIB = 1 << 20
LOAD_SECONDS = 40
MIGRATIONS = int(os.environ.get("REEVE_MIGRATIONS", "0"))
TROUBLE = re.compile(rb"I/O error|blk_update_request|WARNING:|BUG:|disabled for further use|Call Trace")

pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Image:
    for program, package in (
        ("qemu-img", "qemu-utils"),
        ("qemu-storage-daemon", "qemu-system-common"),
        ("openssl", "openssl"),
        ("slirp4netns", "slirp4netns"),
    ):
        if shutil.which(program) is None:
            missing(f"{program} is not installed: apt-get install {package}")
    folder = tmp_path_factory.mktemp("image")
    modules = (*MODULES, "drivers/net/xen-netfront.ko")
    return make_image(folder, modules, [(compile_movebench(folder), "bin/movebench")])


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[tuple[HostRig, HostRig]]:
    authority = Authority(tmp_path)
    made: list[HostRig] = []
    try:
        for name in ("here", "there"):
            tls = authority.host(name)
            rig = HostRig(
                tmp_path / name,
                REAL_RUNTIME,
                log_level="info",
                memory_mib=512,
                migration_ca=tls.ca,
                migration_certificate=tls.certificate,
                migration_key=tls.key,
            )
            made.append(rig)
            rig.start()
        yield made[0], made[1]
    finally:
        for rig in made:
            rig.stop()


class Move:
    """A guest's way from one host to the other; the guest's console follows."""

    def __init__(self, guest: Guest, there: HostRig, **options: object) -> None:
        self.guest = guest
        self.there = there.connect()
        self.ident, token = str(uuid.uuid4()), "a token"
        offer = guest.toolstack.migration_offer(guest.uuid)
        ticket = self.there.migration_prepare(offer, ident=self.ident, token=token, owner="tests")
        guest.toolstack.migration_start(
            guest.uuid,
            ident=self.ident,
            token=token,
            ticket=ticket,
            options=MigrationOptions(**options),  # type: ignore[arg-type]
        )

    def phases(self) -> tuple[MigrationStatus, MigrationStatus]:
        return self.guest.toolstack.migration_status(self.ident), self.there.migration_status(self.ident)

    def ended(self) -> tuple[MigrationStatus, MigrationStatus]:
        until(lambda: all(half.phase.ended for half in self.phases()), "both halves to end", 300)
        return self.phases()

    def follow(self, there: HostRig) -> None:
        source, target = self.ended()
        assert (source.phase, target.phase) == (MigrationPhase.MOVED, MigrationPhase.RUNNING), (source, target)
        self.guest.console.close()
        self.guest.toolstack.close()
        self.guest.rig, self.guest.toolstack = there, self.there
        self.guest.console = self.there.open_console(self.guest.uuid)


def disks(rig: HostRig, mib: int = 64) -> tuple[DiskSpec, DiskSpec]:
    """A raw one and a qcow2 one on a backing file."""
    raw, base = new_disk(rig, mib, "load.img"), new_disk(rig, mib, "base.img")
    top = base.with_name("load.qcow2")
    overlay.create(top, base, "raw")
    return DiskSpec("xvdb", str(raw)), DiskSpec("xvdc", str(top), DiskFormat.QCOW2)


def content(path: Path, kind: str) -> bytes:
    if kind == "raw":
        return path.read_bytes()
    subprocess.run(["qemu-img", "check", "-q", "-f", "qcow2", str(path)], check=True)
    out = path.with_suffix(".out")
    subprocess.run(["qemu-img", "convert", "-f", kind, "-O", "raw", str(path), str(out)], check=True)
    return out.read_bytes()


def test_checksums_hold_while_disks_move(hosts: tuple[HostRig, HostRig], image: Image) -> None:
    here, there = hosts
    with guest(here, image, *disks(here)) as debian:
        for name in ("xvdb", "xvdc"):
            debian.connected(name)
        before = len(debian.log())
        command = " & ".join(f"blockload verify /dev/{name} {LOAD_SECONDS} 2 >/dev/hvc0" for name in ("xvdb", "xvdc"))
        debian.start(f"{command} & wait")
        debian.until(rb"FLUSHED")
        Move(debian, there, flatten_disks=True).follow(there)
        until(lambda: len(re.findall(rb"BLOCK (OK|FAIL)", debian.log()[before:])) == 2, "verdicts", LOAD_SECONDS + 120)
        log = debian.log()[before:]
        assert log.count(b"BLOCK OK") == 2, log[-3000:]
        assert not TROUBLE.search(log), log[-3000:]
        assert [debian.connected(name).spec["path"] for name in ("xvdb", "xvdc")] == [
            str(there.state / "images" / name) for name in ("load.img", "load.qcow2")
        ]
        said = debian.run("blockload check /dev/xvdb 2; blockload check /dev/xvdc 2", 120)
        assert said.count("BLOCK OK") == 2, said
    until(lambda: not daemons(here) and not daemons(there), "storage daemons to end")
    until(lambda: not [*here.state.glob("disks/*"), *there.state.glob("disks/*")], "nothing of the disks to be left")
    program = str(Path(image.directory).parents[1] / "blockload")
    checked = subprocess.run([program, "check", str(there.state / "images" / "load.img"), "2"], capture_output=True)
    assert b"BLOCK OK" in checked.stdout, checked


def test_images_of_a_paused_guest_are_equal(hosts: tuple[HostRig, HostRig], image: Image) -> None:
    here, there = hosts
    with guest(here, image, *disks(here, 32)) as debian:
        for name in ("xvdb", "xvdc"):
            debian.connected(name)
        said = debian.run("blockload verify /dev/xvdb 3 2; blockload verify /dev/xvdc 3 2", 120)
        said += debian.run("blockload discard /dev/xvdb; blockload verify /dev/xvdb 2 1", 120)
        assert said.count("BLOCK OK") == 4, said
        debian.toolstack.pause(debian.uuid)
        Move(debian, there, flatten_disks=True).follow(there)
        for name, kind in (("load.img", "raw"), ("load.qcow2", "qcow2")):
            path = here.state / "images" / name
            if kind == "raw":
                assert (there.state / "images" / name).read_bytes() == path.read_bytes()
        debian.toolstack.unpause(debian.uuid)
        assert "BLOCK OK" in debian.run("blockload check /dev/xvdb 1", 60)
    until(lambda: not daemons(there), "storage daemons to end")
    assert content(there.state / "images" / "load.qcow2", "qcow2") == content(
        here.state / "images" / "load.qcow2", "qcow2"
    )


def test_what_cannot_be_taken_is_refused_and_leaves_nothing(hosts: tuple[HostRig, HostRig], image: Image) -> None:
    here, there = hosts
    with guest(here, image, *disks(here, 16)) as debian:
        debian.connected("xvdc")
        taken = new_disk(there, 1, "load.img")
        with pytest.raises(MigrationRefused, match=r"xvdb: there is an image .*load.img on the target already"):
            Move(debian, there)
        taken.unlink()
        # The backing file is not there, and nobody asked for a disk without.
        source, target = Move(debian, there).ended()
        assert (source.phase, target.phase) == (MigrationPhase.KEPT, MigrationPhase.DROPPED)
        assert source.error is not None and re.search(r"xvdc: its backing file .*base.img", source.error["message"])
        move = Move(debian, there, flatten_disks=True, bandwidth_bytes=1 * MIB)
        until(lambda: list((there.state / "images").iterdir()), "an image on the target")
        debian.toolstack.migration_cancel(move.ident)
        assert [half.phase for half in move.ended()] == [MigrationPhase.KEPT, MigrationPhase.DROPPED]
        until(lambda: not list((there.state / "images").iterdir()), "the images to be removed")
        until(lambda: not daemons(there), "storage daemons to end")
        move = Move(debian, there, flatten_disks=True, bandwidth_bytes=1 * MIB)
        until(lambda: len(list((there.state / "images").iterdir())) == 2 and daemons(there), "images on the target")
        there.restart()
        source, target = move.ended()
        assert (source.phase, target.phase) == (MigrationPhase.KEPT, MigrationPhase.DROPPED)
        assert not list((there.state / "images").iterdir()) and not list((there.state / "disks").iterdir())
        until(lambda: not daemons(there), "storage daemons to end")
        assert "BLOCK OK" in debian.run("blockload verify /dev/xvdb 2 2", 60)
        assert "BLOCK OK" in debian.run("blockload verify /dev/xvdc 2 2", 60)
        assert dataclasses.asdict(debian.connected("xvdb"))["spec"]["path"] == str(here.state / "images" / "load.img")


# -- by the agents


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    with moving_pair(tmp_path, networks="default user host_loopback=yes", memory_mib=512, log_level="info") as pair:
        made = Site(tmp_path, pair)
        try:
            yield made
        finally:
            for rig in pair.rigs:
                for info in pair.toolstack(rig).list_domains():
                    pair.toolstack(rig).destroy(info.uuid)
            made.close()


@pytest.fixture
def peer() -> Iterator[Peer]:
    made = Peer()
    yield made
    made.close()


def create(site: Site, image: Image) -> tuple[str, str]:
    """A domain on the first host. :returns: its UUID, and its disk's name."""
    disk = new_disk(site.pair.rigs[0], 16, "load.img")
    args: dict[str, Any] = {
        **{"uuid": str(uuid.uuid4()), "name": "web", "memory_mib": 160, "nics": [{}]},
        **{"kernel": image.kernel, "ramdisk": image.ramdisk, "cmdline": image.cmdline},
        **{"disks": [{"id": "xvda", "path": str(disk)}]},
    }
    site.call(0, "create", args)
    return args["uuid"], disk.name


def test_a_guest_under_load_goes_there_and_is_evacuated_back(site: Site, image: Image, peer: Peer) -> None:
    if why := available():
        missing(why)
    domain, disk = create(site, image)
    small = str(uuid.uuid4())
    kernel = str(build_guest("hello"))
    site.call(1, "create", {"uuid": small, "name": "small", "memory_mib": 16, "kernel": kernel})
    load = Load(site, domain, peer)
    moved = site.call(0, "migrate", {"uuid": domain, "target": NAMES[1]})
    assert (moved["domain"]["uuid"], moved["target"], moved["mode"]) == (domain, NAMES[1], "live")
    assert moved["downtime_ms"] > 0 and moved["bytes_sent"] > 0
    assert site.pair.places(domain) == {1: DomainState.RUNNING}
    load.at_work(1, peer)
    site.settled()
    (site.pair.rigs[0].state / "images" / disk).unlink()
    drained = site.call(1, "evacuate", {"target": NAMES[0]})
    assert (drained["moved"], drained["failed"], drained["skipped"]) == (2, 0, 0), drained
    assert site.pair.places(domain) == site.pair.places(small) == {0: DomainState.RUNNING}
    load.verified(0)
    peer.more()
    site.settled()
    assert len(set(peer.numbers)) == len(peer.numbers), "no packet came twice"
    until(lambda: site.pair.rigs[1].left_behind() == [], "nothing of them to be left")
    for index in (domain, small):
        site.call(0, "destroy", {"uuid": index})


@pytest.mark.skipif(not MIGRATIONS, reason="REEVE_MIGRATIONS does not say how many")
@pytest.mark.timeout(120 + MIGRATIONS * 30)
def test_many_migrations_leave_nothing_behind(site: Site, image: Image, peer: Peer) -> None:
    """Back and forth by instructions, under load all the time; a host that a guest has left is as it was."""
    if why := available():
        missing(why)
    domain, disk = create(site, image)
    load = Load(site, domain, peer, seconds=MIGRATIONS * 10)
    held: dict[int, list[dict[str, int]]] = {0: [], 1: []}
    for number in range(MIGRATIONS):
        here = number % 2
        site.call(here, "migrate", {"uuid": domain, "target": NAMES[1 - here]})
        assert site.pair.places(domain) == {1 - here: DomainState.RUNNING}
        peer.more()
        load.well(1 - here)
        site.settled()
        (site.pair.rigs[here].state / "images" / disk).unlink()
        held[here].append(site.held(here))
    load.at_work(MIGRATIONS % 2, peer)
    for found in held.values():
        if len(found) > 2:
            first, last = found[1], found[-1]
            assert (last["nodes"], last["processes"]) == (first["nodes"], first["processes"])
            assert last["files"] <= first["files"] + 2
            assert last["kib"] <= first["kib"] + 8 * 1024 + 40 * len(found)
