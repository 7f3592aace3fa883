"""`reeve domain snapshot` and `revert`: what is asked of the agent, and what is shown of its answer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from agent.cli import snapshot


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, reeve: Any) -> list[tuple[str, Mapping[str, Any]]]:
    found: list[tuple[str, Mapping[str, Any]]] = []

    def ask(_connection: object, verb: str, args: Mapping[str, Any], timeout: float) -> dict[str, Any]:
        assert timeout > args["wait_seconds"]
        found.append((verb, args))
        kept = {"kept_as": "one-before-0"} if verb == "revert" else {}
        domain = reeve.host.list_domains()[0].to_json()
        return {"snapshot": args["name"], "domain": domain, "disks": {"xvda": "/x"}, **kept}

    monkeypatch.setattr(snapshot, "ask", ask)
    return found


def test_the_agent_is_asked(reeve: Any, asked: list[tuple[str, Mapping[str, Any]]]) -> None:
    reeve.domain("web")
    made = reeve("domain", "snapshot", "web", "one", "--wait", "5", "-f", "json").json
    assert (made["name"], made["snapshot"], made["disks"]) == ("web", "one", {"xvda": "/x"})
    reeve("template", "create", "one", "--from-domain", "web", "--keep-running", "-f", "json").json  # noqa: B018
    shown = reeve("domain", "revert", "one", "--keep-as", "two", "--force", "-f", "json").json
    assert (shown["uuid"], shown["kept_as"]) == (made["uuid"], "one-before-0")
    assert asked == [
        ("snapshot", {"uuid": made["uuid"], "name": "one", "wait_seconds": 5.0}),
        ("revert", {"uuid": made["uuid"], "name": "one", "wait_seconds": 60.0, "force": True, "keep_as": "two"}),
    ]


def test_clones_are_asked_for(reeve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[tuple[str, Mapping[str, Any]]] = []

    def ask(_connection: object, verb: str, args: Mapping[str, Any], timeout: float) -> dict[str, Any]:
        assert timeout > args["wait_seconds"]
        found.append((verb, args))
        return {"domains": [domain.to_json() for domain in reeve.host.list_domains()], "downtime_ms": 2.0}

    monkeypatch.setattr(snapshot, "ask", ask)
    uuid = reeve.domain("web").uuid
    (row,) = reeve("domain", "clone", "web", "two", "three", "--paused", "-f", "json").json
    assert (row["uuid"], row["name"]) == (uuid, "web")
    assert found == [("clone", {"uuid": uuid, "names": ["two", "three"], "wait_seconds": 60.0, "start": False})]
    assert reeve("domain", "clone", "nobody", "two", "-f", "json").error["code"] == "domain.not_found"


def test_what_is_not_there(reeve: Any, asked: list[tuple[str, Mapping[str, Any]]]) -> None:
    assert reeve("domain", "snapshot", "web", "one", "-f", "json").error["code"] == "domain.not_found"
    assert reeve("domain", "revert", "one", "-f", "json").error["code"] == "template.not_found"
    assert asked == []
