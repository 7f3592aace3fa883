"""Runs every contract test on every driver that has a ``kit_NAME.py`` here."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
from kit import Bench, Kit  # noqa: E402

DRIVERS = sorted(path.stem.removeprefix("kit_") for path in HERE.glob("kit_*.py"))


@pytest.fixture(scope="session", params=DRIVERS)
def kit(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kit]:
    module = importlib.import_module(f"kit_{request.param}")
    made = module.make_kit(tmp_path_factory.mktemp(request.param))
    yield made
    made.stop()


@pytest.fixture
def bench(kit: Kit) -> Iterator[Bench]:
    """A connection to an empty host; afterwards whatever the test left is destroyed and the memory must be back."""
    made = Bench(kit.connect(), kit)
    free = made.toolstack.host_info().memory_free_mib
    try:
        yield made
    finally:
        toolstack = made.toolstack
        for info in toolstack.list_domains():
            toolstack.destroy(info.uuid)
        made.until(lambda: toolstack.host_info().memory_free_mib == free, "the host's memory to be free again")
        assert toolstack.list_domains() == []
        toolstack.close()
