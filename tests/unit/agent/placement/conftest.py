from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "support"))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from fake_placement import FakePlacement, placement


@pytest.fixture
def server() -> Iterator[FakePlacement]:
    with placement() as made:
        yield made
