"""The paravirtual console: ring backend, log, clients."""

from hypervisor.devices.console.client import ConsoleClient
from hypervisor.devices.console.log import ConsoleLog
from hypervisor.devices.console.ring import ConsoleRing

__all__ = ["ConsoleClient", "ConsoleLog", "ConsoleRing"]
