"""Both fuzzers for a while, as their own pytest run: a minute in CI, a few seconds otherwise (docs/fuzzing.md)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

FUZZERS = Path(__file__).resolve().parents[1] / "fuzz"
SECONDS = 30 if os.environ.get("CI") == "true" else 4
"""For each of the two."""


@pytest.mark.timeout(SECONDS * 6 + 300)
@pytest.mark.parametrize("part", ["test_fuzz_hypercalls.py", "test_fuzz_pagetables.py"])
def test_a_hostile_guest_does_no_harm(part: str) -> None:
    environment = os.environ | {"REEVE_FUZZ_SECONDS": str(SECONDS)}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(FUZZERS / part)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=SECONDS * 6 + 280)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
