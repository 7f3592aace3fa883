"""snapshot and revert: memory and disks together, idempotent after a crash, taken back after a failure."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "agent" / "images"))
from agent_rig import Rig, make_rig
from fetch_rig import fetcher

from agent.configdrive.drives import wanted_drives
from agent.images.remote.disks import Disks, Place
from hypervisor.errors import HostFailure

pytestmark = pytest.mark.skipif(shutil.which("qemu-img") is None, reason="apt-get install qemu-utils")
SNAPSHOT = ("overlay", "template", "go_on", "start")


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    """With a folder for guests' disks."""
    made = make_rig(tmp_path, sources=fetcher(tmp_path / "images"))
    yield made
    made.journal.close()


def disks(rig: Rig) -> Disks:
    assert rig.host.sources is not None
    return rig.host.sources.disks


def overlays(rig: Rig) -> set[str]:
    return {str(path) for path in disks(rig).folder.glob("*.qcow2")}


def names(rig: Rig) -> list[str]:
    return sorted(template.name for template in rig.toolstack.template_list())


def xvda(rig: Rig, uuid: str) -> str:
    return next(disk.path for disk in rig.toolstack.get_spec(uuid).disks if disk.id == "xvda")


def web(rig: Rig) -> str:
    disks = [{"id": "xvda", "path": rig.image()}, {"id": "xvdb", "path": rig.image("cd"), "readonly": True}]
    return rig.create(disks=disks, nics=[{"id": 0}], metadata={"a": "b"})


def below(path: str) -> bytes:
    return Path(path).read_bytes()[:4096]


def test_a_snapshot_and_back(rig: Rig) -> None:
    uuid = web(rig)
    before = rig.toolstack.get_spec(uuid)
    made = rig.ok("snapshot", {"uuid": uuid, "name": "one"})
    spec, first = rig.toolstack.get_spec(uuid), xvda(rig, uuid)
    assert (made["snapshot"], made["domain"]["state"], made["domain"]["owner"]) == ("one", "running", rig.host.owner)
    assert made["disks"] == {"xvda": first, "xvdb": before.disks[1].path}
    assert (spec.uuid, spec.name, spec.nics, spec.metadata) == (before.uuid, before.name, before.nics, before.metadata)
    assert overlays(rig) == {first} and before.disks[0].path.encode() in below(first)
    back = rig.ok("revert", {"uuid": uuid, "name": "one"})
    second = xvda(rig, uuid)
    assert back["kept_as"].startswith("one-before-") and names(rig) == ["one", back["kept_as"]]
    assert overlays(rig) == {first, second} and before.disks[0].path.encode() in below(second)
    assert rig.toolstack.get_domain(uuid).name == before.name
    again = rig.ok("revert", {"uuid": uuid, "name": back["kept_as"], "keep_as": "reverted"})
    assert again["kept_as"] == "reverted" and first.encode() in below(xvda(rig, uuid))
    assert rig.toolstack.get_domain(uuid).state == "running" and len(overlays(rig)) == 3
    rig.clean()


def test_a_domain_that_is_gone_or_does_not_answer(rig: Rig) -> None:
    uuid = web(rig)
    rig.ok("snapshot", {"uuid": uuid, "name": "one"})
    rig.toolstack.pause(uuid)
    rig.refused("domain.wrong_state", "revert", {"uuid": uuid, "name": "one"})
    assert rig.toolstack.get_domain(uuid).state == "paused" and len(overlays(rig)) == 1
    assert rig.ok("revert", {"uuid": uuid, "name": "one", "force": True})["kept_as"] == ""
    assert rig.toolstack.get_domain(uuid).state == "running" and len(overlays(rig)) == 2, "no image goes"
    rig.ok("destroy", {"uuid": uuid})
    assert len(overlays(rig)) == 2
    assert rig.ok("revert", {"uuid": uuid, "name": "one"})["domain"]["state"] == "running"
    rig.clean()


def test_refused(rig: Rig) -> None:
    uuid, other = web(rig), rig.create("other")
    rig.ok("snapshot", {"uuid": uuid, "name": "one"})
    rig.refused("template.exists", "snapshot", {"uuid": uuid, "name": "one"})
    rig.refused("template.not_found", "revert", {"uuid": uuid, "name": "two"})
    assert "of domain web" in rig.refused("instruction.bad_args", "revert", {"uuid": other, "name": "one"})["message"]
    rig.refused("template.exists", "revert", {"uuid": uuid, "name": "one", "keep_as": "one"})
    for name in ("../x", "", ".hidden"):
        rig.refused("instruction.bad_args", "snapshot", {"uuid": uuid, "name": name})
    rig.refused("domain.not_ours", "snapshot", {"uuid": rig.foreign(), "name": "b"})
    deaf = rig.create("deaf", cmdline="fake.shutdown=ignore", disks=[{"id": "xvda", "path": rig.image("deaf")}])
    rig.refused("domain.timeout", "snapshot", {"uuid": deaf, "name": "c", "wait_seconds": 0})
    assert names(rig) == ["one"] and len(overlays(rig)) == 1 and rig.toolstack.get_domain(deaf).state == "running"


@pytest.mark.parametrize("call", ["template_create", "clone", "unpause"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_what_fails_leaves_the_domain_as_it_was(rig: Rig, call: str, when: str) -> None:
    uuid = web(rig)
    spec = rig.toolstack.get_spec(uuid)
    rig.toolstack.inject_error(call, HostFailure("it broke"), when=when)
    assert rig.refused("host.failure", "snapshot", {"uuid": uuid, "name": "one"})["undone"]
    assert rig.toolstack.get_domain(uuid).state == "running" and rig.toolstack.get_spec(uuid).disks == spec.disks
    assert names(rig) == [] and overlays(rig) == set()
    rig.ok("snapshot", {"uuid": uuid, "name": "one"})
    spec = rig.toolstack.get_spec(uuid)
    for args in ({}, {"force": True}) if call != "template_create" else ({},):
        rig.toolstack.inject_error(call, HostFailure("it broke"), when=when)
        assert rig.refused("host.failure", "revert", {"uuid": uuid, "name": "one", **args})["undone"]
        assert rig.toolstack.get_domain(uuid).state == "running" and rig.toolstack.get_spec(uuid) == spec
        assert names(rig) == ["one"] and overlays(rig) == {spec.disks[0].path}
    assert Path(spec.disks[0].path).exists()


@pytest.mark.parametrize("verb", ["snapshot", "revert"])
@pytest.mark.parametrize("at", [f"{step}:{when}" for step in SNAPSHOT for when in ("begun", "ran", "done")])
def test_killed_at(rig: Rig, monkeypatch: pytest.MonkeyPatch, verb: str, at: str) -> None:
    uuid = web(rig)
    if verb == "revert":
        rig.ok("snapshot", {"uuid": uuid, "name": "one"})
    before = overlays(rig)
    rig.killed(monkeypatch, f"{verb}:{at}", {"uuid": uuid, "name": "one"})
    rig.clean()
    assert rig.toolstack.get_domain(uuid).state == "running" and "one" in names(rig)
    assert overlays(rig) == before | {xvda(rig, uuid)} and len(names(rig)) == len(overlays(rig))


def test_disks_of_snapshots_do_not_go_with_the_domain(rig: Rig, tmp_path: Path) -> None:
    uuid, base = "5f1c6f0e-0000-4000-8000-000000000001", tmp_path / "base.raw"
    base.write_bytes(bytes(1 << 20))
    place = Place(uuid, "xvda", str(disks(rig).path(uuid, "xvda", "qcow2")), "overlay", "qcow2", 1 << 20, True, "raw")
    disks(rig).make(place, base, "some instruction")
    rig.create(uuid=uuid, disks=[{"id": "xvda", "path": place.path, "format": "qcow2"}])
    for name in ("one", "two"):
        rig.ok("snapshot", {"uuid": uuid, "name": name})
    chain = overlays(rig)
    assert len(chain) == 3 and disks(rig).goes(uuid, place.path) and disks(rig).goes(uuid, xvda(rig, uuid))
    now = xvda(rig, uuid)
    rig.ok("template_remove", {"name": "one"})
    rig.ok("destroy", {"uuid": uuid})
    assert overlays(rig) == chain - {now}, "the image that nobody needs any more goes; those below the snapshot stay"
    rig.ok("revert", {"uuid": uuid, "name": "two"})
    rig.toolstack.destroy(uuid)
    rig.ok("template_remove", {"name": "two"})
    disks(rig).forget(uuid)
    assert overlays(rig) == set()


def test_the_config_drive_stays_for_its_snapshots(rig: Rig) -> None:
    uuid = rig.create(config_drive={"hostname": "web"})
    drive = rig.toolstack.get_spec(uuid).disks[0].path
    rig.ok("snapshot", {"uuid": uuid, "name": "one"})
    rig.ok("destroy", {"uuid": uuid})
    assert Path(drive).exists() and drive in wanted_drives(rig.toolstack, set())
    rig.ok("revert", {"uuid": uuid, "name": "one"})
    rig.toolstack.destroy(uuid)
    rig.ok("template_remove", {"name": "one"})
    assert drive not in wanted_drives(rig.toolstack, set())
