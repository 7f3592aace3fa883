"""The page-table fuzzer: after each step nothing is reachable that must not be, all counts are exact."""

from __future__ import annotations

import logging
import random
import time

import fuzz_checks
import fuzz_run
import harness
import pytest
from fuzz_calls import Generator
from fuzz_machine import TOUCH, Call, FuzzMachine
from fuzz_tables import Steps, TableRig
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

LOG = logging.getLogger(__name__)
pytestmark = pytest.mark.timeout(fuzz_run.SECONDS * 3 + 300)
STEPS = 400
"""Steps with one domain: then most of its frames are pinned or given away, and a fresh one finds more."""


def test_tables_with_a_greedy_tlb() -> None:
    """On the domain alone, with translations that never go by themselves: thousands of steps a second."""
    end = time.monotonic() + fuzz_run.SECONDS * 0.4
    domains = 0
    while time.monotonic() < end:
        seed = fuzz_run.SEED + domains
        steps = Steps(TableRig(), random.Random(seed))
        for _ in range(STEPS):
            assert steps.step() == [], f"seed {seed}"
        domains += 1
    assert domains >= 1


@settings(
    max_examples=max(5, int(fuzz_run.SECONDS * 2)),
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
@given(rng=st.randoms(use_true_random=False), count=st.integers(1, 60))
def test_table_sequences(rng: random.Random, count: int) -> None:
    """The same, drawn by hypothesis, which makes what fails as short as it can."""
    steps = Steps(TableRig(), rng)
    for _ in range(count):
        assert steps.step() == []


def touch_all(fuzz: FuzzMachine, generator: Generator) -> Call:
    """A write through each mapping that the guest may think it has, of a value that no table may hold."""
    if generator.rng.randrange(2):
        first = fuzz.where["arena"]
        last = first + (fuzz.where["arena_pages"] << 12)
    else:
        first = fuzz.where["window"]
        last = first + (24 << 12)
    return Call(0, (first, last, generator.rng.randrange(512) * 8, fuzz_checks.POISON), kind=TOUCH)


def tables(fuzz: FuzzMachine, generator: Generator) -> None:
    """Changes of page tables, and writes through what the TLB still holds after each."""
    makers = (
        *[generator.mmu_update, generator.update_va, generator.mmuext, generator.access] * 3,
        *[generator.memory_op, generator.grant, generator.descriptor_tables],
    )
    program: list[Call] = []
    while len(program) < 30:
        program.append(generator.rng.choice(makers)(len(program)))
        if generator.rng.randrange(3):
            program.append(touch_all(fuzz, generator))
    fuzz.load(program)


@pytest.mark.skipif(harness.build.available() is not None, reason=str(harness.build.available()))
@pytest.mark.parametrize("public", [False, True], ids=["direct", "public"])
def test_tables_with_the_engine(public: bool) -> None:
    """The engine's own TLB and code: whatever the guest writes, no table and no descriptor changes by it."""
    share = 0.1 if public else 0.4
    summary = fuzz_run.run_machines(fuzz_run.SECONDS * share, fuzz_run.SEED, tables, calm=True, public=public)
    LOG.warning("%s", summary)
    assert not summary.faults, f"{summary}\n" + "\n".join(summary.faults[:5])
    assert summary.calls > 20 * fuzz_run.SECONDS * share, str(summary)


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
