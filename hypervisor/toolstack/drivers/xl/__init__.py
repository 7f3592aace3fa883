"""The driver of a Xen host: the program ``xl`` and xenstore.

Settings (all optional): ``xl``, the program; ``prefix``, words before it (``sudo -n``); ``xenstore``, its socket;
``state_dir``; ``console_logs``, xenconsoled's folder; ``networks``, words like ``default=xenbr0``.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from hypervisor.errors import SpecInvalid
from hypervisor.toolstack.drivers.xl.driver import XlToolstack
from hypervisor.toolstack.drivers.xl.host import Settings
from hypervisor.toolstack.drivers.xl.runner import Runner
from hypervisor.toolstack.drivers.xl.store import DEFAULT_SOCKET

_SETTINGS = {"xl", "prefix", "xenstore", "state_dir", "console_logs", "networks"}


def create(settings: Mapping[str, str]) -> XlToolstack:
    """The driver's factory (entry point ``reeve.drivers``: ``xl``)."""
    unknown = sorted(set(settings) - _SETTINGS)
    if unknown:
        raise SpecInvalid(f"xl driver: unknown setting {unknown[0]!r}: known are {', '.join(sorted(_SETTINGS))}")
    networks = {}
    for word in settings.get("networks", "default=xenbr0").split():
        name, equals, bridge = word.partition("=")
        if not equals or not name or not bridge:
            raise SpecInvalid(f"xl driver: network {word!r} is not usable: give name=bridge")
        networks[name] = bridge
    return XlToolstack(
        Settings(
            runner=Runner(settings.get("xl") or "xl", tuple(settings.get("prefix", "").split())),
            xenstore=Path(settings.get("xenstore") or DEFAULT_SOCKET),
            state_dir=Path(settings.get("state_dir") or "/var/lib/reeve/xl"),
            console_logs=Path(settings.get("console_logs") or "/var/log/xen/console"),
            networks=networks,
        )
    )
