"""What is known of domains and of the host: frozen, with JSON forms. Part of `hypervisor.toolstack.api`."""

from __future__ import annotations

import dataclasses
import enum
from typing import Any, Protocol

from hypervisor.errors import OperationTimeout
from hypervisor.toolstack.spec import DomainType


class DomainState(enum.StrEnum):
    RUNNING = "running"
    PAUSED = "paused"
    SHUTDOWN = "shutdown"  # ended by itself, still holds its resources until destroyed
    CRASHED = "crashed"  # ended by a fault of its own, likewise
    DYING = "dying"
    UNKNOWN = "unknown"  # exists, but cannot be read just now


def still(uuid: str, state: DomainState, wanted: frozenset[DomainState], timeout: float) -> OperationTimeout:
    """Of a `Toolstack.wait` that took `timeout` seconds: its domain is in `state` still."""
    states = " or ".join(sorted(wanted)) or "gone"
    return OperationTimeout(
        f"domain {uuid} is still {state.value} after {timeout:g} s, not {states}: wait longer or look at its console"
        " log"
    )


class ShutdownReason(enum.StrEnum):
    """SCHEDOP_shutdown reasons (public/sched.h)."""

    POWEROFF = "poweroff"
    REBOOT = "reboot"
    SUSPEND = "suspend"
    CRASH = "crash"
    WATCHDOG = "watchdog"


class Capability(enum.StrEnum):
    """What a driver can do beyond create, destroy, list, pause, unpause, shutdown."""

    PV = "pv"
    PV32 = "pv32"
    PVH = "pvh"
    HVM = "hvm"
    SMP = "smp"
    CONSOLE = "console"
    REBOOT = "reboot"
    DISK = "disk"
    NIC = "nic"
    HOTPLUG = "hotplug"  # devices attached and detached while the domain runs
    RESIZE = "resize"  # vCPUs and memory while the domain runs
    DISK_RESIZE = "disk-resize"
    SYSRQ = "sysrq"
    DUMP_CORE = "dump-core"
    SAVE = "save"  # save and restore; moving as an image, where the host moves domains at all
    TEMPLATES = "templates"  # made of suspended guests, and domains that begin from them
    LIVE_MIGRATION = "live-migration"
    STANDBY = "standby"  # a domain is kept on a second host too, by continuous checkpoints
    ADOPTION = "adoption"  # domains survive a restart of the host process


@dataclasses.dataclass(frozen=True, slots=True)
class DomainInfo:
    """What is known of a domain now: of the present run, where its spec was changed for the next one.

    :ivar cpu_time_ns: CPU time used by its vCPUs, nanoseconds.
    :ivar vcpus: vCPUs that are online, of `max_vcpus` (0: not known).
    :ivar memory_mib: memory it has now; `memory_target_mib` what it is asked to have, `max_memory_mib` its static
        maximum (0: not known).
    :ivar shutdown_reason: set when state is SHUTDOWN or CRASHED.
    :ivar created_at: seconds since the epoch.
    :ivar detail: one line for a human, for example why it crashed.
    """

    uuid: str
    name: str
    domid: int
    state: DomainState
    vcpus: int
    memory_mib: int
    owner: str = ""
    type: DomainType = DomainType.PV
    cpu_time_ns: int = 0
    shutdown_reason: ShutdownReason | None = None
    created_at: float = 0.0
    detail: str = ""
    metadata: tuple[tuple[str, str], ...] = ()
    max_vcpus: int = 0
    memory_target_mib: int = 0
    max_memory_mib: int = 0

    def to_json(self) -> dict[str, Any]:
        data = dataclasses.asdict(self)
        data["metadata"] = dict(self.metadata)
        return data

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> DomainInfo:
        fields = dict(data)
        fields["state"] = DomainState(fields["state"])
        fields["type"] = DomainType(fields.get("type", DomainType.PV))
        reason = fields.get("shutdown_reason")
        fields["shutdown_reason"] = ShutdownReason(reason) if reason else None
        fields["metadata"] = tuple(sorted(dict(fields.get("metadata", {})).items()))
        return cls(**fields)


@dataclasses.dataclass(frozen=True, slots=True)
class HostInfo:
    """The node's capacity.

    :ivar memory_total_mib: what domains may use altogether, MiB.
    :ivar memory_free_mib: of that, not yet given out.
    :ivar cpus: host CPUs that vCPUs may run on.
    """

    hostname: str
    driver: str
    driver_version: str
    cpus: int
    memory_total_mib: int
    memory_free_mib: int
    domains: int
    capabilities: tuple[str, ...] = ()
    detail: tuple[tuple[str, str], ...] = ()

    def to_json(self) -> dict[str, Any]:
        data = dataclasses.asdict(self)
        data["detail"] = dict(self.detail)
        data["capabilities"] = list(self.capabilities)
        return data

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> HostInfo:
        fields = dict(data)
        fields["capabilities"] = tuple(fields.get("capabilities", ()))
        fields["detail"] = tuple(sorted(dict(fields.get("detail", {})).items()))
        return cls(**fields)


@dataclasses.dataclass(frozen=True, slots=True)
class DomainEvent:
    """A state change, as it happened.

    :ivar kind: ``created``, ``paused``, ``unpaused``, ``shutdown``, ``crashed``, ``rebooted``, ``destroyed``,
        ``migration`` (`detail` is the JSON text of a `MigrationStatus`; told on each new phase and round).
    :ivar time: seconds since the epoch.
    """

    kind: str
    uuid: str
    time: float
    detail: str = ""


class Console(Protocol):
    """An attached guest console (hvc0): bytes in both directions."""

    def read(self, size: int = 65536, timeout: float | None = None) -> bytes:
        """Bytes the guest printed; ``b""`` when `timeout` seconds passed without any.

        :raises EOFError: the domain is gone.
        """

    def write(self, data: bytes) -> None: ...

    def fileno(self) -> int:
        """A descriptor that polls readable when `read` would return bytes."""

    def close(self) -> None: ...
