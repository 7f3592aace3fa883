"""A guest that grants to itself, on the real engine."""

from __future__ import annotations

from collections.abc import Iterator

import harness
import pytest
from harness import GuestRun, running

pytestmark = pytest.mark.skipif(harness.build.available() is not None, reason=str(harness.build.available()))


@pytest.fixture
def runs() -> Iterator[list[GuestRun]]:
    yield from harness.guest_runs()


@pytest.mark.parametrize("public", [False, True], ids=["direct", "public"])
def test_grants(runs: list[GuestRun], public: bool) -> None:
    guest = running(runs, "grants", public=public)
    assert guest.wait_end() == harness.EXPECTED_POWEROFF
    assert guest.failures() == [] and "grants: OK" in guest.text, guest.text[-2000:]
    domain = guest.machine.domain
    assert domain.recount() == []
    assert len(domain.grants.own) == 0 and len(domain.grants.mapper.maptrack) == 0, "released at the domain's end"
