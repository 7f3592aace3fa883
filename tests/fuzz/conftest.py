"""Makes the shared helpers importable: `harness` and `pv_rig`, and what lies beside this file."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from fuzz_neighbour import Neighbour

_TESTS = Path(__file__).resolve().parents[1]
for _folder in (_TESTS / "support", _TESTS / "guests", _TESTS / "fuzz"):
    if str(_folder) not in sys.path:
        sys.path.insert(0, str(_folder))


@pytest.fixture
def neighbour() -> Iterator[Neighbour]:
    """A guest beside the one that is fuzzed."""
    from fuzz_neighbour import Neighbour

    with Neighbour() as other:
        yield other
