"""Allocations follow the claims: through creates, resizes, failures, migrations and agents that die."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from agent_rig import Rig
from fake_placement import FakePlacement
from pair_rig import Killed, Pair, make_pair
from placement_rig import HOST, OTHER, Node, make_node

from agent import executor
from agent.placement.allocations import CONSUMER_TYPE, Difference, Kind, compare
from agent.placement.reconciler import AGAIN_SECONDS
from agent.resources import Share

A = "aaaaaaaa-0000-4000-8000-000000000000"
B = "bbbbbbbb-0000-4000-8000-000000000000"


def row(vcpus: int, memory_mib: int) -> dict[str, int]:
    return {"VCPU": vcpus, "MEMORY_MB": memory_mib}


@pytest.fixture
def node(rig: Rig, server: FakePlacement) -> Node:
    made = make_node(rig, server)
    made.full()
    return made


def test_the_comparison_frees_before_it_takes() -> None:
    found = {A: row(2, 512), B: row(1, 64), HOST: row(1, 100)}
    shares = {A: Share(256, 2), OTHER: Share(1024, 4), HOST: Share(100, 1)}
    assert compare(found, shares) == [
        Difference(A, Kind.AMOUNT, row(2, 512), row(2, 256)),
        Difference(B, Kind.ORPHAN, row(1, 64), {}),
        Difference(OTHER, Kind.MISSING, {}, row(4, 1024)),
    ]
    assert compare({}, {A: Share(0, 0)}) == [] and compare({A: {"VCPU": 1}}, {A: Share(0, 1)}) == []


def test_what_a_scheduler_has_added_to_a_row_counts_for_nothing_and_stays(node: Node) -> None:
    assert compare({A: {**row(1, 64), "DISK_GB": 3}}, {A: Share(64, 1)}) == []
    assert [item.kind for item in compare({A: {"DISK_GB": 3}}, {})] == [Kind.ORPHAN]
    uuid = node.rig.create()
    node.quick()
    stock = {"total": 9, "reserved": 0, "min_unit": 1, "max_unit": 9, "step_size": 1, "allocation_ratio": 1.0}
    node.server.providers[HOST].inventories["DISK_GB"] = stock
    node.server.consumers[uuid].allocations[HOST] = {**row(3, 64), "DISK_GB": 3}
    node.quick()
    assert node.rows() == {uuid: {**row(1, 64), "DISK_GB": 3}}
    node.rig.ok("destroy", {"uuid": uuid})
    node.quick()
    assert node.rows() == {}


def test_a_domain_comes_is_resized_and_goes(node: Node) -> None:
    uuid = node.rig.create(vcpus=2)
    node.quick()
    assert node.rows() == {uuid: row(2, 64)}
    consumer = node.server.consumers[uuid]
    assert (consumer.project, consumer.user, consumer.type) == ("reeve", "reeve", CONSUMER_TYPE)
    node.rig.ok("resize", {"uuid": uuid, "mode": "cold", "memory_mib": 128, "vcpus": 3})
    node.quick()
    assert node.rows() == {uuid: row(3, 128)}
    node.rig.ok("confirm_resize", {"uuid": uuid})
    node.rig.ok("resize", {"uuid": uuid, "mode": "cold", "memory_mib": 96, "vcpus": 1})
    node.quick()
    assert node.rows() == {uuid: row(3, 128)}, "what may still be reverted is held"
    node.rig.ok("confirm_resize", {"uuid": uuid})
    node.quick()
    assert node.rows() == {uuid: row(1, 96)}
    node.rig.ok("destroy", {"uuid": uuid})
    node.quick()
    assert node.rows() == {} and node.server.consumers == {}


def test_a_foreign_domain_of_the_host_has_an_allocation_too(node: Node) -> None:
    uuid = node.rig.foreign()
    node.quick()
    assert node.rows() == {uuid: row(1, 64)}


def test_a_claim_is_told_before_its_domain_is_there_and_a_failure_takes_it_back(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, Any]] = []

    def build(spec: Any) -> Any:
        node.quick()
        seen.append(node.rows())
        raise OSError("no")

    monkeypatch.setattr(node.rig.toolstack, "create", build)
    args = {"name": "web", "memory_mib": 64, "kernel": str(node.rig.kernel), "uuid": A}
    assert not node.rig.run("create", args).ok
    node.quick()
    assert seen == [{A: row(1, 64)}] and node.rows() == {}


@pytest.mark.parametrize("verb", ["create", "resize", "destroy"])
@pytest.mark.parametrize("when", ["begun", "ran"])
def test_an_agent_that_dies_leaves_no_orphan(
    tmp_path: Path, rig: Rig, server: FakePlacement, monkeypatch: pytest.MonkeyPatch, verb: str, when: str
) -> None:
    node = make_node(rig, server)
    uuid = A if verb == "create" else rig.create()
    node.full()
    args: dict[str, Any] = {"uuid": uuid}
    if verb == "create":
        args |= {"name": "web", "memory_mib": 64, "kernel": str(rig.kernel)}
    if verb == "resize":
        args |= {"mode": "cold", "vcpus": 2}
    last = {"create": "build", "resize": "redefine", "destroy": "destroy"}[verb]

    def boundary(name: str) -> None:
        if name == f"{verb}:{last}:{when}":
            raise Killed

    monkeypatch.setattr(executor, "boundary", boundary)
    ident = rig.accept(verb, args)
    with pytest.raises(Killed):
        rig.executor.run(ident)
    monkeypatch.undo()
    # Another process: what the dead one knew is gone, and what it had told Placement is not.
    again = make_node(rig, server)
    again.full()
    assert again.rows() == {} if (verb, when) == ("destroy", "ran") else set(again.rows()) == {uuid}
    rig.executor.run(ident)
    again.quick()
    expected = {"create": {uuid: row(1, 64)}, "resize": {uuid: row(2, 64)}, "destroy": {}}[verb]
    assert again.rows() == expected


def test_what_is_a_schedulers_is_never_touched(node: Node) -> None:
    uuid = node.rig.create()
    node.server.put(uuid, HOST, row(4, 512))
    node.server.put(A, HOST, row(1, 32))
    node.server.put(B, OTHER, row(1, 32))
    before = {key: dict(value.allocations) for key, value in node.server.consumers.items()}
    node.full()
    assert {key: dict(value.allocations) for key, value in node.server.consumers.items()} == before
    assert {item.consumer: item.kind for item in node.made.status.foreign} == {uuid: Kind.AMOUNT, A: Kind.ORPHAN}
    node.rig.ok("destroy", {"uuid": uuid})
    node.full()
    assert set(node.rows()) == {uuid, A}, "whoever wrote it takes it back"


@pytest.mark.parametrize("mark", [{"project": "other"}, {"type": "INSTANCE"}])
def test_each_mark_counts(node: Node, mark: dict[str, str]) -> None:
    node.server.put(A, HOST, row(1, 32), **{"type": CONSUMER_TYPE, "project": "reeve", **mark})
    node.server.consumers[A].user = "reeve"
    node.full()
    assert set(node.rows()) == {A}


def test_an_orphan_of_ours_goes_and_its_part_elsewhere_stays(node: Node) -> None:
    node.server.providers[OTHER] = node.server.providers[HOST]
    node.server.put(A, HOST, row(1, 32), type=CONSUMER_TYPE, project="reeve")
    node.server.put(A, OTHER, row(1, 48), type=CONSUMER_TYPE, project="reeve")
    node.server.consumers[A].user = "reeve"
    node.full()
    assert node.rows() == {} and node.server.consumers[A].allocations == {OTHER: row(1, 48)}


def test_a_change_of_the_consumer_meanwhile_is_met(node: Node) -> None:
    uuid = node.rig.create()
    done: list[str] = []

    def meanwhile(method: str, path: str) -> None:
        if method == "PUT" and path.endswith(uuid) and len(done) < 2:
            done.append(path)
            node.server.put(uuid, OTHER, row(1, 64), type=CONSUMER_TYPE, project="reeve")
            node.server.consumers[uuid].user = "reeve"

    node.server.providers[OTHER] = node.server.providers[HOST]
    node.server.before = meanwhile
    node.quick()
    assert len(done) == 2 and node.server.consumers[uuid].allocations == {OTHER: row(1, 64), HOST: row(1, 64)}


def test_one_that_is_refused_does_not_keep_the_others_from_being_mended(node: Node) -> None:
    big, small = node.rig.create("big", memory_mib=1024), node.rig.create("small")
    node.claims.reserved_mib = 16384 - 512
    node.quick()
    assert node.rows() == {small: row(1, 64)} and "Unable to allocate" in node.made.status.refused
    assert [item.consumer for item in node.made.status.left] == [big]
    third = node.rig.foreign("third")
    node.quick()
    assert set(node.rows()) == {small, third}, "changes of others are told at once"
    node.rig.toolstack.destroy(third)
    node.claims.reserved_mib = 0
    node.full()
    assert node.rows() == {big: row(1, 1024), small: row(1, 64)}
    assert node.made.status.left == () and node.made.status.refused == ""


def test_others_that_are_quicker_each_time_are_met_again_soon(node: Node) -> None:
    uuid = node.rig.create()

    def meanwhile(method: str, path: str) -> None:
        if method == "PUT" and path.endswith(uuid):
            node.server.put(uuid, OTHER, row(1, 64), type=CONSUMER_TYPE, project="reeve")
            node.server.consumers[uuid].user = "reeve"

    node.server.providers[OTHER] = node.server.providers[HOST]
    node.server.before = meanwhile
    node.made._stop.set()  # the client makes no pauses, and one attempt
    assert node.made.step() == AGAIN_SECONDS and [item.consumer for item in node.made.status.left] == [uuid]
    node.server.before = None
    node.made.step()
    assert node.rows() == {uuid: row(1, 64)} and node.made.status.left == ()


def test_with_audit_nothing_is_written(rig: Rig, server: FakePlacement) -> None:
    node = make_node(rig, server, allocations="audit")
    uuid = rig.create()
    server.put(A, HOST, row(1, 32))
    node.full()
    assert set(node.rows()) == {A}
    assert [item.consumer for item in node.made.status.left] == [uuid]
    assert [item.consumer for item in node.made.status.foreign] == [A]
    node.made.write = True
    node.quick()
    assert set(node.rows()) == {A, uuid}


# Two hosts


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    (tmp_path / "pair").mkdir()
    with make_pair(tmp_path / "pair") as made:
        yield made


@pytest.fixture
def nodes(pair: Pair, server: FakePlacement) -> tuple[Node, Node]:
    made = make_node(pair.here, server), make_node(pair.there, server, OTHER)
    for node in made:
        node.full()
    return made


def test_a_migration_moves_the_allocation(pair: Pair, nodes: tuple[Node, Node], server: FakePlacement) -> None:
    here, there = nodes
    assert here.rows() == {pair.uuid: row(2, 256)}
    assert pair.migrate().ok
    there.quick()
    assert server.consumers[pair.uuid].allocations == {HOST: row(2, 256), OTHER: row(2, 256)}
    here.quick()
    assert server.consumers[pair.uuid].allocations == {OTHER: row(2, 256)}


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_during_a_migration_both_hosts_say_what_they_hold(
    pair: Pair,
    nodes: tuple[Node, Node],
    server: FakePlacement,
    monkeypatch: pytest.MonkeyPatch,
    order: tuple[int, int],
) -> None:
    both = []

    def boundary(name: str) -> None:
        for node in (nodes[order[0]], nodes[order[1]]):
            node.quick()
            assert set(node.rows()) == set(node.claims.shares()[1]), name
        if len(server.consumers[pair.uuid].allocations) == 2:
            both.append(name)

    monkeypatch.setattr(executor, "boundary", boundary)
    assert pair.migrate().ok
    monkeypatch.undo()
    assert both
    for node in nodes:
        node.full()
    assert server.consumers[pair.uuid].allocations == {OTHER: row(2, 256)}


@pytest.mark.parametrize("at", ["migrate_in:claim:ran", "migrate:transfer:ran", "migrate_settle:settle:begun"])
def test_a_migration_in_which_an_agent_dies(
    pair: Pair, nodes: tuple[Node, Node], server: FakePlacement, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    pair.live_through(at, monkeypatch)
    for node in nodes:
        again = make_node(node.rig, server, node.uuid)
        again.full()
        assert set(again.rows()) == set(again.claims.shares()[1])
    where = [uuid for uuid, state in zip((HOST, OTHER), pair.where(), strict=True) if state]
    assert server.consumers[pair.uuid].allocations == {where[0]: row(2, 256)} and len(where) == 1
