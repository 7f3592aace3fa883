"""The 32-bit micro-guest on the whole machine: each of its own verdicts, and what the hypervisor says of its memory."""

from __future__ import annotations

from collections.abc import Iterator

import harness
import pytest
from harness import GuestRun, running

from hypervisor.errors import Unsupported

pytestmark = pytest.mark.skipif(harness.build.available() is not None, reason=str(harness.build.available()))


@pytest.fixture
def runs() -> Iterator[list[GuestRun]]:
    yield from harness.guest_runs()


def test_hello32(runs: list[GuestRun]) -> None:
    guest = running(runs, "hello32", cmdline="greet")
    assert guest.wait_end() == harness.EXPECTED_POWEROFF, guest.text
    assert guest.text.startswith("hello32: xen-3.0-x86_32p greet")
    assert guest.failures() == []
    assert guest.text.count("PASS") > 60 and "hello32: done" in guest.text
    assert guest.machine.domain.recount() == []


def test_a_second_vcpu(runs: list[GuestRun]) -> None:
    guest = running(runs, "hello32", vcpus=2)
    assert guest.wait_end() == harness.EXPECTED_POWEROFF, guest.text
    assert guest.failures() == []
    assert "PASS the second vCPU ran" in guest.text
    assert guest.machine.domain.recount() == []


def test_the_public_path_refuses_32_bit_guests_and_says_why() -> None:
    with pytest.raises(Unsupported, match="32-bit guests need the engine's direct path"):
        GuestRun("hello32", public=True)


def test_the_first_frames_of_a_64_bit_guest_are_none_of_its_business(runs: list[GuestRun]) -> None:
    """Two machines of both word sizes in one process: each sees its own machine-to-physical table only."""
    first = running(runs, "hello32", base_mfn=0x20000, domid=7)
    second = running(runs, "hello", cmdline="quit", base_mfn=0x40000, domid=8)
    assert first.wait_end() == harness.EXPECTED_POWEROFF, first.text
    assert second.wait_end() == harness.EXPECTED_POWEROFF, second.text
    assert first.failures() == []
