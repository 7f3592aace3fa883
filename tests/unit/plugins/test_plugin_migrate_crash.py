"""Either agent dies at every boundary of a migration, with and without a cut link: one copy runs, and nothing is left.

``tests/integration/test_migration_faults.py`` does it with SIGKILL, brokers and random moments.
"""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pair_rig import IDENT, Killed, Pair, make_pair

from agent import executor
from hypervisor.errors import HostFailure, HostUnavailable
from hypervisor.toolstack.api import MigrationPhase

RUNS = int(os.environ.get("REEVE_MIGRATION_RUNS", "15"))
STEPS = ("check", "prepare", "transfer", "settle", "finish")
FORWARD = [
    "migrate:planned",
    *(f"migrate:{step}:{when}" for step in STEPS for when in ("begun", "ran", "done")),
    "migrate:finishing",
    "migrate:finished",
    "migrate_in:planned",
    *(f"migrate_in:{step}:{when}" for step in ("claim", "admit") for when in ("begun", "ran", "done")),
    "migrate_in:finishing",
    *(f"migrate_settle:settle:{when}" for when in ("begun", "ran", "done")),
    "migrate_settle:finished",
    *(f"migrate_finish:forget:{when}" for when in ("begun", "ran", "done")),
]
BACK = [
    *(f"migrate:{step}:{when}" for step in ("transfer", "prepare", "check") for when in ("undoing", "undone")),
    *(f"migrate_settle:settle:{when}" for when in ("begun", "ran", "done")),
    "migrate_settle:finished",
]


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    (tmp_path / "pair").mkdir()
    with make_pair(tmp_path / "pair") as made:
        yield made


@pytest.mark.parametrize("at", FORWARD)
def test_an_agent_dies_and_the_domain_moves(pair: Pair, monkeypatch: pytest.MonkeyPatch, at: str) -> None:
    reply = pair.live_through(at, monkeypatch)
    if not reply.ok:
        # The target's agent died while the source asked it: nobody knows, so the source keeps the domain.
        assert at.startswith("migrate_in") and reply.error is not None and reply.error["code"] == "reply.timeout"
        assert pair.where() == ("running", "")
        forgotten(pair)
    else:
        assert pair.where() == ("", "running")
        assert pair.info(pair.there).owner == pair.there.host.owner
    pair.settled()


def forgotten(pair: Pair) -> None:
    """What the target's agent was told while it was away it does now."""
    for host in ("node2", "node1"):
        pair.network.resume(host)
    for status in pair.here.toolstack.migration_list():
        assert status.phase is MigrationPhase.KEPT
        pair.here.ok("resolve_migration", {"ident": IDENT, "keep": True, "force": True})


@pytest.mark.parametrize("at", BACK)
@pytest.mark.parametrize("point", ["copying", "complete"])
def test_an_agent_dies_while_it_is_taken_back(pair: Pair, monkeypatch: pytest.MonkeyPatch, at: str, point: str) -> None:
    pair.here.toolstack.inject_link(point)
    reply = pair.live_through(at, monkeypatch)
    assert reply.error is not None and reply.error["code"] == "migration.failed"
    forgotten(pair)
    assert pair.where() == ("running", "")
    pair.settled()


@pytest.mark.parametrize("at", [at for at in FORWARD if at.partition(":")[0] in ("migrate", "migrate_settle")])
def test_an_agent_dies_and_the_link_is_cut_at_the_last_moment(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    pair.here.toolstack.inject_link("moved")
    reply = pair.live_through(at, monkeypatch)
    assert reply.ok, reply.error
    assert pair.where() == ("", "running")
    pair.settled()


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("call", ["migration_start", "migration_forget", "migration_status", "migration_offer"])
def test_the_source_s_driver_fails_for_a_moment(pair: Pair, call: str, when: str) -> None:
    pair.here.toolstack.inject_error(call, HostUnavailable("not now"), when=when)
    reply = pair.migrate()
    if reply.ok:
        assert pair.where() == ("", "running")
    else:
        assert reply.error is not None and reply.error["undone"], reply.error
        assert pair.where() == ("running", "")
    pair.settled()


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("call", ["migration_prepare", "migration_resolve", "migration_forget", "migration_status"])
@pytest.mark.parametrize("error", [HostUnavailable, HostFailure])
def test_the_target_s_driver_fails(pair: Pair, call: str, when: str, error: Any) -> None:
    pair.here.toolstack.inject_link("moved")
    pair.there.toolstack.inject_error(call, error("broken"), when=when)
    reply = pair.migrate()
    if pair.where() == ("", "paused"):
        assert reply.error is not None and not reply.error["undone"]
        pair.there.ok("resolve_migration", {"ident": IDENT, "keep": True})
    assert pair.where() in (("", "running"), ("running", ""))
    for rig in pair.both():
        rig.clean()
        for status in rig.toolstack.migration_list():
            assert status.phase.ended, status


def test_nothing_is_begun_twice(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each life gets a little further."""
    for at in ("migrate:prepare:ran", "migrate:transfer:ran", "migrate:settle:ran", "migrate:finish:ran"):
        _die(pair, monkeypatch, [at])
    pair.restart()
    assert pair.here.reply(IDENT).ok
    assert pair.where() == ("", "running") and pair.info(pair.there).domid == 1
    asked = [(verb, ident) for _host, verb, ident in pair.network.asked]
    assert len(set(asked)) == 3, "what was asked again was the same instruction"
    pair.settled()


def _die(pair: Pair, monkeypatch: pytest.MonkeyPatch, at: list[str]) -> None:
    """A life that ends at one of these."""

    def boundary(name: str) -> None:
        if name in at:
            at.remove(name)
            raise Killed

    monkeypatch.setattr(executor, "boundary", boundary)
    with contextlib.suppress(Killed):
        if pair.here.journal.entry(IDENT) is None:
            pair.here.accept("migrate", {"uuid": pair.uuid, "target": "node2"}, id=IDENT)
        pair.here.executor.run(IDENT)
    monkeypatch.undo()
    for host in ("node1", "node2"):
        pair.network.restart(host)
    pair.network.resume("node2")


@pytest.mark.parametrize("seed", range(RUNS))
def test_random_deaths_and_cuts(pair: Pair, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """Up to three deaths at any boundary and a fault of the link; in the end one copy runs, or a pair says how."""
    chance = random.Random(seed)
    point = chance.choice(["", "starting", "copying", "switching", "complete", "moved"])
    what = chance.choice(["cut", "cut", "cut", "unresolved"])
    if point:
        pair.here.toolstack.inject_link(point, "cut" if point == "moved" else what)
    every = sorted({*FORWARD, *BACK})
    for _ in range(chance.randrange(4)):
        _die(pair, monkeypatch, [chance.choice(every)])
        if chance.random() < 0.3:
            pair.network.down ^= {"node2"}
        pair.network.broken = chance.random() < 0.2
    pair.network.down.clear()
    pair.network.broken = False
    if pair.here.journal.entry(IDENT) is None:
        pair.here.accept("migrate", {"uuid": pair.uuid, "target": "node2"}, id=IDENT)
    pair.restart()
    forgotten_or_resolved(pair)


def forgotten_or_resolved(pair: Pair) -> None:
    if "running" not in pair.where():
        halves = [status for rig in pair.both() for status in rig.ok("migrations")["migrations"]]
        assert any(status["resolve"] for status in halves), (pair.where(), halves)
        assert "paused" in pair.where()
        rig = pair.here if pair.where()[0] else pair.there
        rig.ok("resolve_migration", {"ident": IDENT, "keep": True})
    for rig in pair.both():
        for status in rig.toolstack.migration_list():
            assert status.phase.ended, status
            keep = status.phase in (MigrationPhase.KEPT, MigrationPhase.RUNNING)
            rig.ok("resolve_migration", {"ident": IDENT, "keep": keep, "force": True})
    assert sorted(pair.where()) == ["", "running"]
    pair.settled()
