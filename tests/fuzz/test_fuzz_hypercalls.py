"""The hypercall fuzzer: a guest that runs real code calls whatever it likes (see docs/fuzzing.md)."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator

import fuzz_checks
import fuzz_run
import harness
import pytest
from fuzz_calls import Generator
from fuzz_machine import FuzzMachine
from fuzz_neighbour import Neighbour
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

LOG = logging.getLogger(__name__)
pytestmark = [
    pytest.mark.skipif(harness.build.available() is not None, reason=str(harness.build.available())),
    pytest.mark.timeout(fuzz_run.SECONDS * 3 + 300),
]


@pytest.fixture
def neighbour() -> Iterator[Neighbour]:
    with Neighbour() as other:
        yield other


@pytest.mark.parametrize(("fill", "share"), [(fuzz_run.programs, 0.4), (fuzz_run.raw, 0.4)], ids=["programs", "raw"])
def test_hostile_calls(fill: fuzz_run.Fill, share: float, neighbour: Neighbour) -> None:
    """No exception but XenError and GuestFault, exact counts, no slow call, a neighbour that notices nothing."""
    summary = fuzz_run.run_machines(fuzz_run.SECONDS * share, fuzz_run.SEED, fill, more=neighbour.faults)
    LOG.warning("%s", summary)
    assert not summary.faults, f"{summary}\n" + "\n".join(summary.faults[:5])
    assert summary.calls > 100 * fuzz_run.SECONDS * share


@settings(
    max_examples=max(10, int(fuzz_run.SECONDS * 4)),
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
@given(rng=st.randoms(use_true_random=False), calm=st.booleans(), count=st.integers(1, 24))
def test_sequences(rng: random.Random, calm: bool, count: int) -> None:
    """Short sequences on fresh machines; hypothesis makes what fails as short as it can."""
    rounds = 0

    def next_program(fuzz: FuzzMachine) -> bool:
        nonlocal rounds
        rounds += 1
        generator = Generator(fuzz, rng, calm=calm)
        fuzz.load([generator.call(number) for number in range(count)])
        return rounds < 4

    fuzz = FuzzMachine(next_program)
    fuzz.check = lambda machine: fuzz_checks.faults(machine.domain)
    fuzz.run()
    assert fuzz.faults == []
    assert fuzz.beats > 0
