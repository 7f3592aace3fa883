"""The kinds of device there are. A new kind is one line here and a package beside this file (docs/devices.md)."""

from __future__ import annotations

import importlib
from typing import Any

from hypervisor.devices.driver import Backend

BACKENDS = {
    "disk": "hypervisor.devices.block.backend:BlockBackend",
    "nic": "hypervisor.devices.net.backend:NetBackend",
}
"""Kind to ``module:attribute`` of its `Backend`, which takes the host's settings."""


def attribute(name: str) -> Any:
    """:param name: ``module:attribute``. :raises ImportError, AttributeError: it is not there."""
    module, _, what = name.partition(":")
    return getattr(importlib.import_module(module), what)


def load(name: str, settings: Any) -> Backend:
    made: Backend = attribute(name)(settings)
    return made
