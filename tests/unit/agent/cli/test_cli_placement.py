"""`reeve placement`: what is wrong is listed, what is ours is mended, and nothing else is touched."""

from __future__ import annotations

import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "support"))

from fake_placement import FakePlacement, placement

from agent.conf_placement import PlacementSettings
from agent.journal import Journal
from agent.placement import audit
from agent.placement.allocations import CONSUMER_TYPE
from agent.placement.build import make_allocations, make_client
from agent.placement.inventory import inventories
from agent.resources import ResourceClaims
from agent.wire import Instruction

A = "aaaaaaaa-0000-4000-8000-000000000000"
B = "bbbbbbbb-0000-4000-8000-000000000000"


@pytest.fixture
def server() -> Iterator[FakePlacement]:
    with placement() as made:
        yield made


class Node:
    """A host whose agent has been there and is away."""

    def __init__(self, reeve: Any, server: FakePlacement) -> None:
        assert reeve.options
        with open(reeve.folder / "agent.conf", "a") as file:
            file.write(f"[placement]\nenabled = true\nauth = token\ntoken = admin\nendpoint = {server.url}\n")
        self.reeve, self.server = reeve, server
        (reeve.folder / "agent" / "agent").mkdir(parents=True)
        self.journal = Journal(reeve.folder / "agent" / "agent" / "journal.sqlite")
        self.uuid = self.journal.node_id()
        claims = ResourceClaims(reeve.host, self.journal)
        server._create({"uuid": self.uuid, "name": "testnode"})
        server.providers[self.uuid].inventories = inventories(claims.capacity(), 16.0)

    def claim(self, consumer: str) -> None:
        """An instruction that is under way."""
        ident = str(uuid.uuid4())
        self.journal.accept(Instruction(ident, "create", "testnode", {}))
        self.journal.take_claim(ident, consumer, 64, 1)

    def own(self, consumer: str, **row: int) -> None:
        self.server.put(consumer, self.uuid, dict(row), type=CONSUMER_TYPE, project="reeve")
        self.server.consumers[consumer].user = "reeve"


@pytest.fixture
def node(reeve: Any, server: FakePlacement, monkeypatch: pytest.MonkeyPatch) -> Iterator[Node]:
    monkeypatch.setattr(audit, "SETTLE_SECONDS", 0.0)
    made = Node(reeve, server)
    yield made
    made.journal.close()


def test_show(node: Node) -> None:
    info = node.reeve.domain("web")
    node.own(info.uuid, VCPU=1, MEMORY_MB=info.memory_mib)
    found = node.reeve("placement", "show", "--json").json
    assert (found["uuid"], found["name"], found["allocations"], found["differences"]) == (node.uuid, "testnode", 1, 0)
    assert found["inventories"]["MEMORY_MB"]["used"] == info.memory_mib and found["inventories"]["VCPU"]["used"] == 1
    assert "testnode" in node.reeve("placement", "show").out


def test_audit_lists_and_repair_mends_what_is_ours(node: Node) -> None:
    right, wrong, missing = (node.reeve.domain(name) for name in ("right", "wrong", "missing"))
    size = {"VCPU": 1, "MEMORY_MB": right.memory_mib}
    node.own(right.uuid, **size)
    node.own(wrong.uuid, VCPU=3, MEMORY_MB=32)
    node.own(A, VCPU=1, MEMORY_MB=64)
    node.server.put(B, node.uuid, {"VCPU": 1})
    rows = node.reeve("placement", "audit", "--json").json
    seen = {(row["consumer"], row["name"], row["kind"], row["own"]) for row in rows}
    assert seen == {
        (wrong.uuid, "wrong", "amount", True),
        (missing.uuid, "missing", "missing", True),
        (A, "", "orphan", True),
        (B, "", "orphan", False),
    }
    assert node.server.count("PUT") == 0, "an audit changes nothing"
    rows = node.reeve("placement", "repair", "-f", "json").json
    results = {row["consumer"]: row["result"] for row in rows}
    assert results == {wrong.uuid: "written", missing.uuid: "written", A: "removed", B: "foreign"}
    assert node.server.rows(node.uuid) == {right.uuid: size, wrong.uuid: size, missing.uuid: size, B: {"VCPU": 1}}
    left = node.reeve("placement", "repair", "--json").json
    assert [(row["consumer"], row["result"]) for row in left] == [(B, "foreign")]
    assert "orphan" in node.reeve("placement", "audit").out


def test_a_claim_of_an_instruction_under_way_is_no_orphan(node: Node) -> None:
    node.claim(A)
    node.own(A, VCPU=1, MEMORY_MB=64)
    assert node.reeve("placement", "audit", "--json").json == []


def test_what_is_only_just_changing_is_not_listed(node: Node) -> None:
    claims = ResourceClaims(node.reeve.host, node.journal)
    node.own(A, VCPU=1, MEMORY_MB=64)
    settings = PlacementSettings(enabled=True, endpoint=node.server.url, auth="token", token="admin")
    allocations = make_allocations(settings, make_client(settings, lambda seconds: False)[1], node.uuid)
    pauses: list[float] = []

    def agent_mends(seconds: float) -> None:
        pauses.append(seconds)
        del node.server.consumers[A]

    assert audit.audit(allocations, claims, agent_mends) == [] and len(pauses) == 1
    node.own(A, VCPU=1, MEMORY_MB=64)

    def asked(method: str, path: str) -> None:
        if path.endswith(f"/allocations/{A}"):
            node.claim(A)

    node.server.before = asked
    (found,) = audit.repair(allocations, claims, lambda seconds: None)
    assert found.result == "changed" and A in node.server.rows(node.uuid), "a domain that is coming keeps its own"


def test_what_is_refused_is_said_and_the_rest_is_mended(node: Node) -> None:
    info = node.reeve.domain("web")
    node.own(A, VCPU=1)
    node.server.providers[node.uuid].inventories["MEMORY_MB"]["reserved"] = 16384
    result = node.reeve("placement", "repair", "-f", "json")
    assert result.code == 1 and result.error["code"] == "cli.incomplete"
    assert '"failed"' in result.out and "Unable to allocate" in result.out and '"removed"' in result.out
    assert node.server.rows(node.uuid) == {} and info.uuid in result.out


@pytest.mark.parametrize("command", ["show", "audit", "repair"])
def test_without_what_it_needs(reeve: Any, server: FakePlacement, command: str) -> None:
    result = reeve("placement", command, "--json")
    assert result.error["code"] == "cli.failed" and "enabled" in result.error["message"]
    with open(reeve.folder / "agent.conf", "a") as file:
        file.write(f"[placement]\nenabled = true\nauth = none\nendpoint = {server.url}\n")
    result = reeve("placement", command, "--json")
    assert "journal" in result.error["message"] and not (reeve.folder / "agent" / "agent").exists()


def test_other_drivers_and_no_provider(node: Node) -> None:
    result: Any = node.reeve("--driver", "fake", "placement", "repair", "--json")
    assert result.code == 2 and "--driver" in result.error["message"]
    node.server.providers.clear()
    assert node.reeve("placement", "show", "--json").error["code"] == "placement.no_provider"
    assert node.reeve("placement", "repair", "--json").error["code"] == "placement.no_provider"
