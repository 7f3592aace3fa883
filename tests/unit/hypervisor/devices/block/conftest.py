"""The front end that these tests drive lies beside them, the fake guest in tests/support."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[4] / "support"))

from blkfront import Rig
from descriptors import as_the_kernel_does


@pytest.fixture(autouse=True)
def closed_descriptors(request: pytest.FixtureRequest) -> Iterator[None]:
    yield from as_the_kernel_does(request)


@pytest.fixture
def rig(tmp_path: Path) -> Rig:
    """A guest, its driver and a raw image."""
    return Rig(tmp_path)
