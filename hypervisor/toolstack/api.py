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

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

from hypervisor.toolstack.devices import DeviceInfo, DiskSpec, NicSpec
from hypervisor.toolstack.info import (
    Capability,
    Console,
    DomainEvent,
    DomainInfo,
    DomainState,
    HostInfo,
    ShutdownReason,
)
from hypervisor.toolstack.migration import (
    MigrationMode,
    MigrationOffer,
    MigrationOptions,
    MigrationPhase,
    MigrationRole,
    MigrationStatus,
    MigrationTicket,
    SaveInfo,
)
from hypervisor.toolstack.spec import (
    MAX_NAME,
    MAX_VCPUS,
    DomainSpec,
    DomainType,
    KernelBoot,
    OnEvent,
    check_scheduling,
)
from hypervisor.toolstack.template import TemplateInfo

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
    "MigrationMode",
    "MigrationOffer",
    "MigrationOptions",
    "MigrationPhase",
    "MigrationRole",
    "MigrationStatus",
    "MigrationTicket",
    "OnEvent",
    "SaveInfo",
    "ShutdownReason",
    "TemplateInfo",
    "Toolstack",
    "check_scheduling",
]

API_VERSION = (1, 5)


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
        `Capability.DISK_RESIZE`.

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

    # -- save, restore: `Capability.SAVE`

    def save(self, uuid: str, path: str, *, keep_running: bool = False, timeout: float = 60.0) -> SaveInfo:
        """Have the guest suspend and write it to a new file on the host; then the domain is gone.

        The file appears when it is whole (written under another name beside it), with mode 0600. What fails leaves
        the domain running and no file.
        :param keep_running: a checkpoint: the guest goes on afterwards (to it the suspend was cancelled).
        :param timeout: seconds the guest has to suspend.
        :raises SpecInvalid: the path is not absolute, or something is there already. :raises WrongState: it has ended,
            or is paused. :raises OperationTimeout: the guest did not suspend. :raises HostFailure: no space.
        """

    def restore(self, path: str, *, owner: str, name: str = "", uuid: str = "") -> DomainInfo:
        """Build a domain from a saved image, paused and marked; otherwise as `create`.

        :param name, uuid: ``""`` keeps what the image says.
        :raises SpecInvalid: the path is not absolute or no file. :raises StreamInvalid, CpuIncompatible.
        """

    # -- templates: `Capability.TEMPLATES`

    def template_create(
        self, uuid: str, name: str, *, ident: str, keep_running: bool = False, timeout: float = 60.0
    ) -> TemplateInfo:
        """Have the guest suspend and keep it as a template; then the domain is gone. What fails leaves it running.

        :param name: unique among templates, as a domain's. :param ident: kept, to know it again by.
        :param keep_running: the guest goes on afterwards (to it the suspend was cancelled); not with disks that it
            can write to.
        :param timeout: seconds the guest has to suspend.
        :raises SpecInvalid: a name that is not usable. :raises TemplateExists.
        :raises WrongState: it has ended, or is paused. :raises OperationTimeout: the guest did not suspend.
        :raises HostFailure: no space.
        """

    def template_list(self) -> list[TemplateInfo]:
        """By name."""

    def template_get(self, name: str) -> TemplateInfo:
        """:raises TemplateNotFound. :raises StreamInvalid: it is damaged, or of another release."""

    def template_remove(self, name: str, *, force: bool = False) -> None:
        """:param force: also when domains run on its memory; it takes its place on disk until they have ended.

        :raises TemplateNotFound. :raises TemplateInUse: domains run on its memory.
        """

    def clone(self, template: str, spec: DomainSpec) -> DomainInfo:
        """As `create`, but the guest begins from a template, as from a suspension; it shares what it does not write.

        Its memory and vCPUs are those of the template's spec, and the devices of that guest are there under their ids;
        UUID, name, MACs and images are its own. It finds ``clone/generation`` in xenstore, another for each.
        :raises TemplateNotFound. :raises StreamInvalid, CpuIncompatible. :raises SpecInvalid: other sizes or devices.
        """

    # -- migration: `Capability.LIVE_MIGRATION`; idents are UUIDs, tokens secrets that both sides were told
    #
    # While a domain is in the hands of a migration, every verb that would change it raises `WrongState`, naming the
    # migration. The half on a target is not listed before phase COMPLETE, but its UUID, name, memory, MACs and images
    # count as taken; from COMPLETE on it is listed, paused, its `detail` saying why. One that waits drops itself after
    # `hypervisor.toolstack.migration.WAIT_SECONDS`.

    def migration_offer(self, uuid: str) -> MigrationOffer:
        """Source: what a target must know; changes nothing. :raises WrongState: it has ended, or is on its way."""

    def migration_prepare(
        self,
        offer: MigrationOffer,
        *,
        ident: str,
        token: str,
        owner: str,
        mode: MigrationMode = MigrationMode.LIVE,
        peer: str = "",
    ) -> MigrationTicket:
        """Target: check everything, set aside what it needs, listen. The same ident again gives the same ticket.

        :param owner: marker that the domain will have here.
        :param peer: the source's name, kept for `MigrationStatus`.
        :param mode: LIVE refuses with `MigrationNotTransparent` what can only be moved as an IMAGE.
        :raises MigrationRefused, MigrationNotTransparent, CpuIncompatible, and what `create` raises: nothing is left.
        """

    def migration_start(
        self,
        uuid: str,
        *,
        ident: str,
        token: str,
        ticket: MigrationTicket,
        options: MigrationOptions,
        peer: str = "",
    ) -> None:
        """Source: begin, and go on in the background; quiet when that ident was begun.

        :param peer: the target's name, kept for `MigrationStatus`.
        :raises WrongState: it has ended, or another migration has it. :raises SpecInvalid: the ticket or options.
        """

    def migration_status(self, ident: str) -> MigrationStatus:
        """:raises MigrationNotFound: this host knows of none with that ident, or was told to forget it."""

    def migration_list(self) -> list[MigrationStatus]:
        """Every half that this host keeps a record of, oldest first."""

    def migration_cancel(self, ident: str) -> None:
        """Source: end it before the point of no return, the guest runs on. Target: drop what is not COMPLETE yet.

        Quiet when it has ended that way already. :raises WrongState: it is too late, or needs `migration_resolve`.
        """

    def migration_resolve(self, ident: str, *, keep: bool) -> None:
        """Decide for a half in phase COMPLETE or UNRESOLVED; quiet when it is so already. The other half must agree!

        :param keep: True: it runs here (or stays paused, if that is what was offered). False: it is dropped here.
        :raises WrongState: in another phase.
        """

    def migration_takeover(self, ident: str, *, force: bool = False) -> None:
        """Target, mode STANDBY (`Capability.STANDBY`): run the domain here; quiet when it does already.

        :param force: False: the source is asked, hands over its last state, and nothing is lost. True: the last whole
            epoch runs. A source that can still be reached is told so and stays paused; one that cannot be reached must
            be known not to run, or the domain runs twice!
        :raises WrongState: it is no standby, has no whole epoch, or the source does not answer.
        """

    def migration_forget(self, ident: str) -> None:
        """Remove an ended half's record; quiet when there is none. :raises WrongState: it has not ended."""

    def subscribe(self, listener: Callable[[DomainEvent], None]) -> Callable[[], None]:
        """Call `listener` (in a thread of the driver) for each event; returns the unsubscribe function."""

    def close(self) -> None:
        """Release the connection; domains are not touched."""
