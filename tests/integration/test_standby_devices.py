"""A Debian guest with a nic and disks has a standby: nobody hears of anything that a takeover by force undoes.

It sends numbered packets. Each of them is heard once at most, in order, whatever is killed: a number that was heard
before its epoch was whole would come again after the takeover. And it writes records to its disks, flushes and checks
them: a disk that is not of the same moment as its memory is found.
"""

from __future__ import annotations

import itertools
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))

from block_guest import compile_load, new_disk
from host_rig import HostRig, until
from moved_guest import Peer, compile_movebench
from moving_pair import Pair, Phase, Standby, dies, kill_all, moving_pair, processes
from net_guests import Guest, build_net_image

from hypervisor.toolstack.api import DomainState
from hypervisor.toolstack.devices import DiskFormat, DiskSpec, NicSpec

pytestmark = pytest.mark.timeout(600)

PERIOD_US = 2000
QUIET = 0.5
MODULES = ("drivers/net/xen-netfront.ko", "drivers/block/xen-blkfront.ko")
LOAD_SECONDS = 12


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    with moving_pair(tmp_path, networks="default user host_loopback=yes", memory_mib=512) as made:
        yield made
        made.clear()


@pytest.fixture
def peer() -> Iterator[Peer]:
    made = Peer()
    yield made
    made.close()


def quiet(peer: Peer) -> None:
    """Wait until nothing is heard any more."""

    def none() -> bool:
        before = len(peer.numbers)
        time.sleep(QUIET)
        return len(peer.numbers) == before

    until(none, "the guest to be silent", 60)


def in_order(peer: Peer) -> None:
    numbers = list(peer.numbers)
    assert [two for two in itertools.pairwise(numbers) if two[0] >= two[1]] == []


def disks(rig: HostRig) -> tuple[DiskSpec, DiskSpec]:
    raw = new_disk(rig, 16, "raw.img")
    qcow2 = raw.with_name("qcow2.img")
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(qcow2), "16M"], check=True)
    return DiskSpec("xvda", str(raw)), DiskSpec("xvdb", str(qcow2), DiskFormat.QCOW2)


def left(move: Standby) -> None:
    """Nobody removes the images of a host that a domain has left; in the way back they would be in the way."""
    for path in (move.source.state / "images").iterdir():
        path.unlink()


def test_what_is_heard_is_never_undone(pair: Pair, peer: Peer, tmp_path: Path) -> None:
    load = compile_load(tmp_path)
    image = build_net_image(tmp_path, compile_movebench(tmp_path), MODULES, [(load, "bin/blockload")])
    nics, here = [NicSpec(0, "00:16:3e:00:00:0a", "default")], pair.rigs[0]
    guest = Guest(pair.toolstack(here), image, nics, disks=disks(here))
    guest.booted().address("10.0.2.15/24")
    guest.run("until [ -b /dev/xvda -a -b /dev/xvdb ]; do usleep 100000; done")
    for name in ("xvda", "xvdb"):
        guest.console.write(f"blockload verify /dev/{name} {LOAD_SECONDS} 1 >/{name} &\n".encode())
    guest.console.write(f"netload 10.0.2.2 {peer.port} {PERIOD_US} 0 0 &\n".encode())
    peer.more()

    move = Standby(pair, guest.uuid, 0, interval_ms=50).start()
    move.epochs()
    peer.more()
    move.there.migration_takeover(move.ident)
    move.moved()
    left(move)
    assert pair.places(guest.uuid) == {1: DomainState.RUNNING}
    peer.more()
    in_order(peer)
    move.forget()

    move = Standby(pair, guest.uuid, 1, interval_ms=50).start()
    move.epochs()
    peer.more()
    move.there.migration_takeover(move.ident, force=True)
    until(lambda: move.here.migration_status(move.ident).phase is Phase.UNRESOLVED, "the source to know")
    assert pair.places(guest.uuid) == {0: DomainState.RUNNING, 1: DomainState.PAUSED}
    peer.more()
    move.here.migration_resolve(move.ident, keep=False)
    left(move)
    peer.more()
    in_order(peer)
    move.forget()

    move = Standby(pair, guest.uuid, 0, interval_ms=50).start()
    move.epochs()
    peer.more()
    move.target.suspend()
    quiet(peer)
    kill_all(processes(move.source, "nic"))
    until(lambda: processes(move.source, "nic"), "another driver")
    quiet(peer)
    assert move.here.get_domain(guest.uuid).state is DomainState.RUNNING
    dies(move)
    move.target.go_on()
    move.complete()
    move.there.migration_takeover(move.ident, force=True)
    peer.more()
    in_order(peer)
    guest.toolstack = move.there
    guest.reconnect()
    guest.run("until grep BLOCK /xvda && grep BLOCK /xvdb; do sleep 1; done", LOAD_SECONDS + 120)
    guest.run("echo 3 >/proc/sys/vm/drop_caches")
    said = guest.run("grep BLOCK /xvda /xvdb; blockload check /dev/xvda 1; blockload check /dev/xvdb 1", 120)
    assert said.count("BLOCK OK") == 4, said
    move.source.start()
    move.here.destroy(guest.uuid)
    move.settle()
