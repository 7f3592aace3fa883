"""SIGHUP: the configuration is read again; what may change while the agent runs is changed, of the rest it is said.

The options that may change are marked ``mutable`` where they are defined, so the sample names them, too.
"""

from __future__ import annotations

import dataclasses
import logging
from typing import TYPE_CHECKING, Any

from agent import conf, logs
from agent.errors import ConfigError
from hypervisor import sdnotify

if TYPE_CHECKING:
    from agent.service import Service

LOG = logging.getLogger(__name__)

MUTABLE = frozenset(
    {
        "drain_seconds",
        "unknown_seconds",
        "keep_seconds",
        "keep_read_seconds",
        "reply_seconds",
        "max_pending",
        "report_interval",
        "vcpu_ratio",
        "reserved_memory_mib",
        "placement.allocations",
        "placement.interval",
        "log.level",
        "log.format",
    }
)
"""By their names in `agent.conf.Settings`."""


def carry_out(service: Service) -> None:
    """Read files, environment and command line again. A configuration with a mistake changes nothing."""
    sdnotify.reloading()
    try:
        new = conf.load(None, service.argv)
        settings, changed, kept = merge(service.settings, new)
        logs.reconfigure(settings.log.level, settings.log.format)  # also opens the log file again
        apply(service, settings)
    except (ConfigError, SystemExit, OSError) as exc:
        LOG.error("the configuration stays as it was: %s", exc)
    else:
        LOG.info("configuration read again; changed: %s", ", ".join(changed) or "nothing")
        if kept:
            LOG.warning("these take effect at the next start: %s", ", ".join(kept))
    sdnotify.ready(f"host {service.settings.host}, driver {service.toolstack.name}")


def merge(old: conf.Settings, new: conf.Settings) -> tuple[conf.Settings, list[str], list[str]]:
    """(`old` with what may change of `new`, the names of what did, the names of what would need a restart)."""
    before, after = _flat(old), _flat(new)
    differs = sorted(name for name in after if before[name] != after[name])
    changed = [name for name in differs if name in MUTABLE]
    fields: dict[str, Any] = {name: after[name] for name in changed if "." not in name}
    for group in ("log", "placement"):
        inner = {name.removeprefix(f"{group}."): after[name] for name in changed if name.startswith(f"{group}.")}
        fields[group] = dataclasses.replace(getattr(old, group), **inner)
    settings = dataclasses.replace(old, **fields)
    return settings, changed, [name for name in differs if name not in MUTABLE]


def apply(service: Service, settings: conf.Settings) -> None:
    """Tell every part."""
    service.settings = settings
    service.executor.unknown_seconds = float(settings.unknown_seconds)
    service.executor.keep_seconds = float(settings.keep_seconds)
    service.executor.keep_read_seconds = float(settings.keep_read_seconds)
    service.publisher.reply_seconds = float(settings.reply_seconds)
    service.dispatcher.max_pending = settings.max_pending
    service.reporter.interval = float(settings.report_interval)
    service.claims.vcpu_ratio = settings.vcpu_ratio
    service.claims.reserved_mib = settings.reserved_memory_mib
    service.reporter.changed()
    if service.placement is not None:
        service.placement.interval = float(settings.placement.interval)
        service.placement.write = settings.placement.allocations == "write"
        service.placement.changed()


def _flat(settings: conf.Settings) -> dict[str, object]:
    found: dict[str, object] = {}
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if dataclasses.is_dataclass(value):
            found |= {f"{field.name}.{inner.name}": getattr(value, inner.name) for inner in dataclasses.fields(value)}
        else:
            found[field.name] = value
    return found
