"""The page-table fuzzer: after each step nothing is reachable that must not be, all counts are exact."""

from __future__ import annotations

import random

import fuzz_checks
import fuzz_parts
import fuzz_run
import harness
import pytest
from fuzz_machine import TOUCH, Call, FuzzMachine
from fuzz_neighbour import Neighbour
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.timeout(fuzz_run.SECONDS * 3 + 300)


def test_tables_with_a_greedy_tlb() -> None:
    fuzz_parts.greedy_tables(0.4, 64)


@settings(
    max_examples=max(5, int(fuzz_run.SECONDS * 2)),
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
@given(rng=st.randoms(use_true_random=False), linear=st.booleans(), count=st.integers(1, 60))
def test_table_sequences(rng: random.Random, linear: bool, count: int) -> None:
    """The same, drawn by hypothesis, which makes what fails as short as it can."""
    steps = fuzz_parts.table_steps(64, rng, linear=linear)
    for _ in range(count):
        assert steps.step() == []


@pytest.mark.skipif(harness.build.available() is not None, reason=str(harness.build.available()))
@pytest.mark.parametrize("public", [False, True], ids=["direct", "public"])
def test_tables_with_the_engine(public: bool, neighbour: Neighbour) -> None:
    fuzz_parts.engine_tables(0.1 if public else 0.4, neighbour, 64, public=public)


@pytest.mark.skipif(harness.build.available() is not None, reason=str(harness.build.available()))
def test_poison_is_noticed() -> None:
    """The fuzzer itself: a table frame that the guest could write is found."""

    def next_program(fuzz: FuzzMachine) -> bool:
        # As if the hypervisor had forgotten to refuse it: the guest's own mapping of a table becomes writable.
        at = fuzz.domain.guest.l1_slot(fuzz.where["window_l1"])
        fuzz.domain.memory.words[at] |= 2
        fuzz.domain.engine.flush_all()
        fuzz.load(
            [Call(0, (fuzz.where["window_l1"], fuzz.where["window_l1"] + 1, 800, fuzz_checks.POISON), kind=TOUCH)]
        )
        return fuzz.beats < 2

    fuzz = FuzzMachine(next_program)
    fuzz.check = lambda machine: fuzz_checks.poison_faults(machine.domain)
    fuzz.run()
    assert any("the guest wrote slot 100" in fault for fault in fuzz.faults), fuzz.faults
