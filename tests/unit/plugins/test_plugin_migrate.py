"""``migrate`` and what stands around it, with both agents: what moves, what is refused, what is left behind."""

from __future__ import annotations

import dataclasses
import uuid as uuid_module
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pair_rig import IDENT, MIB, Pair, make_pair

from hypervisor.errors import CpuIncompatible, HostUnavailable, InsufficientMemory, Unsupported
from hypervisor.toolstack.api import MigrationMode, MigrationOffer, MigrationOptions, MigrationPhase, MigrationTicket
from hypervisor.toolstack.devices import DiskSpec

Phase = MigrationPhase


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    (tmp_path / "pair").mkdir()
    with make_pair(tmp_path / "pair") as made:
        yield made


def test_a_domain_moves_and_belongs_to_the_other_agent(pair: Pair) -> None:
    before = pair.info(pair.here)
    reply = pair.migrate()
    assert reply.ok and reply.result is not None, reply.error
    assert [step["name"] for step in reply.steps] == ["check", "prepare", "transfer", "settle", "finish"]
    assert pair.where() == ("", "running")
    after = pair.info(pair.there)
    assert (after.owner, after.domid) == (pair.there.host.owner, before.domid)
    result = reply.result
    assert (result["domain"]["uuid"], result["target"], result["mode"]) == (pair.uuid, "node2", "live")
    assert result["bytes_sent"] > 0 and result["downtime_ms"] > 0
    pair.settled()
    pair.there.ok("pause", {"uuid": pair.uuid})


def test_there_and_back_again(pair: Pair) -> None:
    for n in range(3):
        source = pair.here if n % 2 == 0 else pair.there
        source.ok("migrate", {"uuid": pair.uuid, "target": "node2" if n % 2 == 0 else "node1"})
    assert pair.where() == ("", "running")
    pair.settled()


def test_a_paused_domain_stays_paused(pair: Pair) -> None:
    pair.here.ok("pause", {"uuid": pair.uuid})
    assert pair.migrate().ok
    assert pair.where() == ("", "paused") and pair.info(pair.there).detail == ""
    pair.there.ok("unpause", {"uuid": pair.uuid})
    pair.settled()


def test_a_domid_in_use_there_makes_it_an_image(pair: Pair) -> None:
    domid = pair.info(pair.here).domid
    pair.there.toolstack.store._rows("UPDATE host SET value = ?", (domid,))
    pair.there.create("other")
    refused = pair.here.refused(
        "migration.not_transparent", "migrate", {"uuid": pair.uuid, "target": "node2", "mode": "live"}
    )
    assert "image" in refused["message"]
    assert pair.where() == ("running", "")
    reply = pair.migrate()
    assert reply.ok and reply.result is not None and reply.result["mode"] == "image", reply.error
    assert pair.info(pair.there).domid != domid
    pair.settled()


def test_a_target_that_takes_no_images_says_why_it_cannot_come_live(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = pair.there.toolstack
    prepare = host.migration_prepare

    def no_images(offer: MigrationOffer, *, mode: MigrationMode = MigrationMode.LIVE, **given: Any) -> MigrationTicket:
        if mode is MigrationMode.IMAGE:
            raise Unsupported("this host takes no images over the network")
        return prepare(offer, mode=mode, **given)

    monkeypatch.setattr(host, "migration_prepare", no_images)
    host.store._rows("UPDATE host SET value = ?", (pair.info(pair.here).domid,))
    pair.there.create("other")
    pair.here.refused("migration.not_transparent", "migrate", {"uuid": pair.uuid, "target": "node2"})
    pair.here.refused("driver.unsupported", "migrate", {"uuid": pair.uuid, "target": "node2", "mode": "image"})
    assert pair.where() == ("running", "")


def test_options_and_mode_reach_the_driver(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}
    start = pair.here.toolstack.migration_start

    def spy(uuid: str, **given: Any) -> None:
        seen.update(given)
        start(uuid, **given)

    monkeypatch.setattr(pair.here.toolstack, "migration_start", spy)
    assert pair.migrate(mode="image", options={"compress": "zstd", "bandwidth_bytes": 10, "throttle": False}).ok
    assert seen["options"] == MigrationOptions(bandwidth_bytes=10, compress="zstd", throttle=False)
    assert seen["ticket"].mode is MigrationMode.IMAGE and seen["ident"] == IDENT and seen["peer"] == "node2"


@pytest.mark.parametrize(
    ("code", "args"),
    [
        ("instruction.bad_args", {"target": "node1"}),
        ("instruction.bad_args", {"target": "no host"}),
        ("instruction.bad_args", {"mode": "fast"}),
        ("instruction.bad_args", {"options": {"compress": "lz4"}}),
        ("instruction.bad_args", {"options": {"speed": 1}}),
        ("reply.timeout", {"target": "node3"}),
        ("domain.not_found", {"uuid": str(uuid_module.uuid4())}),
    ],
)
def test_refused(pair: Pair, code: str, args: dict[str, Any]) -> None:
    pair.here.refused(code, "migrate", {"uuid": pair.uuid, "target": "node2", **args})
    assert pair.where() == ("running", "")


def test_what_is_not_ours_or_has_ended_stays(pair: Pair) -> None:
    pair.here.refused("domain.not_ours", "migrate", {"uuid": pair.here.foreign(), "target": "node2"})
    pair.here.toolstack.crash(pair.uuid)
    pair.here.refused("domain.wrong_state", "migrate", {"uuid": pair.uuid, "target": "node2"})


def test_the_target_has_no_room(pair: Pair) -> None:
    pair.there.create("big", memory_mib=4096 - MIB + 1)
    error = pair.here.refused("host.insufficient_memory", "migrate", {"uuid": pair.uuid, "target": "node2"})
    assert error["undone"] and pair.where() == ("running", "")
    assert pair.there.toolstack.migration_list() == []


def test_the_target_has_no_vcpus_left(pair: Pair) -> None:
    pair.there.host.claims.vcpu_ratio = 0.2
    pair.here.refused("host.insufficient_vcpus", "migrate", {"uuid": pair.uuid, "target": "node2"})
    pair.settled()


def test_the_target_s_cpu_lacks_something(pair: Pair) -> None:
    pair.there.toolstack.inject_error("migration_prepare", CpuIncompatible("the guest saw avx512: this host lacks it"))
    error = pair.here.refused("cpu.incompatible", "migrate", {"uuid": pair.uuid, "target": "node2"})
    assert error["undone"] and "avx512" in error["message"]
    pair.settled()


def test_a_disk_that_is_not_there(pair: Pair, tmp_path: Path) -> None:
    path = pair.here.image()
    pair.here.toolstack.attach_disk(pair.uuid, DiskSpec("xvda", path))
    Path(path).unlink()
    pair.here.refused("image.invalid", "migrate", {"uuid": pair.uuid, "target": "node2"})
    assert pair.where() == ("running", "")


def test_the_target_may_be_busy_for_a_moment(pair: Pair) -> None:
    pair.there.toolstack.inject_error("migration_prepare", HostUnavailable("not now"), times=2)
    assert pair.migrate().ok
    asked = [ident for _host, verb, ident in pair.network.asked if verb == "migrate_in"]
    assert len(set(asked)) == len(asked) == 3, "each attempt is an instruction of its own"
    pair.settled()


@pytest.mark.parametrize("point", ["starting", "copying", "switching", "complete"])
def test_the_link_is_cut_before(pair: Pair, point: str) -> None:
    pair.here.toolstack.inject_link(point)
    reply = pair.migrate()
    assert reply.error is not None
    assert (reply.error["code"], reply.error["undone"], reply.error["retryable"]) == ("migration.failed", True, True)
    assert pair.where() == ("running", "")
    pair.settled()


def test_the_link_is_cut_after(pair: Pair) -> None:
    pair.here.toolstack.inject_link("moved")
    assert pair.migrate().ok
    assert pair.where() == ("", "running")
    pair.settled()


def test_cancel(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """By another worker, while it is copied."""
    status = pair.here.toolstack.migration_status
    told: list[Any] = []

    def at_a_look(ident: str) -> Any:
        found = status(ident)
        if found.phase is Phase.COPYING and not told:
            told.append(None)
            told[:] = [pair.here.ok("cancel_migration", {"ident": IDENT})]
        return found

    monkeypatch.setattr(pair.here.toolstack, "migration_status", at_a_look)
    reply = pair.migrate()
    assert reply.error is not None and reply.error["code"] == "migration.cancelled" and reply.error["undone"]
    assert told[0]["migration"]["phase"] == "kept"
    assert pair.where() == ("running", "")
    pair.settled()


def test_cancel_of_nothing(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    from plugins import cancel_migration

    monkeypatch.setattr(cancel_migration, "APPEAR_SECONDS", 0.0)
    pair.here.refused("migration.not_found", "cancel_migration", {"ident": IDENT})


def test_the_deadline_passes_while_it_is_copied(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    uuid = pair.here.create("restless", cmdline="fake.rounds=never")
    import time

    reply = pair.here.run("migrate", {"uuid": uuid, "target": "node2"}, deadline=time.time() + 0.5)
    assert reply.error is not None and reply.error["undone"], reply.error
    assert [info.uuid for info in pair.there.toolstack.list_domains()] == []
    pair.settled()


def test_the_deadline_passes_within_the_switch_and_it_goes_on(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """The failure is written down, its undo finds that it has moved, and the plan turns round."""
    from plugins import migrate

    monkeypatch.setattr(migrate, "MARGIN", -3600.0)  # the wait ends after one look
    cancel = pair.here.toolstack.migration_cancel

    def too_late(ident: str) -> None:
        while pair.here.toolstack.migration_status(ident).phase is not Phase.MOVED:
            pass
        cancel(ident)

    monkeypatch.setattr(pair.here.toolstack, "migration_cancel", too_late)
    reply = pair.migrate()
    assert reply.ok and reply.result is not None, reply.error
    assert reply.result["bytes_sent"] > 0
    assert pair.where() == ("", "running")
    pair.settled()


def test_the_target_s_agent_is_away_after_the_point_of_no_return(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    pair.here.toolstack.inject_link("moved")
    start = pair.here.toolstack.migration_start

    def away(*args: Any, **kwargs: Any) -> None:
        start(*args, **kwargs)
        pair.network.down.add("node2")

    monkeypatch.setattr(pair.here.toolstack, "migration_start", away)
    reply = pair.migrate()
    assert reply.error is not None and (reply.error["code"], reply.error["undone"]) == ("migration.unresolved", False)
    assert f"reeve migration resolve {IDENT} --keep" in reply.error["message"]
    assert pair.where() == ("", "paused")
    assert f"reeve migration resolve {IDENT}" in pair.info(pair.there).detail
    # What was asked lies in its queue: when it comes back, it does it.
    pair.network.down.clear()
    pair.network.resume("node2")
    assert pair.where() == ("", "running")
    assert pair.phases() == (Phase.MOVED, Phase.RUNNING)
    pair.here.ok("resolve_migration", {"ident": IDENT, "keep": False})
    pair.there.ok("resolve_migration", {"ident": IDENT, "keep": True, "force": True})
    pair.settled()


def test_the_target_s_agent_goes_away_before_it(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    pair.here.toolstack.inject_link("complete")
    start = pair.here.toolstack.migration_start

    def away(*args: Any, **kwargs: Any) -> None:
        start(*args, **kwargs)
        pair.network.down.add("node2")

    monkeypatch.setattr(pair.here.toolstack, "migration_start", away)
    reply = pair.migrate()
    assert reply.error is not None and (reply.error["code"], reply.error["undone"]) == ("migration.failed", False)
    assert pair.where() == ("running", "paused")
    pair.there.refused("migration.refused", "resolve_migration", {"ident": IDENT, "keep": True})
    pair.network.down.clear()
    pair.network.resume("node2")
    assert pair.where() == ("running", "")
    pair.here.ok("resolve_migration", {"ident": IDENT, "keep": True, "force": True})
    pair.settled()


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("at_source", [True, False])
def test_a_pair_that_nobody_can_resolve_but_an_operator(pair: Pair, keep: bool, at_source: bool) -> None:
    pair.here.toolstack.inject_link("complete", "unresolved")
    reply = pair.migrate()
    assert reply.error is not None and (reply.error["code"], reply.error["undone"]) == ("migration.unresolved", False)
    assert pair.where() == ("paused", "paused")
    for rig in pair.both():
        assert f"reeve migration resolve {IDENT}" in pair.info(rig).detail
        (told,) = rig.ok("migrations", {})["migrations"]
        assert told["resolve"] == [f"reeve migration resolve {IDENT} --{how}" for how in ("keep", "drop")]
    rig = pair.here if at_source else pair.there
    rig.ok("resolve_migration", {"ident": IDENT, "keep": keep})
    assert pair.where() == (("running", "") if keep is at_source else ("", "running"))
    if not keep:  # the other half has been told to run, its record stays for whoever looks
        other = pair.there if at_source else pair.here
        other.ok("resolve_migration", {"ident": IDENT, "keep": True, "force": True})
    pair.settled()


def test_resolve_does_not_drop_the_only_copy(pair: Pair) -> None:
    pair.here.toolstack.inject_link("switching", "unresolved")
    assert not pair.migrate().ok
    assert pair.where() == ("paused", "")
    refused = pair.here.refused("migration.refused", "resolve_migration", {"ident": IDENT, "keep": False})
    assert "node2" in refused["message"]
    assert pair.where() == ("paused", "")
    pair.here.ok("resolve_migration", {"ident": IDENT, "keep": True})
    assert pair.where() == ("running", "")
    pair.settled()


def test_resolve_asks_the_other_host_first(pair: Pair) -> None:
    pair.here.toolstack.inject_link("complete", "unresolved")
    assert not pair.migrate().ok
    pair.network.broken = True
    for keep in (True, False):
        error = pair.here.refused("migration.refused", "resolve_migration", {"ident": IDENT, "keep": keep})
        assert "force" in error["message"]
    assert pair.where() == ("paused", "paused")
    pair.there.ok("resolve_migration", {"ident": IDENT, "keep": False, "force": True})
    pair.here.ok("resolve_migration", {"ident": IDENT, "keep": True, "force": True})
    assert pair.where() == ("running", "")
    pair.settled()


def test_resolve_of_nothing_and_of_what_is_under_way(pair: Pair) -> None:
    pair.here.refused("migration.not_found", "resolve_migration", {"ident": IDENT, "keep": True})
    offer = pair.here.toolstack.migration_offer(pair.uuid)
    ticket = pair.there.toolstack.migration_prepare(offer, ident=IDENT, token="t", owner="x", peer="node1")
    pair.here.toolstack.migration_start(
        pair.uuid, ident=IDENT, token="t", ticket=ticket, options=MigrationOptions(), peer="node2"
    )
    for keep in (True, False):
        pair.here.refused("migration.refused", "resolve_migration", {"ident": IDENT, "keep": keep})
        pair.there.refused("migration.refused", "resolve_migration", {"ident": IDENT, "keep": keep})
    pair.here.toolstack.migration_cancel(IDENT)


def test_the_broker_is_gone_at_first(pair: Pair) -> None:
    pair.network.broken = True
    reply = pair.migrate()
    assert reply.error is not None and reply.error["code"] == "broker.unreachable"
    assert pair.where() == ("running", "")


@pytest.mark.parametrize("point", ["complete", "moved"])
def test_the_broker_goes_for_good_while_it_is_sent(pair: Pair, monkeypatch: pytest.MonkeyPatch, point: str) -> None:
    """What the target must know lies in the outbox: when there is a broker again, it is told."""
    pair.here.toolstack.inject_link(point)
    start = pair.here.toolstack.migration_start

    def away(*args: Any, **kwargs: Any) -> None:
        start(*args, **kwargs)
        pair.network.broken = True

    monkeypatch.setattr(pair.here.toolstack, "migration_start", away)
    reply = pair.migrate()
    assert reply.error is not None and not reply.error["undone"]
    assert pair.where() == (("running", "paused") if point == "complete" else ("", "paused"))
    pair.network.broken = False
    pair.network.resume("node2")
    assert pair.where() == (("running", "") if point == "complete" else ("", "running"))
    for rig in pair.both():
        rig.clean()


def test_what_is_on_its_way_counts_on_the_target(pair: Pair) -> None:
    free = pair.there.host.claims.capacity()  # type: ignore[attr-defined]
    offer = pair.here.toolstack.migration_offer(pair.uuid)
    args = {"ident": IDENT, "token": "0" * 32, "source": "node1", "mode": "live", "offer": offer.to_json()}
    pair.there.ok("migrate_in", args)
    now = pair.there.host.claims.capacity()  # type: ignore[attr-defined]
    assert (free.memory_free_mib - now.memory_free_mib, free.vcpus_free - now.vcpus_free) == (MIB, 2)
    assert now.memory_claimed_mib == 0 and now.domains == 0
    pair.there.refused(
        "host.insufficient_memory", "create", {"name": "x", "memory_mib": 4096, "kernel": str(pair.there.kernel)}
    )
    pair.there.ok("migrate_settle", {"ident": IDENT, "uuid": pair.uuid, "keep": False})
    assert pair.there.host.claims.capacity() == free  # type: ignore[attr-defined]
    pair.settled()


def test_migrate_in_checks_what_it_is_given(pair: Pair) -> None:
    offer = pair.here.toolstack.migration_offer(pair.uuid).to_json()
    good = {"ident": IDENT, "token": "0" * 32, "source": "node1", "mode": "live", "offer": offer}
    for code, change in (
        ("instruction.bad_args", {"token": "short"}),
        ("instruction.bad_args", {"ident": "x"}),
        ("instruction.bad_args", {"mode": "auto"}),
        ("domain.spec_invalid", {"offer": {}}),
        ("domain.spec_invalid", {"offer": {**offer, "spec": {"uuid": "x"}}}),
        ("migration.refused", {"source": "node2"}),
        ("migration.refused", {"offer": {**offer, "memory_mib": -5}}),
        ("migration.refused", {"offer": {**offer, "driver": "xl"}}),
    ):
        pair.there.refused(code, "migrate_in", {**good, **change})
    pair.settled()


def test_migrate_in_that_fails_at_last_leaves_nothing(pair: Pair) -> None:
    offer = pair.here.toolstack.migration_offer(pair.uuid).to_json()
    pair.there.toolstack.inject_error("migration_prepare", InsufficientMemory("gone meanwhile"), when="after")
    args = {"ident": IDENT, "token": "0" * 32, "source": "node1", "mode": "live", "offer": offer}
    pair.there.refused("host.insufficient_memory", "migrate_in", args)
    pair.settled()


def test_settle_of_what_is_not_there(pair: Pair) -> None:
    other = str(uuid_module.uuid4())
    gone = {"ident": IDENT, "uuid": other}
    assert pair.there.ok("migrate_settle", {**gone, "keep": False}) == {"phase": "dropped"}
    pair.there.refused("migration.not_found", "migrate_settle", {**gone, "keep": True})
    offer = pair.here.toolstack.migration_offer(pair.uuid)
    pair.there.toolstack.migration_prepare(offer, ident=IDENT, token="t", owner="x", peer="node1")
    pair.there.refused("migration.unresolved", "migrate_settle", {"ident": IDENT, "uuid": pair.uuid, "keep": True})
    pair.there.ok("migrate_settle", {"ident": IDENT, "uuid": pair.uuid, "keep": False})
    pair.there.ok("migrate_finish", {"ident": IDENT})
    pair.settled()


def test_the_list_can_be_narrowed(pair: Pair) -> None:
    offer = pair.here.toolstack.migration_offer(pair.uuid)
    pair.there.toolstack.migration_prepare(offer, ident=IDENT, token="t", owner="x", peer="node1")
    (told,) = pair.there.ok("migrations", {})["migrations"]
    assert (told["ident"], told["phase"], told["peer"], told["resolve"]) == (IDENT, "waiting", "node1", [])
    other = str(uuid_module.uuid4())
    assert pair.there.ok("migrations", {"ident": other})["migrations"] == []
    assert pair.there.ok("migrations", {"uuid": other})["migrations"] == []
    assert len(pair.there.ok("migrations", {"uuid": pair.uuid, "ident": IDENT})["migrations"]) == 1
    assert dataclasses.asdict(pair.there.toolstack.migration_list()[0])["memory_mib"] == MIB


def test_a_half_that_nobody_connects_to_drops_itself(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    from hypervisor.toolstack.drivers import _fake_mover

    offer = pair.here.toolstack.migration_offer(pair.uuid)
    pair.there.toolstack.migration_prepare(offer, ident=IDENT, token="t", owner="x", peer="node1")
    monkeypatch.setattr(_fake_mover, "WAIT_SECONDS", -1.0)
    assert pair.there.toolstack.migration_status(IDENT).phase is Phase.DROPPED
