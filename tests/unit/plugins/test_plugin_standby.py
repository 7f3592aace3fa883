"""``standby``, ``standby_stop`` and ``standby_takeover`` with both agents; either of them dies at every boundary."""

from __future__ import annotations

import uuid as uuid_module
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pair_rig import IDENT, MIB, Pair, make_pair

from hypervisor.errors import HostUnavailable
from hypervisor.toolstack.api import Capability, MigrationMode, MigrationPhase

Phase = MigrationPhase
SECOND = "22222222-2222-4222-8222-222222222222"


def boundaries(verb: str, *steps: str) -> list[str]:
    inner = [f"{verb}:{step}:{when}" for step in steps for when in ("begun", "ran", "done")]
    return [f"{verb}:planned", *inner, f"{verb}:finishing", f"{verb}:finished"]


BEGIN = boundaries("standby", "check", "prepare", "begin") + boundaries("migrate_in", "claim", "admit")[:-1]
STOP = boundaries("standby_stop", "end", "forget") + boundaries("migrate_settle", "settle")
TAKE = boundaries("standby_takeover", "take", "tidy") + boundaries("migrate_settle", "settle")
BACK = [
    *(f"standby:{step}:{when}" for step in ("begin", "prepare", "check") for when in ("undoing", "undone")),
    *boundaries("migrate_settle", "settle"),
]


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    (tmp_path / "pair").mkdir()
    with make_pair(tmp_path / "pair") as made:
        yield made


def asked(pair: Pair, **more: Any) -> dict[str, Any]:
    return {"uuid": pair.uuid, "target": "node2", **more}


def kept(pair: Pair) -> dict[str, Any]:
    return pair.here.ok("standby", asked(pair), id=IDENT)


def catch_up(pair: Pair) -> None:
    """What lies in a queue is carried out, by agents that are there again."""
    pair.network.down.clear()
    pair.network.broken = False
    for host in ("node2", "node1"):
        pair.network.resume(host)


# -- what they do ---------------------------------------------------------------------------------------------------


def test_it_is_kept_and_belongs_to_the_first_host(pair: Pair) -> None:
    result = kept(pair)
    standby = result["standby"]
    assert result["target"] == "node2"
    assert (standby["ident"], standby["phase"], standby["mode"]) == (IDENT, Phase.STANDBY, MigrationMode.STANDBY)
    assert standby["epochs"] >= 1 and pair.where() == ("running", "")
    assert pair.phases() == (Phase.STANDBY, Phase.STANDBY)
    used = pair.there.host.claims.capacity()  # type: ignore[attr-defined]
    assert (used.memory_used_mib, used.memory_claimed_mib) == (MIB, 0), "what it needs is set aside there"
    pair.here.refused("domain.wrong_state", "pause", {"uuid": pair.uuid})
    pair.here.refused("domain.wrong_state", "standby", asked(pair))
    (listed,) = pair.there.ok("migrations", {"uuid": pair.uuid})["migrations"]
    assert (listed["phase"], listed["role"], listed["peer"]) == (Phase.STANDBY, "target", "node1")


def test_options_reach_the_driver(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}
    start = pair.here.toolstack.migration_start

    def spy(uuid: str, **given: Any) -> None:
        seen.update(given)
        start(uuid, **given)

    monkeypatch.setattr(pair.here.toolstack, "migration_start", spy)
    pair.here.ok("standby", asked(pair, options={"interval_ms": 50, "compress": "zstd", "bandwidth_bytes": 9}))
    options = seen["options"]
    assert (options.interval_ms, options.compress, options.bandwidth_bytes) == (50, "zstd", 9)
    assert (seen["ticket"].mode, seen["peer"]) == (MigrationMode.STANDBY, "node2")


@pytest.mark.parametrize(
    ("code", "args"),
    [
        ("instruction.bad_args", {"target": "node1"}),
        ("instruction.bad_args", {"options": {"interval_ms": 9}}),
        ("instruction.bad_args", {"options": {"copy_disks": True}}),
        ("instruction.bad_args", {"mode": "live"}),
        ("reply.timeout", {"target": "node3"}),
        ("domain.not_found", {"uuid": str(uuid_module.uuid4())}),
    ],
)
def test_refused(pair: Pair, code: str, args: dict[str, Any]) -> None:
    pair.here.refused(code, "standby", asked(pair, **args))
    assert pair.where() == ("running", "")


def test_a_driver_without_it(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    without = pair.here.toolstack.capabilities() - {Capability.STANDBY}
    monkeypatch.setattr(pair.here.toolstack, "capabilities", lambda: without)
    pair.here.refused("driver.unsupported", "standby", asked(pair))


def test_no_room_there(pair: Pair) -> None:
    pair.there.create("big", memory_mib=4096 - MIB + 1)
    error = pair.here.refused("host.insufficient_memory", "standby", asked(pair))
    assert error["undone"] and pair.where() == ("running", "")


def test_stopped_it_runs_on_and_can_be_kept_again(pair: Pair) -> None:
    for _ in range(2):
        pair.here.ok("standby", asked(pair))
        (half,) = pair.here.ok("standby_stop", {"uuid": pair.uuid})["standbys"]
        assert half["phase"] == Phase.KEPT and half["dropped"]
        pair.settled()
    assert pair.where() == ("running", "")
    pair.here.refused("migration.not_found", "standby_stop", {"uuid": pair.uuid})


def test_it_is_stopped_where_it_runs(pair: Pair) -> None:
    kept(pair)
    error = pair.there.refused("domain.wrong_state", "standby_stop", {"uuid": pair.uuid})
    assert "node1" in error["message"] and IDENT in error["message"]
    pair.there.ok("cancel_migration", {"ident": IDENT})
    pair.here.ok("standby_stop", {"uuid": pair.uuid})
    pair.settled()
    assert pair.where() == ("running", "")


def test_one_whose_link_broke_is_cleared_away(pair: Pair) -> None:
    kept(pair)
    pair.here.toolstack.inject_link("standby")
    assert pair.phases() == (Phase.KEPT, Phase.COMPLETE) and pair.where() == ("running", "paused")
    pair.there.refused("domain.wrong_state", "standby_takeover", {"uuid": pair.uuid})
    (half,) = pair.here.ok("standby_stop", {"uuid": pair.uuid})["standbys"]
    assert half["error"]["code"] == "migration.failed" and half["dropped"]
    assert pair.where() == ("running", "")
    pair.settled()


@pytest.mark.parametrize("gone", ["agent", "broker"])
def test_stopped_while_the_other_agent_is_away(pair: Pair, gone: str) -> None:
    kept(pair)
    if gone == "agent":
        pair.network.down.add("node2")
    pair.network.broken = gone == "broker"
    (half,) = pair.here.ok("standby_stop", {"uuid": pair.uuid})["standbys"]
    assert not half["dropped"] and pair.where() == ("running", "")
    catch_up(pair)
    pair.settled()


def test_taken_over_by_order(pair: Pair) -> None:
    before = pair.info(pair.here)
    kept(pair)
    result = pair.there.ok("standby_takeover", {"uuid": pair.uuid})
    assert (result["source"], result["lost_ms"], result["peer"]) == ({"dropped": True}, 0, "node1")
    assert result["domain"]["state"] == "running" and pair.where() == ("", "running")
    after = pair.info(pair.there)
    assert (after.owner, after.domid) == (pair.there.host.owner, before.domid)
    pair.settled()
    pair.there.refused("migration.not_found", "standby_takeover", {"uuid": pair.uuid})
    pair.there.ok("standby", {"uuid": pair.uuid, "target": "node1"})
    pair.here.ok("standby_takeover", {"uuid": pair.uuid})
    assert pair.where() == ("running", "")
    pair.settled()


def test_by_force_a_source_that_hears_of_it_is_dropped(pair: Pair) -> None:
    kept(pair)
    result = pair.there.ok("standby_takeover", {"uuid": pair.uuid, "force": True})
    assert result["source"] == {"dropped": True} and result["lost_ms"] > 0
    assert pair.where() == ("", "running")
    pair.settled()


def test_by_force_from_a_silent_source(pair: Pair) -> None:
    """Nobody can know that it runs there: it is told, and nothing is destroyed there."""
    kept(pair)
    pair.here.toolstack.inject_link("standby")
    assert pair.phases() == (Phase.KEPT, Phase.COMPLETE)
    result = pair.there.ok("standby_takeover", {"uuid": pair.uuid, "force": True})
    assert not result["source"]["dropped"] and "kept" in result["source"]["error"]["message"]
    assert pair.where() == ("running", "running"), "which is what force risks"
    pair.here.ok("destroy", {"uuid": pair.uuid})
    pair.here.ok("standby_stop", {"uuid": pair.uuid})
    pair.settled()


@pytest.mark.parametrize("force", [False, True])
def test_taken_over_while_the_source_s_agent_is_away(pair: Pair, force: bool) -> None:
    kept(pair)
    pair.network.down.add("node1")
    result = pair.there.ok("standby_takeover", {"uuid": pair.uuid, "force": force})
    assert result["source"]["error"]["code"] == "reply.timeout"
    assert pair.where()[1] == "running" and pair.where()[0] in ("", "paused")
    catch_up(pair)
    assert pair.where() == ("", "running")
    pair.settled()


def test_no_takeover_before_there_is_an_epoch(pair: Pair) -> None:
    pair.there.refused("migration.not_found", "standby_takeover", {"uuid": pair.uuid})
    pair.here.refused("migration.not_found", "standby_takeover", {"uuid": pair.uuid})


# -- who dies -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", BEGIN)
def test_an_agent_dies_and_it_is_kept(pair: Pair, monkeypatch: pytest.MonkeyPatch, at: str) -> None:
    reply = pair.lives("standby", asked(pair), at, monkeypatch)
    assert pair.where() == ("running", "")
    if reply.ok:
        assert pair.phases() == (Phase.STANDBY, Phase.STANDBY)
        pair.here.ok("standby_stop", {"uuid": pair.uuid})
    else:
        assert at.startswith("migrate_in") and reply.error is not None and reply.error["code"] == "reply.timeout"
        catch_up(pair)
        pair.here.run("standby_stop", {"uuid": pair.uuid})
    pair.settled()


@pytest.mark.parametrize("at", BACK)
@pytest.mark.parametrize("point", ["copying", "standby"])
def test_an_agent_dies_while_it_is_taken_back(pair: Pair, monkeypatch: pytest.MonkeyPatch, at: str, point: str) -> None:
    pair.here.toolstack.inject_link(point)
    reply = pair.lives("standby", asked(pair), at, monkeypatch)
    assert reply.error is not None and reply.error["code"] == "migration.failed"
    catch_up(pair)
    if pair.here.toolstack.migration_list():  # the other agent did not answer in time
        pair.here.ok("standby_stop", {"uuid": pair.uuid})
    assert pair.where() == ("running", "")
    pair.settled()


@pytest.mark.parametrize("at", STOP)
@pytest.mark.parametrize("cut", [False, True])
def test_an_agent_dies_and_it_is_ended(pair: Pair, monkeypatch: pytest.MonkeyPatch, at: str, cut: bool) -> None:
    kept(pair)
    if cut:
        pair.here.toolstack.inject_link("standby")
    reply = pair.lives("standby_stop", {"uuid": pair.uuid}, at, monkeypatch, SECOND)
    assert reply.ok, reply.error
    catch_up(pair)
    assert pair.where() == ("running", "")
    pair.settled()


@pytest.mark.parametrize("at", TAKE)
@pytest.mark.parametrize("force", [False, True])
def test_an_agent_dies_and_it_is_taken_over(pair: Pair, monkeypatch: pytest.MonkeyPatch, at: str, force: bool) -> None:
    kept(pair)
    pair.network.asker = "node2"
    reply = pair.lives("standby_takeover", {"uuid": pair.uuid, "force": force}, at, monkeypatch, SECOND)
    assert reply.ok, reply.error
    catch_up(pair)
    assert pair.where() == ("", "running")
    pair.settled()


@pytest.mark.parametrize("when", ["before", "after"])
def test_the_driver_fails_for_a_moment_when_it_takes_over(pair: Pair, when: str) -> None:
    kept(pair)
    pair.there.toolstack.inject_error("migration_takeover", HostUnavailable("not now"), when=when)
    reply = pair.there.run("standby_takeover", {"uuid": pair.uuid})
    if not reply.ok:
        assert pair.where() == ("running", "")
        pair.there.ok("standby_takeover", {"uuid": pair.uuid})
    assert pair.where() == ("", "running")
    pair.settled()
