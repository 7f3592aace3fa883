"""XTF's own example and self test on the embedded hypervisor.

Needs a built tree of https://github.com/andyhhp/xtf in the folder that REEVE_XTF names; see docs/testing.md.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from hypervisor.toolstack.api import Toolstack

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))

from run_xtf import discover, private_host, run_test

FOLDER = os.environ.get("REEVE_XTF", "")

pytestmark = pytest.mark.skipif(
    not FOLDER, reason="REEVE_XTF is not set: give it the folder of a built XTF tree (docs/testing.md)"
)


@pytest.fixture(scope="module")
def host() -> Iterator[Toolstack]:
    with private_host() as toolstack:
        yield toolstack


@pytest.mark.parametrize("env", ["pv64", "pv32pae"])
@pytest.mark.parametrize("name", ["example", "selftest"])
def test_own_tests(host: Toolstack, env: str, name: str) -> None:
    (test,) = discover(Path(FOLDER), [env], f"^test-{env}-{name}$")
    result = run_test(host, test, timeout=60.0)
    assert result.verdict == "SUCCESS", f"{result.detail}\n{result.console}"
