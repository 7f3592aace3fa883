"""The hypercall fuzzer with a 32-bit PAE guest: the compat calls (see docs/fuzzing.md)."""

from __future__ import annotations

import random

import fuzz_parts
import fuzz_run
import harness
import pytest
from fuzz_neighbour import Neighbour
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytestmark = [
    pytest.mark.skipif(harness.build.available() is not None, reason=str(harness.build.available())),
    pytest.mark.timeout(fuzz_run.SECONDS * 3 + 300),
]


@pytest.mark.parametrize(("fill", "share"), [(fuzz_run.programs, 0.5), (fuzz_run.raw, 0.4)], ids=["programs", "raw"])
def test_hostile_calls(fill: fuzz_run.Fill, share: float, neighbour: Neighbour) -> None:
    fuzz_parts.hostile_calls(fill, share, neighbour, 32)


@settings(
    max_examples=max(10, int(fuzz_run.SECONDS)),
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
@given(rng=st.randoms(use_true_random=False), calm=st.booleans(), linear=st.booleans(), count=st.integers(1, 24))
def test_sequences(rng: random.Random, calm: bool, linear: bool, count: int) -> None:
    """Short sequences on fresh machines; hypothesis makes what fails as short as it can."""
    fuzz_parts.short_sequences(rng, calm, linear, count, 32)
