from __future__ import annotations

import threading
import uuid
from pathlib import Path

import pytest
from agent_rig import Rig, make_rig

from agent.resources import ResourceClaims
from hypervisor.errors import InsufficientMemory, InsufficientVcpus
from hypervisor.toolstack.drivers.fake import FakeToolstack


@pytest.fixture
def small(tmp_path: Path) -> Rig:
    return make_rig(tmp_path, FakeToolstack(None, cpus=2, memory_mib=1000))


def claims(rig: Rig, **options: float) -> ResourceClaims:
    return ResourceClaims(
        rig.toolstack,
        rig.journal,
        vcpu_ratio=options.get("vcpu_ratio", 2.0),
        reserved_mib=int(options.get("reserved_mib", 0)),
    )


def accepted(rig: Rig, count: int) -> list[str]:
    return [rig.accept("create", {"n": n}) for n in range(count)]


def test_claims_add_up(small: Rig) -> None:
    one, two, three = accepted(small, 3)
    ledger = claims(small)
    ledger.take(one, "d1", 600, 1)
    with pytest.raises(InsufficientMemory, match="needs 500 MiB, the host has 400 MiB left of 1000"):
        ledger.take(two, "d2", 500, 1)
    assert not ledger.holds(two)
    ledger.take(two, "d2", 400, 3)
    with pytest.raises(InsufficientVcpus, match="needs 1 vCPUs, the host has 0 left of 4"):
        ledger.take(three, "d3", 0, 1)
    ledger.release(one)
    ledger.release(one)
    ledger.take(three, "d3", 600, 1)


def test_taking_the_same_claim_again_changes_nothing(small: Rig) -> None:
    (one,) = accepted(small, 1)
    ledger = claims(small)
    ledger.take(one, "d1", 800, 2)
    ledger.take(one, "d1", 800, 2)
    assert ledger.capacity().memory_free_mib == 200


def test_a_claim_whose_domain_exists_is_not_counted_twice(small: Rig) -> None:
    created = small.create("web", memory_mib=300)
    (one,) = accepted(small, 1)
    small.journal.take_claim(one, created, 300, 1)
    capacity = claims(small).capacity()
    assert (capacity.memory_used_mib, capacity.memory_claimed_mib, capacity.memory_free_mib) == (300, 0, 700)
    small.journal.take_claim(one, str(uuid.uuid4()), 300, 1)
    assert claims(small).capacity().memory_free_mib == 400


def test_reserved_memory_and_foreign_domains_count(small: Rig) -> None:
    small.foreign()
    capacity = claims(small, reserved_mib=100).capacity()
    assert (capacity.memory_reserved_mib, capacity.memory_used_mib, capacity.memory_free_mib) == (100, 64, 836)
    assert capacity.vcpus_used == 1 and capacity.domains == 1


def test_claims_survive_a_crash(small: Rig) -> None:
    (one,) = accepted(small, 1)
    claims(small).take(one, "d1", 900, 1)
    assert claims(small).holds(one) and claims(small).capacity().memory_free_mib == 100


def test_a_claim_as_a_context_manager(small: Rig) -> None:
    one, two = accepted(small, 2)
    ledger = claims(small)
    with ledger.held(one, "d1", 100, 1):
        assert ledger.holds(one)
    assert ledger.holds(one)
    with pytest.raises(ZeroDivisionError), ledger.held(two, "d2", 100, 1):
        raise ZeroDivisionError
    assert not ledger.holds(two)


def test_two_claims_at_once_cannot_overcommit(small: Rig) -> None:
    idents = accepted(small, 8)
    ledger = claims(small, vcpu_ratio=100)
    start = threading.Barrier(8)
    won: list[str] = []

    def take(ident: str) -> None:
        start.wait()
        try:
            ledger.take(ident, ident, 300, 1)
            won.append(ident)
        except InsufficientMemory:
            pass

    threads = [threading.Thread(target=take, args=(ident,)) for ident in idents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 3 and ledger.capacity().memory_free_mib == 100


def test_a_domain_that_grows_needs_only_what_it_has_not(small: Rig) -> None:
    created = small.create("web", memory_mib=300, max_memory_mib=900, max_vcpus=2)
    (one,) = accepted(small, 1)
    ledger = claims(small)
    with pytest.raises(InsufficientMemory, match="needs 701 MiB more, the host has 700 MiB left"):
        ledger.take(one, created, 1001, 1)
    with pytest.raises(InsufficientVcpus, match="needs 4 vCPUs more, the host has 3 left of 4"):
        ledger.take(one, created, 300, 5)
    ledger.take(one, created, 900, 2)
    capacity = ledger.capacity()
    assert (capacity.memory_used_mib, capacity.memory_claimed_mib, capacity.memory_free_mib) == (300, 600, 100)
    assert (capacity.vcpus_used, capacity.vcpus_claimed) == (1, 1)
    small.toolstack.set_memory(created, 900)
    capacity = ledger.capacity()
    assert (capacity.memory_used_mib, capacity.memory_claimed_mib, capacity.memory_free_mib) == (900, 0, 100)


def test_what_a_shrinking_guest_gives_back_is_free_only_when_it_is_over(small: Rig) -> None:
    created = small.create("web", memory_mib=900)
    (one,) = accepted(small, 1)
    ledger = claims(small)
    ledger.take(one, created, 900, 1)
    small.toolstack.set_memory(created, 200)
    assert ledger.capacity().memory_free_mib == 100
    ledger.release(one)
    assert ledger.capacity().memory_free_mib == 800


def test_memory_the_guest_has_not_given_back_is_not_free(small: Rig) -> None:
    keeps = small.create("keeps", memory_mib=400, cmdline="fake.memory=keep")
    small.toolstack.set_memory(keeps, 100)
    slow = small.create("slow", memory_mib=64, max_memory_mib=300, cmdline="fake.memory=slow")
    small.toolstack.set_memory(slow, 300)  # it may take that at any time
    assert claims(small).capacity().memory_free_mib == 300


def test_an_overcommitted_host_refuses_growth_and_nothing_else(small: Rig) -> None:
    created = small.create("web", memory_mib=900)
    (one,) = accepted(small, 1)
    ledger = claims(small, reserved_mib=500, vcpu_ratio=0.1)
    ledger.take(one, created, 900, 1)
    with pytest.raises(InsufficientMemory):
        ledger.take(one, created, 901, 1)


def test_a_cold_resize_that_may_be_reverted_keeps_the_larger_size(small: Rig) -> None:
    created = small.create("web", memory_mib=800)
    small.ok("resize", {"uuid": created, "mode": "cold", "memory_mib": 300, "max_memory_mib": 300})
    (one, two) = accepted(small, 2)
    ledger = claims(small)
    assert ledger.capacity().memory_free_mib == 200
    with pytest.raises(InsufficientMemory):
        ledger.take(one, "d1", 201, 0)
    ledger.take(two, created, 800, 1)  # to go back takes nothing more
    assert ledger.capacity().memory_free_mib == 200
