"""save and restore: files in their folder, idempotent after a crash, taken back after a failure."""

from __future__ import annotations

import uuid as uuid_module
from pathlib import Path

import pytest
from agent_rig import Rig

from hypervisor.errors import HostFailure, InsufficientMemory


def path(rig: Rig, name: str = "web.save") -> Path:
    return Path(rig.host.settings["save_dir"]) / name


def states(rig: Rig) -> list[str]:
    return [info.state.value for info in rig.toolstack.list_domains()]


def test_save_and_restore(rig: Rig) -> None:
    uuid = rig.create()
    spec = rig.toolstack.get_spec(uuid)
    saved = rig.ok("save", {"uuid": uuid, "name": "web.save"})
    assert (saved["uuid"], saved["path"], saved["bytes"]) == (uuid, str(path(rig)), path(rig).stat().st_size)
    assert path(rig).parent.stat().st_mode & 0o777 == 0o700 and states(rig) == []
    domain = rig.ok("restore", {"uuid": uuid, "name": "web.save"})["domain"]
    assert (domain["uuid"], domain["state"], domain["owner"]) == (uuid, "running", rig.host.owner)
    assert rig.toolstack.get_spec(uuid) == spec and path(rig).exists()
    rig.refused("domain.uuid_in_use", "restore", {"uuid": uuid, "name": "web.save"})
    rig.clean()


def test_a_checkpoint_and_a_second_domain_of_it(rig: Rig) -> None:
    uuid = rig.create()
    assert rig.ok("save", {"uuid": uuid, "name": "a", "keep_running": True})["downtime_ms"] > 0
    other = str(uuid_module.uuid4())
    args = {"uuid": other, "name": "a", "domain_name": "second", "start": False}
    assert rig.ok("restore", args)["domain"]["name"] == "second"
    assert sorted(states(rig)) == ["paused", "running"]


def test_refused(rig: Rig) -> None:
    uuid = rig.create()
    rig.ok("save", {"uuid": uuid, "name": "a", "keep_running": True})
    rig.refused("instruction.bad_args", "save", {"uuid": uuid, "name": "a"})
    for name in ("../x", "/etc/passwd", "", ".hidden"):
        rig.refused("instruction.bad_args", "save", {"uuid": uuid, "name": name})
        rig.refused("instruction.bad_args", "restore", {"uuid": str(uuid_module.uuid4()), "name": name})
    rig.refused("domain.not_ours", "save", {"uuid": rig.foreign(), "name": "b"})
    rig.refused("domain.spec_invalid", "restore", {"uuid": str(uuid_module.uuid4()), "name": "nothing"})
    (path(rig, "bad")).write_bytes(b"no image")
    rig.refused("stream.invalid", "restore", {"uuid": str(uuid_module.uuid4()), "name": "bad"})
    rig.refused("domain.name_in_use", "restore", {"uuid": str(uuid_module.uuid4()), "name": "a"})
    deaf = rig.create("deaf", cmdline="fake.shutdown=ignore")
    rig.refused("domain.timeout", "save", {"uuid": deaf, "name": "c", "wait_seconds": 0})
    assert not path(rig, "c").exists()


def test_a_save_that_fails_at_last_brings_the_domain_back(rig: Rig) -> None:
    uuid = rig.create()
    rig.toolstack.inject_error("save", HostFailure("it broke"), when="after")
    assert rig.refused("host.failure", "save", {"uuid": uuid, "name": "a"})["undone"]
    assert states(rig) == ["running"] and not path(rig, "a").exists()
    assert rig.toolstack.get_domain(uuid).owner == rig.host.owner


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_restore_that_fails_leaves_the_file(rig: Rig, when: str) -> None:
    uuid = rig.create()
    rig.ok("save", {"uuid": uuid, "name": "a"})
    for call in ("restore", "unpause"):
        rig.toolstack.inject_error(call, InsufficientMemory("none left"), when=when)
        assert rig.refused("host.insufficient_memory", "restore", {"uuid": uuid, "name": "a"})["undone"]
        assert states(rig) == [] and path(rig, "a").exists()


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("at", ["save:planned", "save:save:begun", "save:save:ran", "save:save:done", "save:finishing"])
def test_save_killed_at(rig: Rig, monkeypatch: pytest.MonkeyPatch, at: str, keep: bool) -> None:
    uuid = rig.create()
    rig.killed(monkeypatch, at, {"uuid": uuid, "name": "a", "keep_running": keep})
    rig.clean()
    assert states(rig) == (["running"] if keep else []) and path(rig, "a").exists()


@pytest.mark.parametrize(
    "at",
    [
        "restore:planned",
        *(f"restore:{step}:{when}" for step in ("build", "start") for when in ("begun", "ran", "done")),
    ],
)
def test_restore_killed_at(rig: Rig, monkeypatch: pytest.MonkeyPatch, at: str) -> None:
    uuid = rig.create()
    rig.ok("save", {"uuid": uuid, "name": "a"})
    rig.killed(monkeypatch, at, {"uuid": uuid, "name": "a"})
    rig.clean()
    assert states(rig) == ["running"]
    assert rig.toolstack.get_domain(uuid).domid == 2, "it was built once"
