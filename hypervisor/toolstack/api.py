"""What a node can do with domains: the one API over every driver.

A *driver* (``embedded``, ``fake``, later ``xl``) implements `Toolstack`. The
agent and its plugins know only this module. All data is frozen and has a JSON
form (`to_json`/`from_json`), because specs are journalled and cross sockets.

Rules every driver keeps (``tests/contract`` runs them against each one):

* A domain's identity is its UUID. A domid is shown, never accepted.
* `Toolstack.create` builds a domain *paused* and marks it as owned by
  ``spec.owner`` before it can run; if it raises, nothing is left behind.
* A verb that finds its goal already reached returns quietly where that is
  provable (pause of a paused domain) and raises `WrongState` where it is not.
* "cannot be read" is state ``UNKNOWN``; it never means stopped.
* Every failure is a `hypervisor.errors.ToolstackError`.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

from hypervisor.toolstack.devices import DeviceInfo, DiskSpec, NicSpec
from hypervisor.toolstack.spec import (
    MAX_NAME,
    MAX_VCPUS,
    DomainSpec,
    DomainType,
    KernelBoot,
    OnEvent,
    check_scheduling,
)

__all__ = [
    "API_VERSION",
    "MAX_NAME",
    "MAX_VCPUS",
    "Capability",
    "Console",
    "DomainEvent",
    "DomainInfo",
    "DomainSpec",
    "DomainState",
    "DomainType",
    "HostInfo",
    "KernelBoot",
    "OnEvent",
    "ShutdownReason",
    "Toolstack",
    "check_scheduling",
]

API_VERSION = (1, 1)


class DomainState(enum.StrEnum):
    RUNNING = "running"
    PAUSED = "paused"
    SHUTDOWN = "shutdown"  # ended by itself, still holds its resources until destroyed
    CRASHED = "crashed"  # ended by a fault of its own, likewise
    DYING = "dying"
    UNKNOWN = "unknown"  # exists, but cannot be read just now


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
    RESIZE = "resize"  # vCPUs, memory and disks while the domain runs
    SYSRQ = "sysrq"
    DUMP_CORE = "dump-core"
    SAVE = "save"
    LIVE_MIGRATION = "live-migration"
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

    :ivar kind: ``created``, ``paused``, ``unpaused``, ``shutdown``, ``crashed``, ``rebooted``, ``destroyed``.
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


@runtime_checkable
class Toolstack(Protocol):
    """A driver. Every method may raise `ToolstackError`; methods are safe to call from several threads."""

    name: str

    def capabilities(self) -> frozenset[Capability]: ...

    def host_info(self) -> HostInfo: ...

    def list_domains(self) -> list[DomainInfo]:
        """Every domain on the host, foreign ones included, ordered by domid."""

    def get_domain(self, uuid: str) -> DomainInfo:
        """:raises DomainNotFound: no such domain."""

    def get_spec(self, uuid: str) -> DomainSpec:
        """The spec the domain was made from. :raises DomainNotFound: no such domain."""

    def create(self, spec: DomainSpec) -> DomainInfo:
        """Build a domain, paused and marked.

        :raises SpecInvalid, DomainExists, NameInUse, InsufficientMemory, InsufficientVcpus,
            MemoryTooSmall, KernelInvalid, RamdiskInvalid, Unsupported: nothing is left behind.
        """

    def unpause(self, uuid: str) -> None:
        """Let a paused domain run. No effect on a running one. :raises WrongState: it has ended."""

    def pause(self, uuid: str) -> None:
        """Stop its vCPUs before their next instruction. No effect on a paused one. :raises WrongState: it has ended."""

    def shutdown(self, uuid: str) -> None:
        """Ask the guest to power off (control/shutdown). Returns at once; see `wait`."""

    def reboot(self, uuid: str) -> None:
        """Ask the guest to reboot (control/shutdown). The UUID stays, the domid changes."""

    def reset(self, uuid: str) -> None:
        """End it and build it anew from its spec, without asking the guest. It runs afterwards."""

    def destroy(self, uuid: str) -> None:
        """End it now and free what it held. :raises DomainNotFound: no such domain."""

    def wait(self, uuid: str, states: frozenset[DomainState], timeout: float) -> DomainInfo | None:
        """Wait until the domain is in one of `states`; None when it is gone instead.

        :param timeout: seconds. :raises OperationTimeout: still in another state.
        """

    def console_log(self, uuid: str, max_bytes: int = 65536) -> bytes:
        """The last `max_bytes` the guest printed; kept until destroy."""

    def open_console(self, uuid: str) -> Console: ...

    # -- devices: `Capability.DISK`, `NIC`; while the domain runs also `HOTPLUG`

    def list_devices(self, uuid: str) -> list[DeviceInfo]:
        """Disks, then nics, each by id."""

    def attach_disk(self, uuid: str, disk: DiskSpec) -> DeviceInfo:
        """Give a domain one more disk; it becomes part of its spec. Returns before the guest has taken it up.

        No effect if the same disk is attached. :raises SpecInvalid, DeviceExists, ImageInvalid, ImageInUse.
        :raises WrongState: it has ended; so do the other verbs that attach and detach.
        """

    def attach_nic(self, uuid: str, nic: NicSpec) -> DeviceInfo:
        """As `attach_disk`. :raises SpecInvalid, DeviceExists (also for a MAC in use on the host)."""

    def detach_device(self, uuid: str, kind: str, ident: str, timeout: float, *, force: bool = False) -> None:
        """Ask the guest to let go of a device and take it away; no effect if there is none.

        :param kind: ``disk`` or ``nic``.
        :param timeout: seconds the guest has.
        :param force: take it away when the guest has not let go in time.
        :raises OperationTimeout: the guest keeps it; it is attached still.
        """

    # -- resize: `Capability.RESIZE`

    def set_vcpus(self, uuid: str, vcpus: int) -> None:
        """Ask the guest to have that many vCPUs online, 1..max_vcpus; returns at once.

        It becomes part of its spec (`DomainSpec.with_vcpus`). `DomainInfo.vcpus` follows as the guest does.
        :raises SpecInvalid: beyond the maximum of the present run. :raises WrongState: it has ended.
        """

    def set_memory(self, uuid: str, memory_mib: int) -> None:
        """Set the balloon's target, at most the static maximum; returns at once.

        It becomes part of its spec (`DomainSpec.with_memory`). `DomainInfo.memory_mib` follows as the guest does.
        :raises SpecInvalid: beyond the static maximum of the present run. :raises WrongState: it has ended.
        :raises InsufficientMemory: the host has not got it.
        """

    def redefine(self, uuid: str, spec: DomainSpec) -> None:
        """Replace the spec that the domain is built from when it starts next (reboot, reset); what runs stays as it is.

        Metadata and ``on_poweroff``, ``on_reboot``, ``on_crash`` count at once; weight and cap with the next start.
        UUID, name, owner, type, disks and nics must be those it has. Allowed in every state, also when it has ended.
        :raises SpecInvalid: it differs in what must stay. :raises InsufficientVcpus: more than the host can give.
        """

    def resize_disk(self, uuid: str, disk: str, size_bytes: int) -> DeviceInfo:
        """Make a disk's image larger, and let the guest see it; a whole number of 512-byte sectors.

        No effect if it has that size. A driver never makes a disk smaller.
        :raises SpecInvalid: smaller than it is, no whole sectors, or read-only. :raises DeviceNotFound: no such disk.
        :raises HostFailure: no space.
        """

    def set_scheduling(self, uuid: str, weight: int, cap: int) -> None:
        """Set `DomainSpec.weight` and `cap`, at once and in its spec. :raises SpecInvalid: out of range."""

    # -- looking inside

    def stats(self, uuid: str) -> dict[str, Any]:
        """Counters for people: at least ``cpu_time_ns``, ``vcpus``, ``memory_mib``, ``devices`` (as `list_devices`).

        ``memory_min_mib``, where the guest or the driver knows it, is the least memory the guest can do with.
        """

    def sysrq(self, uuid: str, key: str) -> None:
        """Send a magic SysRq key, one letter or digit (control/sysrq). `Capability.SYSRQ`.

        :raises SpecInvalid: another key. :raises WrongState: it has ended.
        """

    def dump_core(self, uuid: str, path: str) -> None:
        """Write the domain's memory and registers to a new file on the host. `Capability.DUMP_CORE`.

        The file appears when it is whole (written under another name beside it), with mode 0600.
        :raises SpecInvalid: the path is not absolute, or something is there already. :raises HostFailure: no space.
        """

    def subscribe(self, listener: Callable[[DomainEvent], None]) -> Callable[[], None]:
        """Call `listener` (in a thread of the driver) for each event; returns the unsubscribe function."""

    def close(self) -> None:
        """Release the connection; domains are not touched."""
