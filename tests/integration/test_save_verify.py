"""Xen's own checker accepts saved micro-guests of both word sizes, of one and of two vCPUs, ballooned ones too."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "guests"))
sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
import xen_tree
from harness import GuestRun, build, guest_runs, running

from hypervisor.toolstack.stream import envelope

pytestmark = [
    pytest.mark.skipif(bool(xen_tree.missing()), reason=xen_tree.missing()),
    pytest.mark.skipif(bool(build.available()), reason=str(build.available())),
]


@pytest.fixture
def runs() -> Iterator[list[GuestRun]]:
    yield from guest_runs()


@pytest.mark.parametrize(
    ("guest", "cmdline", "vcpus"),
    [("suspend", "now", 1), ("suspend", "now tree balloon=50", 2), ("suspend32", "", 1), ("suspend32", "t", 2)],
)
def test_xens_checker_accepts_it(runs: list[GuestRun], tmp_path: Path, guest: str, cmdline: str, vcpus: int) -> None:
    run = running(runs, guest, cmdline=cmdline, vcpus=vcpus, parks=True)
    run.wait_suspended()
    image = tmp_path / "image"
    image.write_bytes(envelope.opening({"c_info": {"type": "pv"}}) + run.stream() + envelope.closing())
    said = xen_tree.verify(image)
    assert f"{'32' if guest.endswith('32') else '64'}bit guest" in said
    assert f"vcpu{vcpus - 1} basic context" in said and f"vcpu{vcpus} " not in said
