"""Why a machine does not run any more."""

from __future__ import annotations

import dataclasses

from hypervisor import abi
from hypervisor.toolstack.api import ShutdownReason

REASONS = {
    abi.SHUTDOWN_poweroff: ShutdownReason.POWEROFF,
    abi.SHUTDOWN_reboot: ShutdownReason.REBOOT,
    abi.SHUTDOWN_suspend: ShutdownReason.SUSPEND,
    abi.SHUTDOWN_crash: ShutdownReason.CRASH,
    abi.SHUTDOWN_watchdog: ShutdownReason.WATCHDOG,
}


@dataclasses.dataclass(frozen=True, slots=True)
class Shutdown:
    """Why a machine does not run any more."""

    reason: ShutdownReason
    detail: str = ""
