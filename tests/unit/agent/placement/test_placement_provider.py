"""Provider, inventory, traits and aggregates, as the reconciler keeps them."""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from typing import Any

import pytest
from agent_rig import Rig
from fake_placement import FakePlacement, FakeProvider
from placement_rig import AGGREGATE, HOST, OTHER, make_node

from agent.placement import inventory, reconciler
from agent.resources import Capacity
from hypervisor.errors import HostUnavailable
from hypervisor.toolstack.api import HostInfo

CAPACITY = Capacity(
    memory_total_mib=1000,
    memory_reserved_mib=100,
    memory_used_mib=0,
    memory_claimed_mib=0,
    memory_free_mib=900,
    cpus=4,
    vcpus_total=10,
    vcpus_used=0,
    vcpus_claimed=0,
    vcpus_free=10,
    domains=0,
)


def test_inventories_are_what_the_claims_count() -> None:
    found = inventory.inventories(CAPACITY, 2.5)
    assert found == {
        "VCPU": {
            "total": 4, "reserved": 0, "min_unit": 1, "max_unit": 10, "step_size": 1, "allocation_ratio": 2.5
        },
        "MEMORY_MB": {
            "total": 1000, "reserved": 100, "min_unit": 1, "max_unit": 900, "step_size": 1, "allocation_ratio": 1.0
        },
    }  # fmt: skip
    beyond = dataclasses.replace(CAPACITY, memory_reserved_mib=5000)
    assert inventory.inventories(beyond, 2.5)["MEMORY_MB"] | {"total": 0} == {
        "total": 0, "reserved": 1000, "min_unit": 1, "max_unit": 1, "step_size": 1, "allocation_ratio": 1.0
    }  # fmt: skip
    assert set(inventory.inventories(dataclasses.replace(CAPACITY, memory_total_mib=0), 1.0)) == {"VCPU"}


def test_a_ratio_in_single_precision_is_the_same() -> None:
    wanted = inventory.inventories(CAPACITY, 0.1)
    kept = {name: dict(row, allocation_ratio=row["allocation_ratio"] * (1 + 1e-8)) for name, row in wanted.items()}
    assert inventory.same(kept, wanted)
    kept["VCPU"]["allocation_ratio"] = 0.2
    assert not inventory.same(kept, wanted)


def test_traits_are_of_the_driver_and_of_what_every_guest_has() -> None:
    host = HostInfo("node1", "embedded", "1", 4, 1000, 1000, 0, ("live-migration", "pv"))
    own = {"CUSTOM_REEVE", "CUSTOM_REEVE_DRIVER_EMBEDDED", "CUSTOM_REEVE_LIVE_MIGRATION", "CUSTOM_REEVE_PV"}
    assert inventory.traits(host) == own
    told = dataclasses.replace(host, detail=(("cpu_features", "lm sse2 sse4_1 something"),))
    assert inventory.traits(told) == own | {"HW_CPU_X86_SSE2", "HW_CPU_X86_SSE41"}


def test_the_first_round_tells_everything_and_the_next_nothing(rig: Rig, server: FakePlacement) -> None:
    node = make_node(rig, server, aggregates=(AGGREGATE,))
    node.full()
    provider = server.providers[HOST]
    assert provider.name == "node1" and provider.aggregates == {AGGREGATE}
    assert provider.inventories["VCPU"] == inventory.inventories(node.claims.capacity(), 16.0)["VCPU"]
    assert provider.inventories["MEMORY_MB"]["total"] == 16384
    assert {"CUSTOM_REEVE", "CUSTOM_REEVE_DRIVER_FAKE"} <= provider.traits
    puts = server.count("PUT")
    node.full()
    assert server.count("PUT") == puts
    asked = len(server.asked)
    node.quick()
    assert len(server.asked) - asked == 1, "between full rounds only the allocations are looked at"


def test_a_change_of_the_ratio_is_told_at_once(rig: Rig, server: FakePlacement) -> None:
    node = make_node(rig, server)
    node.full()
    node.claims.vcpu_ratio, node.claims.reserved_mib = 4.0, 384
    node.quick()
    found = server.providers[HOST].inventories
    assert found["VCPU"]["allocation_ratio"] == 4.0 and found["VCPU"]["max_unit"] == 32
    assert found["MEMORY_MB"]["reserved"] == 384 and found["MEMORY_MB"]["max_unit"] == 16000


def test_what_others_have_added_stays_and_what_was_ours_goes(rig: Rig, server: FakePlacement) -> None:
    disk = {"total": 9, "reserved": 0, "min_unit": 1, "max_unit": 9, "step_size": 1, "allocation_ratio": 1.0}
    server.known_traits |= {"CUSTOM_GOLD", "CUSTOM_REEVE_OLD"}
    server.providers[HOST] = FakeProvider(
        "node1", 7, {"DISK_GB": disk}, {"CUSTOM_GOLD", "CUSTOM_REEVE_OLD", "HW_CPU_X86_AVX2", "COMPUTE_NODE"}, {OTHER}
    )
    make_node(rig, server, aggregates=(AGGREGATE,)).full()
    provider = server.providers[HOST]
    assert provider.inventories["DISK_GB"] == disk and len(provider.inventories) == 3
    assert {"CUSTOM_GOLD", "COMPUTE_NODE"} <= provider.traits
    assert not {"CUSTOM_REEVE_OLD", "HW_CPU_X86_AVX2"} & provider.traits
    assert provider.aggregates == {OTHER, AGGREGATE}


def test_another_host_name_renames_the_provider(rig: Rig, server: FakePlacement) -> None:
    make_node(rig, server).full()
    make_node(rig, server, provider_name="node-one").full()
    assert {uuid: provider.name for uuid, provider in server.providers.items()} == {HOST: "node-one"}


def test_a_name_that_is_taken_makes_no_second_provider(rig: Rig, server: FakePlacement) -> None:
    server.providers[OTHER] = FakeProvider("node1")
    node = make_node(rig, server)
    node.made.step()
    assert OTHER in node.made.status.error and "provider_uuid" in node.made.status.error
    assert list(server.providers) == [OTHER]
    node = make_node(rig, server, provider_uuid=OTHER)
    node.full()
    assert list(server.providers) == [OTHER] and server.providers[OTHER].inventories


@pytest.mark.parametrize("what", ["inventories", "traits", "aggregates"])
def test_a_change_by_others_meanwhile_is_met(rig: Rig, server: FakePlacement, what: str) -> None:
    done = []

    def meanwhile(method: str, path: str) -> None:
        if method == "PUT" and path.endswith(what) and not done:
            done.append(path)
            server.providers[HOST].generation += 1
            server.providers[HOST].traits.add("COMPUTE_NODE")

    server.before = meanwhile
    node = make_node(rig, server, aggregates=(AGGREGATE,))
    node.full()
    provider = server.providers[HOST]
    assert done and "COMPUTE_NODE" in provider.traits and "CUSTOM_REEVE" in provider.traits
    assert provider.aggregates == {AGGREGATE} and len(provider.inventories) == 2


def test_a_provider_that_somebody_removed_is_made_again(rig: Rig, server: FakePlacement) -> None:
    node = make_node(rig, server)
    node.full()
    server.providers.clear()
    node.made.step()
    assert node.made.status.error
    node.full()
    assert server.providers[HOST].inventories


def test_failures_are_tried_again_ever_more_seldom_and_told_once(
    rig: Rig, server: FakePlacement, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "agent.placement")
    node = make_node(rig, server, interval=60)
    server.tokens = set()
    pauses = []
    for _ in range(8):
        pauses.append(node.made.step())
        node.clock.now += pauses[-1]
    assert pauses == [2, 4, 8, 16, 32, 60, 60, 60]
    assert sum("not up to date" in message for message in caplog.messages) == 1
    assert reconciler.gauges(node.made, node.clock)["placement_up"] == 0
    server.tokens = None
    assert node.made.step() == 60 and "knows of this host again" in caplog.text
    node.clock.now += 7
    found = reconciler.gauges(node.made, node.clock)
    assert (found["placement_up"], found["placement_age_seconds"]) == (1, 7)


def test_a_driver_that_does_not_answer_changes_nothing(
    rig: Rig, server: FakePlacement, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = make_node(rig, server)
    uuid = rig.create()
    node.full()

    def away() -> Any:
        raise HostUnavailable("the host process is away")

    monkeypatch.setattr(rig.toolstack, "list_domains", away)
    asked = len(server.asked)
    node.clock.now += 1000
    node.made.step()
    assert node.made.status.error == "the host process is away" and len(server.asked) == asked
    assert set(node.rows()) == {uuid}


def until(condition: Any) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        threading.Event().wait(0.005)


def test_the_thread_wakes_on_changes_and_tells_the_last_one(
    rig: Rig, server: FakePlacement, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reconciler, "SETTLE_SECONDS", 0.01)
    node = make_node(rig, server, interval=3600)
    node.made.start()
    until(lambda: node.made.status.synced is not None)
    uuid = rig.create()
    until(lambda: set(node.rows()) == {uuid})
    monkeypatch.setattr(reconciler, "SETTLE_SECONDS", 60)
    rig.ok("destroy", {"uuid": uuid})
    node.made.stop()
    assert not node.made.alive() and node.rows() == {}


def test_a_server_that_hangs_keeps_nobody_waiting(
    rig: Rig, server: FakePlacement, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reconciler, "END_SECONDS", 0.05)
    server.misdeeds.append(lambda handler: handler.server.over.wait(30))
    node = make_node(rig, server, timeout=60.0)
    node.made.start()
    until(lambda: server.asked)
    begun = time.monotonic()
    rig.create()
    node.made.stop()
    assert time.monotonic() - begun < 5 and not node.made.alive()
