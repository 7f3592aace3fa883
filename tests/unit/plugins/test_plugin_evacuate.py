"""``evacuate``: each domain by an instruction of its own; told one by one; goes on after a crash."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pair_rig import Killed, Pair, make_pair

from agent import executor
from agent.migrating import derived
from agent.wire import Reply
from hypervisor.errors import CpuIncompatible

IDENT = "22222222-2222-4222-8222-222222222222"


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    (tmp_path / "pair").mkdir()
    with make_pair(tmp_path / "pair") as made:
        for name in ("b", "c", "d"):
            made.here.create(name)
        yield made


def names(rig: Any) -> list[str]:
    return sorted(info.name for info in rig.toolstack.list_domains())


def evacuate(pair: Pair, **args: Any) -> Reply:
    return pair.here.run("evacuate", {"target": "node2", **args}, id=IDENT)


def test_every_domain_moves(pair: Pair) -> None:
    reply = evacuate(pair, at_once=3, mode="live", options={"compress": "zstd"})
    assert reply.ok and reply.result is not None, reply.error
    assert (reply.result["moved"], reply.result["failed"], reply.result["not_begun"], reply.result["skipped"]) == (
        *(4, 0, 0),
        0,
    )
    rows = reply.result["domains"]
    assert {row["name"] for row in rows} == {"web", "b", "c", "d"}
    assert all(row["outcome"] == "moved" and row["downtime_ms"] > 0 for row in rows)
    assert (names(pair.here), names(pair.there)) == ([], ["b", "c", "d", "web"])
    pair.settled()


def test_one_that_fails_does_not_hold_up_the_others(pair: Pair) -> None:
    pair.there.toolstack.inject_error("migration_prepare", CpuIncompatible("it lacks avx512"))
    reply = evacuate(pair)
    assert reply.ok and reply.result is not None
    assert (reply.result["moved"], reply.result["failed"]) == (3, 1)
    (row,) = [row for row in reply.result["domains"] if row["outcome"] == "failed"]
    assert row["error"]["code"] == "cpu.incompatible" and row["migration"] == derived(IDENT, f"migrate:{row['uuid']}")
    assert names(pair.here) == [row["name"]]
    pair.settled()


def test_foreign_and_ended_domains_are_skipped(pair: Pair) -> None:
    pair.here.foreign("theirs")
    pair.here.toolstack.crash(pair.uuid)
    reply = evacuate(pair)
    assert reply.result is not None
    outcomes = {row["name"]: row["outcome"] for row in reply.result["domains"]}
    assert outcomes == {"web": "skipped", "theirs": "skipped", "b": "moved", "c": "moved", "d": "moved"}
    assert names(pair.here) == ["theirs", "web"]


def test_an_empty_host(pair: Pair) -> None:
    assert evacuate(pair).ok
    assert pair.here.ok("evacuate", {"target": "node2"})["domains"] == []


@pytest.mark.parametrize(
    ("code", "args"),
    [
        ("instruction.bad_args", {"target": "node1"}),
        ("instruction.bad_args", {"at_once": 9}),
        ("instruction.bad_args", {"at_once": 0}),
        ("instruction.bad_args", {"mode": "fast"}),
    ],
)
def test_refused(pair: Pair, code: str, args: dict[str, Any]) -> None:
    pair.here.refused(code, "evacuate", {"target": "node2", **args})


def test_the_deadline_leaves_the_rest(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    sent = pair.network.call_all

    def two_only(*args: Any, more: Any, **kwargs: Any) -> None:
        left = [True, True]
        sent(*args, more=lambda: bool(more() and left and left.pop()), **kwargs)

    monkeypatch.setattr(pair.network, "call_all", two_only)
    reply = evacuate(pair)
    assert reply.ok and reply.result is not None
    assert (reply.result["moved"], reply.result["not_begun"]) == (2, 2)
    pair.settled()


@pytest.mark.parametrize(
    "at",
    [
        "evacuate:planned",
        "evacuate:drain:begun",
        "migrate:prepare:ran",
        "migrate:transfer:ran",
        "migrate:finished",
        "evacuate:drain:ran",
        "evacuate:drain:done",
        "evacuate:finishing",
    ],
)
@pytest.mark.parametrize("nth", [1, 3])
def test_it_goes_on_where_it_was(pair: Pair, monkeypatch: pytest.MonkeyPatch, at: str, nth: int) -> None:
    seen = 0

    def boundary(name: str) -> None:
        nonlocal seen
        seen += name == at
        if name == at and seen == (nth if name.startswith("migrate") else 1):
            raise Killed

    ident = pair.here.accept("evacuate", {"target": "node2"}, id=IDENT)
    monkeypatch.setattr(executor, "boundary", boundary)
    with contextlib.suppress(Killed):
        pair.here.executor.run(ident)
    monkeypatch.undo()
    assert seen
    pair.restart()
    reply = pair.here.reply(IDENT)
    assert reply.ok and reply.result is not None, reply.error
    assert reply.result["moved"] == 4 and names(pair.there) == ["b", "c", "d", "web"]
    # Nobody was moved twice: one migrate_in was carried out for each.
    began = {ident for _host, verb, ident in pair.network.asked if verb == "migrate_in"}
    assert len(began) == 4
    pair.settled()


def test_progress_is_told_for_each(pair: Pair) -> None:
    told: list[dict[str, Any]] = []
    pair.here.executor._progress = told.append
    evacuate(pair)
    domains = [data for data in told if data["unit"] == "domains"]
    assert domains[-1]["done"] == domains[-1]["total"] == 4
    pages = [data for data in told if data["unit"] == "pages"]
    assert pages and pages[-1]["phase"] == "moved" and {"rounds", "rate_bytes", "downtime_estimate_ms"} <= set(pages[0])
