"""The page-table fuzzer on 32-bit PAE domains (see docs/fuzzing.md)."""

from __future__ import annotations

import random

import fuzz_parts
import fuzz_run
import harness
import pytest
from fuzz_neighbour import Neighbour
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.timeout(fuzz_run.SECONDS * 3 + 300)


def test_tables_with_a_greedy_tlb() -> None:
    fuzz_parts.greedy_tables(0.5, 32)


@settings(
    max_examples=max(5, int(fuzz_run.SECONDS * 2)),
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
@given(rng=st.randoms(use_true_random=False), linear=st.booleans(), count=st.integers(1, 60))
def test_table_sequences(rng: random.Random, linear: bool, count: int) -> None:
    """The same, drawn by hypothesis, which makes what fails as short as it can."""
    steps = fuzz_parts.table_steps(32, rng, linear=linear)
    for _ in range(count):
        assert steps.step() == []


@pytest.mark.skipif(harness.build.available() is not None, reason=str(harness.build.available()))
def test_tables_with_the_engine(neighbour: Neighbour) -> None:
    fuzz_parts.engine_tables(0.4, neighbour, 32)
