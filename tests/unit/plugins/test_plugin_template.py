"""template_create, template_list, template_remove: idempotent after a crash, taken back after a failure."""

from __future__ import annotations

import pytest
from agent_rig import Rig

from agent import executor
from hypervisor.errors import HostFailure


class Killed(BaseException):
    pass


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
    crash(rig, monkeypatch, f"template_create:{at}", {"uuid": uuid, "name": "a", "keep_running": keep})
    assert states(rig) == (["running"] if keep else []) and names(rig) == ["a"]


@pytest.mark.parametrize("at", ["planned", "remove:begun", "remove:ran", "remove:done"])
def test_remove_killed_at(rig: Rig, monkeypatch: pytest.MonkeyPatch, at: str) -> None:
    rig.ok("template_create", {"uuid": rig.create(), "name": "a"})
    crash(rig, monkeypatch, f"template_remove:{at}", {"name": "a"})
    assert names(rig) == []


def crash(rig: Rig, monkeypatch: pytest.MonkeyPatch, at: str, args: dict[str, object]) -> None:
    def boundary(name: str) -> None:
        if name == at:
            raise Killed

    ident = rig.accept(at.partition(":")[0], args)
    monkeypatch.setattr(executor, "boundary", boundary)
    with pytest.raises(Killed):
        rig.executor.run(ident)
    monkeypatch.undo()
    rig.executor.run(ident)
    assert rig.reply(ident).ok, rig.reply(ident).error
