"""What a running vCPU's time counts as."""

from __future__ import annotations

from collections.abc import Iterator

import harness
import pytest
from harness import GuestRun, running

from hypervisor.cpu.time import RUNSTATE_OFFLINE, RUNSTATE_RUNNING

pytestmark = pytest.mark.skipif(harness.build.available() is not None, reason=str(harness.build.available()))


@pytest.fixture
def runs() -> Iterator[list[GuestRun]]:
    yield from harness.guest_runs()


def test_a_paused_vcpu_is_offline(runs: list[GuestRun]) -> None:
    spin = running(runs, "spin")
    spin.wait_text("spin: spinning")
    vcpu = spin.machine.domain.running
    states = [spin.call(lambda: vcpu.runstate)]
    spin.machine.pause()
    states.append(spin.call(lambda: vcpu.runstate))
    before = list(vcpu.runstate_times)
    spin.machine.unpause()
    spin.call(lambda: None)
    assert any(spin.call(lambda: vcpu.runstate) == RUNSTATE_RUNNING for _ in range(1000))
    assert states == [RUNSTATE_RUNNING, RUNSTATE_OFFLINE]
    assert vcpu.runstate_times[RUNSTATE_OFFLINE] > before[RUNSTATE_OFFLINE]
    assert vcpu.runstate_times[RUNSTATE_RUNNING] == before[RUNSTATE_RUNNING]
