"""template_create, template_list, template_remove: idempotent after a crash, taken back after a failure."""

from __future__ import annotations

import dataclasses
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "agent" / "images"))
from agent_rig import Rig, make_rig
from fetch_rig import fetcher, qcow2

from hypervisor.errors import HostFailure

needs_qemu_img = pytest.mark.skipif(shutil.which("qemu-img") is None, reason="apt-get install qemu-utils")


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    """With a folder for guests' disks."""
    made = make_rig(tmp_path, sources=fetcher(tmp_path / "images"))
    yield made
    made.journal.close()


def states(rig: Rig) -> list[str]:
    return [info.state.value for info in rig.toolstack.list_domains()]


def names(rig: Rig) -> list[str]:
    return [template["name"] for template in rig.ok("template_list", {})["templates"]]


def test_a_template_comes_and_goes(rig: Rig) -> None:
    uuid = rig.create()
    made = rig.ok("template_create", {"uuid": uuid, "name": "web", "keep_running": True})
    assert made["downtime_ms"] > 0 if "downtime_ms" in made else made["template"]["downtime_ms"] > 0
    assert (made["template"]["name"], made["template"]["users"]) == ("web", [])
    assert states(rig) == ["running"] and names(rig) == ["web"]
    rig.ok("template_create", {"uuid": uuid, "name": "other"})
    assert states(rig) == [] and names(rig) == ["other", "web"]
    for name in ("web", "other"):
        assert rig.ok("template_remove", {"name": name})["template"] == {"name": name, "state": "gone"}
    assert names(rig) == []
    rig.clean()


def test_refused(rig: Rig) -> None:
    uuid = rig.create()
    rig.ok("template_create", {"uuid": uuid, "name": "a", "keep_running": True})
    rig.refused("template.exists", "template_create", {"uuid": uuid, "name": "a"})
    for name in ("../x", "/etc/passwd", "", ".hidden"):
        rig.refused("instruction.bad_args", "template_create", {"uuid": uuid, "name": name})
        rig.refused("instruction.bad_args", "template_remove", {"name": name})
    rig.refused("domain.not_ours", "template_create", {"uuid": rig.foreign(), "name": "b"})
    rig.refused("template.not_found", "template_remove", {"name": "nothing"})
    deaf = rig.create("deaf", cmdline="fake.shutdown=ignore")
    rig.refused("domain.timeout", "template_create", {"uuid": deaf, "name": "c", "wait_seconds": 0})
    assert names(rig) == ["a"] and "running" in states(rig)


def test_one_that_fails_at_last_brings_the_domain_back(rig: Rig) -> None:
    uuid = rig.create()
    spec = rig.toolstack.get_spec(uuid)
    rig.toolstack.inject_error("template_create", HostFailure("it broke"), when="after")
    assert rig.refused("host.failure", "template_create", {"uuid": uuid, "name": "a"})["undone"]
    assert states(rig) == ["running"] and names(rig) == []
    assert rig.toolstack.get_domain(uuid).owner == rig.host.owner
    assert rig.toolstack.get_spec(uuid).boot == spec.boot


def test_another_of_that_name_is_left_alone(rig: Rig) -> None:
    first, second = rig.create(), rig.create("second")
    ident = rig.accept("template_create", {"uuid": first, "name": "a"})
    rig.toolstack.template_create(second, "a", ident="another", keep_running=True)
    rig.executor.run(ident)
    assert rig.reply(ident).error["code"] == "template.exists"
    assert rig.toolstack.template_get("a").ident == "another" and len(states(rig)) == 2


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("at", ["planned", "template:begun", "template:ran", "template:done", "finishing"])
def test_create_killed_at(rig: Rig, monkeypatch: pytest.MonkeyPatch, at: str, keep: bool) -> None:
    uuid = rig.create()
    rig.killed(monkeypatch, f"template_create:{at}", {"uuid": uuid, "name": "a", "keep_running": keep})
    assert states(rig) == (["running"] if keep else []) and names(rig) == ["a"]


@pytest.mark.parametrize("at", ["planned", "remove:begun", "remove:ran", "remove:done"])
def test_remove_killed_at(rig: Rig, monkeypatch: pytest.MonkeyPatch, at: str) -> None:
    rig.ok("template_create", {"uuid": rig.create(), "name": "a"})
    rig.killed(monkeypatch, f"template_remove:{at}", {"name": "a"})
    assert names(rig) == []


# -- create with from_checkpoint


def template(rig: Rig, **args: object) -> str:
    uuid = rig.create(**args)
    rig.ok("template_create", {"uuid": uuid, "name": "web"})
    return uuid


@needs_qemu_img
def test_create_from_a_checkpoint(rig: Rig, tmp_path: Path) -> None:
    for name in ("data", "cd"):
        (tmp_path / name).write_bytes(bytes(1 << 20))
    disks = [
        {"id": "xvda", "path": str(tmp_path / "data")},
        {"id": "xvdb", "path": str(tmp_path / "cd"), "readonly": True},
    ]
    first = template(rig, vcpus=2, nics=[{"id": 0}], disks=disks, metadata={"a": "b"}, on_poweroff="preserve", cap=50)
    known = rig.toolstack.template_get("web").spec
    domains = [
        rig.ok("create", {"name": f"w{n}", "from_checkpoint": "web", "metadata": {"n": str(n)}})["domain"]
        for n in (1, 2)
    ]
    specs = [rig.toolstack.get_spec(domain["uuid"]) for domain in domains]
    assert [domain["state"] for domain in domains] == ["running"] * 2
    for number, spec in enumerate(specs, 1):
        assert (spec.boot, spec.memory_mib, spec.vcpus, spec.cap) == (known.boot, 64, 2, 50)
        assert spec.on_poweroff == "preserve" and ("n", str(number)) in spec.metadata and len(spec.metadata) == 2
        own, read = spec.disks
        assert (own.id, own.format, read) == ("xvda", "qcow2", dataclasses.replace(known.disks[1], shared=True))
        assert Path(own.path).stat().st_size < 1 << 20 and spec.uuid in own.path
    assert len({first, *(spec.uuid for spec in specs)}) == len({spec.nics[0].mac for spec in (known, *specs)}) == 3
    assert rig.toolstack.template_get("web").users == tuple(sorted(spec.uuid for spec in specs))
    rig.refused("template.in_use", "template_remove", {"name": "web"})
    for spec in specs:
        rig.ok("destroy", {"uuid": spec.uuid})
        assert not Path(spec.disks[0].path).exists()
    rig.ok("template_remove", {"name": "web"})
    rig.clean()


def test_what_is_given_wins(rig: Rig, tmp_path: Path) -> None:
    for name in ("data", "other"):
        (tmp_path / name).write_bytes(bytes(1 << 20))
    nic = {"id": 0, "addresses": ["192.0.2.1"]}
    template(rig, nics=[nic], disks=[{"id": "xvda", "path": str(tmp_path / "data")}])
    args = {"name": "w", "from_checkpoint": "web", "weight": 512}
    assert "nic 0" in rig.refused("instruction.bad_args", "create", args)["message"]
    args |= {"nics": [{"mac": "00:16:3e:00:00:07"}], "disks": [{"id": "xvda", "path": str(tmp_path / "other")}]}
    spec = rig.toolstack.get_spec(rig.ok("create", args)["domain"]["uuid"])
    assert (spec.nics[0].mac, spec.disks[0].path, spec.weight) == ("00:16:3e:00:00:07", str(tmp_path / "other"), 512)


def test_create_that_is_refused(rig: Rig, tmp_path: Path) -> None:
    (tmp_path / "data").write_bytes(qcow2(1 << 20))
    template(rig, disks=[{"id": "xvda", "path": str(tmp_path / "data"), "format": "qcow2"}])
    (tmp_path / "data").write_bytes(bytes(512))
    args = {"name": "w", "from_checkpoint": "web"}
    for more in ({"memory_mib": 64}, {"vcpus": 1}, {"kernel": str(rig.kernel)}, {"cmdline": "x"}):
        rig.refused("instruction.bad_args", "create", args | more)
    rig.refused("instruction.bad_args", "create", {"name": "w", "kernel": str(rig.kernel)})
    rig.refused("template.not_found", "create", args | {"from_checkpoint": "nothing"})
    rig.refused("image.invalid", "create", args)
    (tmp_path / "data").unlink()
    rig.refused("image.not_found", "create", args)
    assert states(rig) == []
    rig.clean()


@needs_qemu_img
@pytest.mark.parametrize("call", ["clone", "unpause"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_create_that_fails_leaves_nothing(rig: Rig, tmp_path: Path, call: str, when: str) -> None:
    (tmp_path / "data").write_bytes(bytes(1 << 20))
    template(rig, disks=[{"id": "xvda", "path": str(tmp_path / "data")}])
    rig.toolstack.inject_error(call, HostFailure("it broke"), when=when)
    assert rig.refused("host.failure", "create", {"name": "w", "from_checkpoint": "web"})["undone"]
    assert states(rig) == [] and names(rig) == ["web"]
    assert rig.host.sources is not None and list(rig.host.sources.disks.folder.iterdir()) == []
    rig.clean()


@needs_qemu_img
@pytest.mark.parametrize("at", ["overlay:begun", "overlay:ran", "build:begun", "build:ran", "start:ran"])
def test_create_from_a_checkpoint_killed_at(rig: Rig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str) -> None:
    (tmp_path / "data").write_bytes(bytes(1 << 20))
    template(rig, disks=[{"id": "xvda", "path": str(tmp_path / "data")}])
    rig.killed(monkeypatch, f"create:{at}", {"name": "w", "from_checkpoint": "web"})
    assert states(rig) == ["running"]
    assert rig.host.sources is not None and len(list(rig.host.sources.disks.folder.glob("*.qcow2"))) == 1
