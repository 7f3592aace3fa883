"""Makes `grant_rig` importable, and a domain for each test."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

_HERE = str(Path(__file__).resolve().parent)
if _HERE not in sys.path:
    sys.path.insert(0, _HERE)

from grant_rig import GrantRig  # noqa: E402


@pytest.fixture
def rig() -> GrantRig:
    return GrantRig().start()


@pytest.fixture
def rig2() -> GrantRig:
    """The same with version 2."""
    return GrantRig().start(2)


@pytest.fixture(params=[1, 2])
def any_rig(request: pytest.FixtureRequest) -> GrantRig:
    return GrantRig().start(request.param)
