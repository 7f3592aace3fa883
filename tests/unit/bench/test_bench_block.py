"""What bench/block.py makes of a guest's lines."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "bench"))

import block
from common import BenchFailed

SEQUENTIAL = block.Question("seq", "read", 1)
RANDOM = block.Question("rand", "write", 32)
LINE = 'BENCH {"operations": 400, "bytes": 52428800, "seconds": 2.000000}'


def test_figures() -> None:
    assert block.parse(SEQUENTIAL, f"blockload ...\n{LINE}\n") == (25.0, 50.0)
    assert block.parse(RANDOM, f"{LINE}\n") == (200.0, 400.0)
    assert len(block.QUESTIONS) == len({question.name for question in block.QUESTIONS}) == 8


@pytest.mark.parametrize(
    "text",
    [
        "",
        "BLOCK FAIL io_setup: no",
        "BENCH {}",
        "BENCH {no json}",
        'BENCH {"operations": 0, "bytes": 0, "seconds": 1}',
        'BENCH {"operations": 1, "bytes": 4096, "seconds": 0}',
        'BENCH {"operations": "x", "bytes": 4096, "seconds": 1}',
    ],
)
def test_a_guest_that_says_something_else(text: str) -> None:
    with pytest.raises(BenchFailed):
        block.parse(RANDOM, text)


def test_the_table_has_a_row_for_each() -> None:
    cpu = {"unit": "us/MiB", "reeve": 4.0, "qemu_tcg": 1.0, "ratio": 0.25}
    found = {"seq_read_1": {"unit": "MiB/s", "reeve": 1.0, "qemu_tcg": 2.0, "ratio": 0.5, "cpu": cpu}}
    assert block.table({"results": found})[1] == ["seq_read_1", "MiB/s", 1.0, 2.0, 0.5, "us/MiB", 4.0, 1.0, 0.25]
