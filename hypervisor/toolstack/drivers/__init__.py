"""Drivers of the toolstack API, found as entry points of the group ``reeve.drivers``.

Each entry point is a factory ``create(settings: Mapping[str, str]) -> Toolstack``. Settings are
strings (they come from configuration files and command lines); a driver documents its own and
refuses the ones it does not know with `hypervisor.errors.SpecInvalid`.
"""

from __future__ import annotations

import importlib.metadata
import logging
from collections.abc import Mapping

from hypervisor.errors import HostFailure, ToolstackError, Unsupported
from hypervisor.toolstack.api import Toolstack

NAMESPACE = "reeve.drivers"

LOG = logging.getLogger(__name__)


def names() -> list[str]:
    """The names of all installed drivers, sorted; none of them is imported."""
    return sorted({point.name for point in importlib.metadata.entry_points(group=NAMESPACE)})


def load(name: str, settings: Mapping[str, str] | None = None) -> Toolstack:
    """Import the driver `name` and connect it.

    :raises Unsupported: no such driver is installed.
    :raises ToolstackError: what the driver's factory raises; anything else becomes `HostFailure`.
    """
    points = importlib.metadata.entry_points(group=NAMESPACE, name=name)
    if not points:
        known = ", ".join(names()) or "none (install the package again)"
        raise Unsupported(f"driver {name!r} is not installed: installed are {known}")
    try:
        factory = next(iter(points)).load()
    except Exception as exc:
        raise HostFailure(f"driver {name!r} cannot be imported: {exc!r}; install its package again") from exc
    try:
        toolstack = factory(dict(settings or {}))
    except ToolstackError:
        raise
    except Exception as exc:
        LOG.exception("driver %s did not start", name)
        raise HostFailure(f"driver {name!r} did not start: {exc!r}") from exc
    if not isinstance(toolstack, Toolstack):
        raise HostFailure(f"driver {name!r} made a {type(toolstack).__name__}, which is no Toolstack")
    return toolstack
