"""clone: new domains from a running one, idempotent after a crash, taken back after a failure."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "agent" / "images"))
from agent_rig import Rig, make_rig
from fetch_rig import fetcher

from hypervisor.errors import HostFailure
from hypervisor.toolstack.api import DomainInfo

pytestmark = pytest.mark.skipif(shutil.which("qemu-img") is None, reason="apt-get install qemu-utils")
READS, WRITES = ("claim", "template", "clone", "run", "drop"), ("overlay", "go_on", "start")


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    """With a folder for guests' disks."""
    made = make_rig(tmp_path, sources=fetcher(tmp_path / "images"))
    yield made
    made.journal.close()


def web(rig: Rig, *, writes: bool) -> str:
    disks: list[dict[str, Any]] = [{"id": "xvdb", "path": rig.image("cd"), "readonly": True, "shared": True}]
    disks += [{"id": "xvda", "path": rig.image()}] if writes else []
    return rig.create(disks=disks, nics=[{"id": 0}], metadata={"a": "b"})


def overlays(rig: Rig) -> set[str]:
    assert rig.host.sources is not None
    return {str(path) for path in rig.host.sources.disks.folder.glob("*.qcow2")}


def domains(rig: Rig) -> dict[str, DomainInfo]:
    return {domain.name: domain for domain in rig.toolstack.list_domains()}


def test_clones_have_identities_of_their_own_and_the_domain_goes_on(rig: Rig) -> None:
    uuid = web(rig, writes=False)
    before = rig.toolstack.get_domain(uuid)
    made = rig.ok("clone", {"uuid": uuid, "names": ["two", "three"]})
    assert sorted(domain["name"] for domain in made["domains"]) == ["three", "two"]
    found = domains(rig)
    specs = [rig.toolstack.get_spec(found[name].uuid) for name in ("web", "two", "three")]
    assert len({spec.uuid for spec in specs}) == len({spec.nics[0].mac for spec in specs}) == 3
    assert all(domain.state == "running" and domain.owner == rig.host.owner for domain in found.values())
    assert found["web"].domid == before.domid, "it is the same run"
    assert {spec.disks[0].path for spec in specs} == {specs[0].disks[0].path} and overlays(rig) == set()
    assert not rig.toolstack.template_list()
    assert dict(specs[1].metadata).keys() == {"reeve.clone"}
    rig.clean()


def test_of_disks_that_it_writes_to_each_has_an_overlay(rig: Rig) -> None:
    uuid = web(rig, writes=True)
    base = rig.toolstack.get_spec(uuid).disks
    rig.ok("clone", {"uuid": uuid, "names": ["two", "three"], "start": False})
    found = domains(rig)
    assert {name: domain.state for name, domain in found.items()} == {
        "web": "running",
        "two": "paused",
        "three": "paused",
    }
    paths = {
        disk.path
        for domain in found.values()
        for disk in rig.toolstack.get_spec(domain.uuid).disks
        if not disk.readonly
    }
    assert len(paths) == 3 and paths == overlays(rig)
    below = next(disk.path for disk in base if not disk.readonly)
    assert all(below.encode() in Path(path).read_bytes()[:4096] for path in paths)
    assert not rig.toolstack.template_list()
    rig.ok("destroy", {"uuid": found["two"].uuid})
    assert len(overlays(rig)) == 2 and Path(below).exists(), "an overlay goes with its clone"
    rig.clean()


def test_refused(rig: Rig) -> None:
    uuid = web(rig, writes=False)
    for names in ([], ["a", "a"], ["../x"], [str(number) for number in range(65)]):
        rig.refused("instruction.bad_args", "clone", {"uuid": uuid, "names": names})
    rig.refused("domain.name_in_use", "clone", {"uuid": uuid, "names": ["two", "web"]})
    rig.refused("domain.not_ours", "clone", {"uuid": rig.foreign(), "names": ["two"]})
    addresses = rig.create("strict", nics=[{"id": 0, "addresses": ["10.0.0.1"]}])
    rig.refused("instruction.bad_args", "clone", {"uuid": addresses, "names": ["two"]})
    alone = rig.create("alone", disks=[{"id": "xvda", "path": rig.image("other"), "readonly": True}])
    rig.refused("image.in_use", "clone", {"uuid": alone, "names": ["two"]})
    rig.toolstack.pause(uuid)
    rig.refused("domain.wrong_state", "clone", {"uuid": uuid, "names": ["two"]})
    assert sorted(domains(rig)) == ["alone", "strict", "theirs", "web"] and not rig.toolstack.template_list()


@pytest.mark.parametrize("writes", [False, True])
@pytest.mark.parametrize("call", ["template_create", "clone", "unpause"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_what_fails_leaves_the_domain_as_it_was(rig: Rig, call: str, when: str, writes: bool) -> None:
    uuid = web(rig, writes=writes)
    spec = rig.toolstack.get_spec(uuid)
    rig.toolstack.inject_error(call, HostFailure("it broke"), when=when)
    assert rig.refused("host.failure", "clone", {"uuid": uuid, "names": ["two", "three"]})["undone"]
    assert list(domains(rig)) == ["web"] and rig.toolstack.get_domain(uuid).state == "running"
    assert rig.toolstack.get_spec(uuid).disks == spec.disks and overlays(rig) == set()
    assert not rig.toolstack.template_list()


@pytest.mark.parametrize("when", ["before", "after"])
def test_the_domains_stay_when_the_template_cannot_be_removed(rig: Rig, when: str) -> None:
    uuid = web(rig, writes=True)
    rig.toolstack.inject_error("template_remove", HostFailure("it broke"), when=when)
    left = rig.ok("clone", {"uuid": uuid, "names": ["two"]})["template_left"]
    assert sorted(domains(rig)) == ["two", "web"] and left.startswith("clone-")
    assert [template.name for template in rig.toolstack.template_list()] == ([left] if when == "before" else [])
    rig.clean()


@pytest.mark.parametrize(
    ("at", "writes"),
    [(f"{step}:{when}", step in WRITES) for step in (*READS, *WRITES) for when in ("begun", "ran", "done")],
)
def test_killed_at(rig: Rig, monkeypatch: pytest.MonkeyPatch, at: str, writes: bool) -> None:
    uuid = web(rig, writes=writes)
    rig.killed(monkeypatch, f"clone:{at}", {"uuid": uuid, "names": ["two", "three"]})
    rig.clean()
    assert sorted(domains(rig)) == ["three", "two", "web"], "neither lost nor twice"
    assert all(domain.state == "running" for domain in domains(rig).values())
    assert not rig.toolstack.template_list() and len(overlays(rig)) == (3 if writes else 0)
