"""The hypercall fuzzer with a 32-bit PAE guest: the compat calls (see docs/fuzzing.md)."""

from __future__ import annotations

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
@given(
    seed=st.integers(0, (1 << 32) - 1),
    masks=st.lists(st.integers(0, (1 << fuzz_parts.LINES) - 1), min_size=1, max_size=4),
    calm=st.booleans(),
    linear=st.booleans(),
)
def test_sequences(seed: int, masks: list[int], calm: bool, linear: bool) -> None:
    """Short sequences on fresh machines; hypothesis takes calls away from what fails."""
    fuzz_parts.short_sequences(seed, masks, calm=calm, linear=linear, bits=32)
