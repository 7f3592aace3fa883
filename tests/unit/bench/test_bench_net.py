"""What bench/net.py makes of netload's lines."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "bench"))

import net
from common import BenchFailed


def test_figures() -> None:
    assert net.figure("guest_to_guest", "SOURCE bytes=52428800 seconds=2.0") == (25.0, 50.0)
    assert net.figure("host_to_guest", "FETCH bytes=1048576 seconds=0.5") == (2.0, 1.0)
    assert net.figure("guest_guest_rtt", "RTT count=500 us=123.5 min=1 max=9") == (123.5, 500.0)


@pytest.mark.parametrize("text", ["", "SOURCE bytes=0 seconds=1.0", "FETCH bytes=5 seconds=0.0", "RTT count=0 us=1.0"])
@pytest.mark.parametrize("name", net.NAMES)
def test_a_guest_that_says_something_else(name: str, text: str) -> None:
    with pytest.raises(BenchFailed):
        net.figure(name, text)


def test_the_table_has_a_row_for_each() -> None:
    cpu = {"unit": "us/MiB", "reeve": 4.0, "qemu_tcg": 1.0, "ratio": 0.25}
    found = {"guest_to_guest": {"unit": "MiB/s", "reeve": 1.0, "qemu_tcg": 2.0, "ratio": 0.5, "cpu": cpu}}
    assert net.table({"results": found})[1] == ["guest_to_guest", "MiB/s", 1.0, 2.0, 0.5, "us/MiB", 4.0, 1.0, 0.25]
