"""All fuzzers for a while, as their own pytest runs: a minute each in CI, a few seconds otherwise (docs/fuzzing.md)."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

FUZZERS = Path(__file__).resolve().parents[1] / "fuzz"
SECONDS = 60 if os.environ.get("CI") == "true" else 3
"""For each fuzzer."""
AT_A_TIME = 2
"""They need a processor each; a gate has two."""
PARTS = sorted(path.name for path in FUZZERS.glob("test_fuzz_*.py"))


def _run(part: str) -> str:
    """What is wrong, or nothing."""
    environment = os.environ | {"REEVE_FUZZ_SECONDS": str(SECONDS)}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(FUZZERS / part)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=SECONDS * 4 + 280)
    return "" if done.returncode == 0 else f"{part}:\n{done.stdout[-6000:]}{done.stderr[-2000:]}"


@pytest.mark.timeout(SECONDS * 8 + 600)
def test_hostile_guests_do_no_harm() -> None:
    assert len(PARTS) == 4
    with ThreadPoolExecutor(AT_A_TIME) as pool:
        faults = [fault for fault in pool.map(_run, PARTS) if fault]
    assert not faults, "\n".join(faults)
