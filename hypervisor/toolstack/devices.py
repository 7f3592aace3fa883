"""What a domain's devices are: frozen specs with a JSON form, and what is known of them while they run.

A *disk* becomes a Xen virtual block device (``vbd``, public/io/blkif.h), a *nic* a
virtual network interface (``vif``, public/io/netif.h). Both are part of a
`hypervisor.toolstack.api.DomainSpec` and may be attached and detached while the
domain runs.
"""

from __future__ import annotations

import dataclasses
import enum
import ipaddress
import re
from collections.abc import Mapping
from typing import Any, TypeVar

from hypervisor.errors import SpecInvalid

MAX_DISKS = 16
"""xvda .. xvdp: what Linux's blkfront numbers with 16 partitions each (docs/man/xen-vbd-interface.7)."""
MAX_NICS = 8
SECTOR = 512
MAX_DISK_BYTES = 1 << 44

_T = TypeVar("_T")

_DISK_ID = re.compile(r"xvd[a-p]")
_NETWORK = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
_MAC = re.compile(r"[0-9a-f]{2}(:[0-9a-f]{2}){5}")


class DiskFormat(enum.StrEnum):
    """Never guessed from the content: a guest could write another format's header into its raw disk."""

    RAW = "raw"
    QCOW2 = "qcow2"


@dataclasses.dataclass(frozen=True, slots=True)
class Limits:
    """How much of a device a guest may use; 0 means without limit.

    :ivar bytes_per_second: both directions together. For a nic: each direction.
    :ivar iops: requests a second; for a nic packets a second, each direction.
    :ivar burst_seconds: for how long an idle device may go over the rate at twice of it, 0..3600 s.
    """

    bytes_per_second: int = 0
    iops: int = 0
    burst_seconds: float = 1.0

    def validate(self, what: str) -> None:
        """:raises SpecInvalid: a value out of range."""
        for name in ("bytes_per_second", "iops"):
            value = getattr(self, name)
            if not _is_int(value) or not 0 <= value < 1 << 48:
                raise SpecInvalid(f"{what}: {name} is {value!r}: give a number, 0 for no limit")
        burst = self.burst_seconds
        if isinstance(burst, bool) or not isinstance(burst, int | float) or not 0 <= burst <= 3600:
            raise SpecInvalid(f"{what}: burst_seconds is {burst!r}: give 0 to 3600")


@dataclasses.dataclass(frozen=True, slots=True)
class DiskSpec:
    """A disk.

    :ivar id: the guest's name for it, ``xvda`` .. ``xvdp``; unique in the domain.
    :ivar path: image file or block device on the host, absolute.
    :ivar format: what the file is; see `DiskFormat`.
    :ivar readonly: the guest cannot write.
    :ivar direct: bypass the host's page cache (O_DIRECT).
    :ivar discard: let the guest punch holes.
    :ivar shared: another domain may use the image at the same time (both read-only, or a cluster file system).
    """

    id: str
    path: str
    format: DiskFormat = DiskFormat.RAW
    readonly: bool = False
    direct: bool = False
    discard: bool = True
    shared: bool = False
    limits: Limits = Limits()

    def validate(self) -> None:
        """:raises SpecInvalid: with the field, what is wrong and what would be right."""
        if not isinstance(self.id, str) or not _DISK_ID.fullmatch(self.id):
            raise SpecInvalid(f"disk id {self.id!r} is not usable: give xvda to xvdp")
        if not isinstance(self.path, str) or not self.path.startswith("/") or "\0" in self.path:
            raise SpecInvalid(f"disk {self.id}: path {self.path!r} is not usable: give a full path on the host")
        for name in ("readonly", "direct", "discard", "shared"):
            if not isinstance(getattr(self, name), bool):
                raise SpecInvalid(f"disk {self.id}: {name} is not true or false")
        self.limits.validate(f"disk {self.id}")

    @property
    def devid(self) -> int:
        """The number in xenstore: major 202, 16 minors a disk (xen-vbd-interface.7)."""
        return 202 << 8 | (ord(self.id[3]) - ord("a")) << 4

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> DiskSpec:
        """:raises SpecInvalid: for a missing, unknown or ill-typed field."""
        fields = _known(cls, data, "disk")
        try:
            fields["format"] = DiskFormat(fields.get("format", DiskFormat.RAW))
        except ValueError:
            raise SpecInvalid(f"disk format {fields['format']!r} is not known: give raw or qcow2") from None
        return _build(cls, fields, "disk")


@dataclasses.dataclass(frozen=True, slots=True)
class NicSpec:
    """A network interface.

    :ivar id: 0..7, unique in the domain; the guest usually calls it ``eth<id>`` or ``enX<id>``.
    :ivar mac: lower case, ``aa:bb:cc:dd:ee:ff``; unicast.
    :ivar network: a network of the host's configuration, for example ``default``.
    :ivar addresses: IPv4 and IPv6 addresses the guest may send from; empty: any (its MAC is checked always).
    :ivar queues: pairs of rings, 1..8.
    """

    id: int
    mac: str
    network: str = "default"
    addresses: tuple[str, ...] = ()
    queues: int = 1
    limits: Limits = Limits()

    def validate(self) -> None:
        """:raises SpecInvalid: with the field, what is wrong and what would be right."""
        if not _is_int(self.id) or not 0 <= self.id < MAX_NICS:
            raise SpecInvalid(f"nic id {self.id!r} is not usable: give 0 to {MAX_NICS - 1}")
        if not isinstance(self.mac, str) or not _MAC.fullmatch(self.mac):
            raise SpecInvalid(f"nic {self.id}: mac {self.mac!r} is not usable: give one like 00:16:3e:12:34:56")
        if int(self.mac[:2], 16) & 1 or self.mac == "00:00:00:00:00:00":
            raise SpecInvalid(f"nic {self.id}: mac {self.mac} is no address of one interface: make its first byte even")
        if not isinstance(self.network, str) or not _NETWORK.fullmatch(self.network):
            raise SpecInvalid(f"nic {self.id}: network {self.network!r} is not usable: give the name of a network")
        for address in self.addresses:
            try:
                ipaddress.ip_address(address)
            except ValueError:
                raise SpecInvalid(f"nic {self.id}: address {address!r} is no IPv4 or IPv6 address") from None
        if not _is_int(self.queues) or not 1 <= self.queues <= 8:
            raise SpecInvalid(f"nic {self.id}: queues is {self.queues!r}: give 1 to 8")
        self.limits.validate(f"nic {self.id}")

    @property
    def devid(self) -> int:
        return self.id

    def to_json(self) -> dict[str, Any]:
        data = dataclasses.asdict(self)
        data["addresses"] = list(self.addresses)
        return data

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> NicSpec:
        """:raises SpecInvalid: for a missing, unknown or ill-typed field."""
        fields = _known(cls, data, "nic")
        addresses = fields.get("addresses", ())
        if not isinstance(addresses, list | tuple) or not all(isinstance(item, str) for item in addresses):
            raise SpecInvalid("nic addresses: give a list of texts")
        fields["addresses"] = tuple(addresses)
        return _build(cls, fields, "nic")


class DeviceState(enum.StrEnum):
    CONNECTING = "connecting"  # the guest's front end has not come up yet
    CONNECTED = "connected"
    RECOVERING = "recovering"  # its driver process died and is being replaced
    CLOSING = "closing"
    CLOSED = "closed"  # the guest let go of it
    FAILED = "failed"  # see `detail`


@dataclasses.dataclass(frozen=True, slots=True)
class DeviceInfo:
    """A device as it is now.

    :ivar kind: ``disk`` or ``nic``; `id` as in its spec, as text.
    :ivar spec: JSON form of the `DiskSpec` or `NicSpec`.
    :ivar size_bytes: of a disk as the guest sees it; 0 for a nic.
    :ivar stats: counters since it was attached: ``read_bytes``, ``write_bytes``, ``read_requests``,
        ``write_requests``, ``flushes``, ``discards``, ``errors``; or ``rx_bytes``, ``tx_bytes``, ``rx_packets``,
        ``tx_packets``, ``rx_dropped``, ``tx_dropped`` (rx is what the guest receives). ``restarts`` of its driver.
        One that is missing is 0.
    """

    kind: str
    id: str
    state: DeviceState
    spec: Mapping[str, Any]
    size_bytes: int = 0
    detail: str = ""
    stats: Mapping[str, int] = dataclasses.field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "spec": dict(self.spec), "stats": dict(self.stats)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> DeviceInfo:
        return cls(**{**data, "state": DeviceState(data["state"])})


def check_devices(disks: tuple[DiskSpec, ...], nics: tuple[NicSpec, ...]) -> None:
    """:raises SpecInvalid: a device is not usable, or two of a domain clash."""
    if len(disks) > MAX_DISKS or len(nics) > MAX_NICS:
        raise SpecInvalid(f"{len(disks)} disks and {len(nics)} nics: at most {MAX_DISKS} and {MAX_NICS} are possible")
    for disk in disks:
        disk.validate()
    for nic in nics:
        nic.validate()
    for what, values in (
        ("disk id", [disk.id for disk in disks]),
        ("nic id", [str(nic.id) for nic in nics]),
        ("mac", [nic.mac for nic in nics]),
        ("disk path", [disk.path for disk in disks if not disk.shared]),
    ):
        twice = sorted({value for value in values if values.count(value) > 1})
        if twice:
            raise SpecInvalid(f"{what} {twice[0]} is given twice: each may be used once in a domain")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _known(cls: type, data: Mapping[str, Any], what: str) -> dict[str, Any]:
    if not isinstance(data, Mapping):
        raise SpecInvalid(f"{what}: give an object with fields, not {data!r}")
    known = {field.name for field in dataclasses.fields(cls)}
    unknown = sorted(set(data) - known)
    if unknown:
        raise SpecInvalid(f"{what}: unknown field {unknown[0]!r}: known are {', '.join(sorted(known))}")
    fields = dict(data)
    limits = fields.get("limits", {})
    if not isinstance(limits, Limits):
        try:
            fields["limits"] = Limits(**limits)
        except TypeError as exc:
            raise SpecInvalid(f"{what}: limits is not usable: {exc}") from None
    return fields


def _build(cls: type[_T], fields: dict[str, Any], what: str) -> _T:
    try:
        return cls(**fields)
    except TypeError as exc:
        raise SpecInvalid(f"{what} is not usable: {exc}") from None
