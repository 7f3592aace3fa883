"""Engines: what executes guest instructions, found by name in the entry-point group ``reeve.engines``."""

from __future__ import annotations

import functools
import importlib.metadata
from collections.abc import Callable
from typing import Any

GROUP = "reeve.engines"
DEFAULT = "unicorn"


@functools.cache
def available() -> dict[str, Callable[[], Any]]:
    """Name → function that makes a fresh engine (`hypervisor.engines.base.Engine`)."""
    return {entry.name: entry.load() for entry in importlib.metadata.entry_points(group=GROUP)}
