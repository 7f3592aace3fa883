"""destroy, pause, unpause, shutdown, reboot: on domains that are ours, and never on others."""

from __future__ import annotations

import dataclasses

import pytest
from agent_rig import Rig

from agent.journal import StepState
from hypervisor.errors import HostUnavailable
from hypervisor.toolstack.api import DomainInfo, DomainState

NOBODY = "00000000-0000-0000-0000-000000000001"
CHANGING = ["destroy", "pause", "unpause", "shutdown", "reboot"]


@pytest.mark.parametrize("verb", CHANGING)
def test_a_foreign_domain_is_not_touched(rig: Rig, verb: str) -> None:
    foreign = rig.foreign()
    before = rig.toolstack.get_domain(foreign)
    rig.refused("domain.not_ours", verb, {"uuid": foreign})
    after = rig.toolstack.get_domain(foreign)
    assert (after.state, after.domid) == (before.state, before.domid)


@pytest.mark.parametrize("verb", [*CHANGING, "show", "console_log"])
def test_an_unknown_domain_and_bad_arguments(rig: Rig, verb: str) -> None:
    rig.refused("domain.not_found", verb, {"uuid": NOBODY})
    rig.refused("instruction.bad_args", verb, {})
    rig.refused("instruction.bad_args", verb, {"uuid": "web"})
    rig.refused("instruction.bad_args", verb, {"uuid": NOBODY, "name": "x"})


def test_destroy(rig: Rig) -> None:
    uuid = rig.create()
    assert rig.ok("destroy", {"uuid": uuid}) == {"domain": {"uuid": uuid, "name": "web", "state": "gone"}}
    assert rig.toolstack.list_domains() == []
    rig.clean()


@pytest.mark.parametrize("gone", [True, False])
def test_destroy_resumes(rig: Rig, gone: bool) -> None:
    uuid = rig.create()
    ident = rig.accept("destroy", {"uuid": uuid})
    plan = rig.verbs["destroy"].plugin.plan({"uuid": uuid}, rig.host)
    rig.journal.planned(ident, plan.to_json(), uuid)
    rig.journal.step(ident, 0, "destroy", StepState.BEGUN)
    if gone:
        rig.toolstack.destroy(uuid)
    rig.executor.run(ident)
    assert rig.reply(ident).ok and rig.toolstack.list_domains() == []


def test_a_domain_that_ended_between_plan_and_destroy_is_fine(rig: Rig) -> None:
    uuid = rig.create()
    ident = rig.accept("destroy", {"uuid": uuid})
    rig.journal.planned(ident, rig.verbs["destroy"].plugin.plan({"uuid": uuid}, rig.host).to_json(), uuid)
    rig.toolstack.destroy(uuid)
    rig.executor.run(ident)
    assert rig.reply(ident).ok


def test_pause_and_unpause_repeat_quietly(rig: Rig) -> None:
    uuid = rig.create()
    for _ in range(2):
        assert rig.ok("pause", {"uuid": uuid})["domain"]["state"] == "paused"
    for _ in range(2):
        assert rig.ok("unpause", {"uuid": uuid})["domain"]["state"] == "running"


def test_pause_of_an_ended_domain_is_refused(rig: Rig) -> None:
    uuid = rig.create()
    rig.toolstack.crash(uuid)
    rig.refused("domain.wrong_state", "pause", {"uuid": uuid})


@pytest.mark.parametrize(
    ("on_poweroff", "state"), [("destroy", "gone"), ("preserve", "shutdown"), ("restart", "restarted")]
)
def test_shutdown_waits_for_the_end(rig: Rig, on_poweroff: str, state: str) -> None:
    uuid = rig.create(on_poweroff=on_poweroff)
    assert rig.ok("shutdown", {"uuid": uuid}) == {"domain": {"uuid": uuid, "state": state}}


def test_shutdown_of_an_ended_domain_asks_nobody(rig: Rig) -> None:
    uuid = rig.create()
    rig.toolstack.crash(uuid)
    assert rig.ok("shutdown", {"uuid": uuid})["domain"]["state"] == "crashed"


def test_a_guest_that_does_not_listen(rig: Rig) -> None:
    uuid = rig.create(cmdline="fake.shutdown=ignore")
    error = rig.refused("domain.timeout", "shutdown", {"uuid": uuid, "wait_seconds": 0.1})
    assert error["retryable"] is True and error["undone"] is False
    assert rig.ok("shutdown", {"uuid": uuid, "wait_seconds": 0})["domain"]["state"] == "asked"
    assert rig.toolstack.get_domain(uuid).state is DomainState.RUNNING
    result = rig.ok("shutdown", {"uuid": uuid, "wait_seconds": 0.1, "force": True})
    assert result == {"domain": {"uuid": uuid, "state": "gone"}, "forced": True}


@pytest.mark.parametrize("verb", ["shutdown", "reboot"])
def test_whether_the_guest_took_the_request_is_told(rig: Rig, verb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    uuid = rig.create(cmdline="fake.shutdown=ignore")
    look = rig.toolstack.get_domain

    def told(uuid: str) -> DomainInfo:
        return dataclasses.replace(look(uuid), detail="asked to poweroff, and has not taken the request")

    monkeypatch.setattr(rig.toolstack, "get_domain", told)
    error = rig.refused("domain.timeout", verb, {"uuid": uuid, "wait_seconds": 0.1})
    assert "asked" in error["message"] and "(asked to poweroff, and has not taken the request)" in error["message"]


def test_force_is_not_used_when_the_guest_obeys(rig: Rig) -> None:
    uuid = rig.create(on_poweroff="preserve")
    result = rig.ok("shutdown", {"uuid": uuid, "force": True})
    assert result == {"domain": {"uuid": uuid, "state": "shutdown"}, "forced": False}


def test_a_resumed_shutdown_does_not_ask_the_next_run(rig: Rig) -> None:
    uuid = rig.create(on_poweroff="restart")
    ident = rig.accept("shutdown", {"uuid": uuid})
    rig.journal.planned(ident, rig.verbs["shutdown"].plugin.plan({"uuid": uuid}, rig.host).to_json(), uuid)
    rig.journal.step(ident, 0, "ask", StepState.BEGUN)
    rig.toolstack.shutdown(uuid)
    domid = rig.toolstack.get_domain(uuid).domid
    rig.executor.run(ident)
    assert rig.reply(ident).ok and rig.toolstack.get_domain(uuid).domid == domid


def test_reboot_keeps_the_uuid_and_changes_the_domid(rig: Rig) -> None:
    uuid = rig.create()
    before = rig.toolstack.get_domain(uuid).domid
    domain = rig.ok("reboot", {"uuid": uuid})["domain"]
    assert domain["uuid"] == uuid and domain["domid"] != before and domain["state"] == "running"


def test_a_resumed_reboot_reboots_once(rig: Rig) -> None:
    uuid = rig.create()
    ident = rig.accept("reboot", {"uuid": uuid})
    rig.journal.planned(ident, rig.verbs["reboot"].plugin.plan({"uuid": uuid}, rig.host).to_json(), uuid)
    rig.journal.step(ident, 0, "ask", StepState.BEGUN)
    rig.toolstack.reboot(uuid)
    domid = rig.toolstack.get_domain(uuid).domid
    rig.executor.run(ident)
    assert rig.reply(ident).ok and rig.toolstack.get_domain(uuid).domid == domid


def test_reboot_that_does_not_happen(rig: Rig) -> None:
    deaf = rig.create("deaf", cmdline="fake.shutdown=ignore")
    rig.refused("domain.timeout", "reboot", {"uuid": deaf, "wait_seconds": 0.1})
    assert rig.ok("reboot", {"uuid": deaf, "wait_seconds": 0})["domain"]["state"] == "asked"
    ends = rig.create("ends", on_reboot="preserve")
    rig.refused("domain.wrong_state", "reboot", {"uuid": ends})
    rig.refused("domain.wrong_state", "reboot", {"uuid": ends})


@pytest.mark.parametrize("verb", CHANGING)
def test_a_host_that_is_away_is_retryable(rig: Rig, verb: str) -> None:
    uuid = rig.create()
    rig.toolstack.inject_error("get_domain", HostUnavailable("away"))
    assert rig.refused("host.unavailable", verb, {"uuid": uuid})["retryable"] is True
    assert rig.toolstack.get_domain(uuid).state is DomainState.RUNNING


@pytest.mark.parametrize("verb", ["pause", "unpause"])
def test_an_unreadable_domain_is_not_taken_for_stopped(rig: Rig, verb: str) -> None:
    uuid = rig.create()
    ident = rig.accept(verb, {"uuid": uuid})
    rig.journal.planned(ident, rig.verbs[verb].plugin.plan({"uuid": uuid}, rig.host).to_json(), uuid)
    rig.journal.step(ident, 0, verb, StepState.BEGUN)
    rig.toolstack.set_readable(uuid, False)
    rig.executor.run(ident)
    reply = rig.reply(ident)
    assert reply.error is not None and reply.error["code"] == "instruction.outcome_unknown"
