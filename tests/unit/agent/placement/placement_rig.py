"""An agent on the fake driver whose Placement is the fake one; no thread runs."""

from __future__ import annotations

import dataclasses
from typing import Any

from agent_rig import Rig
from fake_placement import FakePlacement

from agent.conf_placement import PlacementSettings
from agent.placement.build import make_reconciler
from agent.placement.reconciler import Reconciler
from agent.resources import ResourceClaims

HOST = "11111111-1111-4111-8111-111111111111"
OTHER = "22222222-2222-4222-8222-222222222222"
AGGREGATE = "44444444-4444-4444-8444-444444444444"


@dataclasses.dataclass
class Clock:
    now: float = 1000.0

    def __call__(self) -> float:
        return self.now


@dataclasses.dataclass
class Node:
    """:ivar rig: whose claims are told. :ivar uuid: of its provider."""

    rig: Rig
    server: FakePlacement
    made: Reconciler
    clock: Clock
    uuid: str = HOST

    @property
    def claims(self) -> ResourceClaims:
        claims = self.rig.host.claims
        assert isinstance(claims, ResourceClaims)
        return claims

    def rows(self) -> dict[str, dict[str, int]]:
        return self.server.rows(self.uuid)

    def full(self) -> None:
        """A full round that succeeds."""
        self.clock.now += 10_000
        self.made.step()
        assert self.made.status.error == ""

    def quick(self) -> None:
        """What happens on a change."""
        self.made.step()
        assert self.made.status.error == ""


def make_node(rig: Rig, server: FakePlacement, uuid: str = HOST, **options: Any) -> Node:
    clock = Clock()
    given: dict[str, Any] = {"enabled": True, "endpoint": server.url, "auth": "token", "token": "admin", "timeout": 5.0}
    settings = PlacementSettings(**{**given, "provider_name": rig.host.name, **options})
    claims = rig.host.claims
    assert isinstance(claims, ResourceClaims)
    made = make_reconciler(settings, uuid, claims, rig.toolstack)
    assert made is not None
    made._clock = clock
    made._due = 0.0
    return Node(rig, server, made, clock, uuid)
