"""What bench/where.py makes of perf's report."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "bench"))

import where
from common import BenchFailed

REPORT = """
# Overhead;Command;Shared Object
30.00%;reeve-dom77  ;libunicorn.so.2
10.00%;reeve-dom78  ;libunicorn.so.2
5.00%;reeve-dom77   ;[JIT] tid 5
25.00%;reeve-nic77  ;libpython3.11.so.1.0
10.00%;python       ;[kernel.kallsyms]
"""


def test_by_process_and_kind_of_code() -> None:
    assert where.sort_out(REPORT) == {
        "domain": {"engine": 50.0, "guest code": 6.25},
        "net driver": {"python": 31.25},
        "host and switch": {"kernel": 12.5},
    }


def test_no_samples() -> None:
    with pytest.raises(BenchFailed, match="no samples"):
        where.sort_out("# nothing\n")
