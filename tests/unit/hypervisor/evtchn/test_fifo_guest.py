"""The FIFO event ABI with a guest that runs real code; see tests/guests/fifo.c for its cases."""

from __future__ import annotations

from collections.abc import Iterator

import harness
import pytest

pytestmark = pytest.mark.skipif(harness.build.available() is not None, reason=str(harness.build.available()))


@pytest.fixture
def runs() -> Iterator[list[harness.GuestRun]]:
    yield from harness.guest_runs()


def test_a_guest_switches_to_fifo_and_back(runs: list[harness.GuestRun]) -> None:
    run = harness.GuestRun("fifo", cmdline="console_io")
    runs.append(run)
    run.machine.domain.console = run.log.write
    ended = run.start().wait_end()
    assert run.failures() == [] and "fifo: OK" in run.text
    assert ended == harness.EXPECTED_POWEROFF
    assert run.machine.domain.recount() == []
    assert len(run.machine.domain.fifo.held_frames()) == 2
