"""XTF's PV tests on the embedded hypervisor, against the verdicts they are to have.

Needs a built tree of https://github.com/andyhhp/xtf in the folder that REEVE_XTF names; see docs/testing.md. What
it holds beyond the tests of 2025-08 is run, but may be judged as it likes.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from hypervisor.toolstack.api import Toolstack

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))

from run_xtf import XtfTest, discover, private_host, run_test

FOLDER = os.environ.get("REEVE_XTF", "")
TESTS = discover(Path(FOLDER)) if FOLDER else []

GOOD = """
cpuid example livepatch-priv-check msr pv-iopl~hypercall pv-iopl~vmassist rtm-check selftest
xsa-122 xsa-182 xsa-183 xsa-185 xsa-188 xsa-193 xsa-194 xsa-212 xsa-213 xsa-221 xsa-224 xsa-227 xsa-231 xsa-232 xsa-234
xsa-255 xsa-259 xsa-265 xsa-279 xsa-286 xsa-296 xsa-298 xsa-316 xsa-317 xsa-333 xsa-339 xsa-7
"""
# There is no argo, no CPUID faulting for the guest, no FSGSBASE, no superpages (xsa-167) and no DBEXT (xsa-444).
SKIPPED = ("argo", "cpuid-faulting", "pv-fsgsbase", "xsa-167", "xsa-444")
# As on real Xen 4.17, or explained in docs/xen-differences.md.
OTHERS = {
    ("pv64", "debug-regs"): "CRASH",
    ("pv32pae", "debug-regs"): "CRASH",
    ("pv64", "memop-seg"): "SUCCESS",
    ("pv32pae", "memop-seg"): "FAILURE",
    ("pv64", "xsa-260"): "ERROR",
    ("pv32pae", "xsa-260"): "ERROR",
}

pytestmark = pytest.mark.skipif(
    not FOLDER, reason="REEVE_XTF is not set: give it the folder of a built XTF tree (docs/testing.md)"
)


def wanted(test: XtfTest) -> str | None:
    if test.name in GOOD.split():
        return "SUCCESS"
    return "SKIP" if test.name in SKIPPED else OTHERS.get((test.env, test.name))


@pytest.fixture(scope="module")
def host() -> Iterator[Toolstack]:
    with private_host() as toolstack:
        yield toolstack


@pytest.mark.parametrize("test", TESTS, ids=lambda test: f"{test.env}-{test.name}")
def test_verdict(host: Toolstack, test: XtfTest) -> None:
    result = run_test(host, test, timeout=60.0)
    assert result.verdict in ("SUCCESS", "SKIP", "FAILURE", "ERROR", "CRASH"), f"{result.detail}\n{result.console}"
    if verdict := wanted(test):
        assert result.verdict == verdict, f"{result.detail}\n{result.console}"


def test_all_of_them_are_there() -> None:
    assert len(TESTS) >= 64
