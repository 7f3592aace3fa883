"""What is said about saving and moving a domain: frozen, with JSON forms. Part of `hypervisor.toolstack.api`.

A migration has one identity, its *ident* (a UUID), on both hosts. Each host keeps a record of its half, which outlives
the host process. The source's record decides: until it says `MigrationPhase.MOVED` the domain is the source's, from
then on the target's. So there are never two that run::

    source:  starting → copying → switching → moved            (it is gone from here)
                 └──────────┴─────────┴─────→ kept             (it runs on here; `error` says why)
    target:  waiting → receiving → complete → running
                 └──────────┴─────────┴─────→ dropped          (nothing is left of it here)

`MigrationPhase.UNRESOLVED`: a half is paused and its host cannot know what the other one did.

With `MigrationMode.STANDBY` both are in `MigrationPhase.STANDBY` from the target's first whole epoch on::

    source:  starting → copying → standby → kept               (ended: it runs on here, without a copy)
                                     └────→ switching → moved  (the target was told to take over, and asked)
    target:  waiting → receiving → standby → dropped           (ended by the source)
                                     ├────→ complete           (the source is silent: paused at the last whole epoch)
                                     └────→ complete → running (it has taken over)
"""

from __future__ import annotations

import dataclasses
import enum
import uuid as uuid_module
from collections.abc import Mapping
from typing import Any, Self, TypeVar

from hypervisor.errors import SpecInvalid
from hypervisor.toolstack.spec import DomainSpec

MAX_TIMEOUT = 86400.0
WAIT_SECONDS = 300.0
"""A target's half to which no source has connected drops itself after so long."""
MAX_OFFER_BYTES = 192 * 1024
"""Longest JSON text of an offer or a ticket: it has to pass the control socket and a message."""

_T = TypeVar("_T")


class MigrationMode(enum.StrEnum):
    """How a domain is moved."""

    LIVE = "live"  # the guest does not notice: same domid, same machine frames
    IMAGE = "image"  # the guest suspends and resumes, as with save and restore
    STANDBY = "standby"  # it stays where it is, and the target holds a copy that is kept up to date


class MigrationRole(enum.StrEnum):
    SOURCE = "source"
    TARGET = "target"


class MigrationPhase(enum.StrEnum):
    """See the picture above. The values of both roles; `UNRESOLVED` is of either."""

    STARTING = "starting"
    COPYING = "copying"  # memory is sent while the guest runs
    SWITCHING = "switching"  # the guest is paused, the rest is sent
    MOVED = "moved"
    KEPT = "kept"
    WAITING = "waiting"  # for the source to connect
    RECEIVING = "receiving"
    STANDBY = "standby"  # the guest runs at the source, the target holds its last whole epoch
    COMPLETE = "complete"  # whole, paused, not allowed to run yet
    RUNNING = "running"
    DROPPED = "dropped"
    UNRESOLVED = "unresolved"

    @property
    def ended(self) -> bool:
        """Nothing more will happen by itself, and nobody has to decide."""
        return self in _ENDED


_ENDED = frozenset({MigrationPhase.MOVED, MigrationPhase.KEPT, MigrationPhase.RUNNING, MigrationPhase.DROPPED})


@dataclasses.dataclass(frozen=True, slots=True)
class SaveInfo:
    """A saved image.

    :ivar bytes: size of the file; `pages` guest pages in it that hold data.
    :ivar downtime_ms: how long the guest stood still; 0 when it was not kept running.
    :ivar total_s: how long it took altogether, seconds.
    """

    uuid: str
    name: str
    path: str
    bytes: int
    pages: int = 0
    downtime_ms: float = 0.0
    total_s: float = 0.0

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        return _build(cls, data, "save info")


@dataclasses.dataclass(frozen=True, slots=True)
class MigrationOffer:
    """All that a target must know to say yes or no.

    :ivar driver: name of the driver that offers; only one of the same name can take it.
    :ivar build: what must be equal for a live move: engine and its version, form of the state.
    :ivar spec: what the domain was made from, with the owner's marker of the source.
    :ivar domid: what it has now, and must have there for a live move.
    :ivar memory_mib: what the target must set aside, MiB: what the guest has or may take at any time.
    :ivar vcpus: how many are online.
    :ivar running: False: it is paused, and shall be so after the move.
    :ivar detail: JSON for the target's driver alone: CPU policy, frames, images.
    """

    driver: str
    build: str
    spec: DomainSpec
    domid: int
    memory_mib: int
    vcpus: int
    running: bool = True
    detail: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def uuid(self) -> str:
        return self.spec.uuid

    def to_json(self) -> dict[str, Any]:
        return {**_shallow(self), "spec": self.spec.to_json(), "detail": dict(self.detail)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """:raises SpecInvalid: a field is missing, unknown or of another type."""
        fields = _mapping(data, "migration offer")
        spec = fields.get("spec")
        if not isinstance(spec, DomainSpec):
            fields["spec"] = DomainSpec.from_json(_mapping(spec, "migration offer: spec"))
        return _build(cls, fields, "migration offer")


@dataclasses.dataclass(frozen=True, slots=True)
class MigrationTicket:
    """What the target says when it is ready: where to connect.

    :ivar mode: how it will be moved.
    :ivar address, port: where the target listens; the fake driver names a folder and 0.
    :ivar detail: JSON for the source's driver alone.
    """

    ident: str
    uuid: str
    mode: MigrationMode
    address: str
    port: int
    detail: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {**_shallow(self), "detail": dict(self.detail)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """:raises SpecInvalid: a field is missing, unknown or of another type."""
        fields = _enumerated(_mapping(data, "migration ticket"), "mode", MigrationMode, "migration ticket")
        return _build(cls, fields, "migration ticket")


@dataclasses.dataclass(frozen=True, slots=True)
class MigrationOptions:
    """What a sender may ask for.

    :ivar bandwidth_bytes: at most so many bytes a second while the guest runs; 0: no limit.
    :ivar downtime_ms: how long the guest may stand still: the switch begins when what is left should take no longer.
    :ivar compress: ``none`` or ``zstd``.
    :ivar max_rounds: after so many rounds of copying the switch begins, whatever is left.
    :ivar throttle: slow the vCPUs down when they dirty memory faster than it can be sent.
    :ivar timeout_s: when the switch has not begun by then, it fails and the guest runs on.
    :ivar copy_disks: copy disks that both hosts see, too; those that the target does not see are always copied.
    :ivar flatten_disks: a copied disk has no backing files afterwards; else the target must have the same ones.
    :ivar interval_ms: of a standby: from the beginning of one epoch to that of the next, at least.
    """

    bandwidth_bytes: int = 0
    downtime_ms: float = 30.0
    compress: str = "none"
    max_rounds: int = 30
    throttle: bool = True
    timeout_s: float = 3600.0
    copy_disks: bool = False
    flatten_disks: bool = False
    interval_ms: float = 200.0

    def validate(self) -> None:
        """:raises SpecInvalid: with the field, what is wrong and what would be right."""
        if not 0 <= self.bandwidth_bytes < 1 << 48:
            raise SpecInvalid(f"bandwidth_bytes is {self.bandwidth_bytes}: give bytes a second, 0 for no limit")
        if not 0 < self.downtime_ms <= 60000:
            raise SpecInvalid(f"downtime_ms is {self.downtime_ms}: give more than 0, at most 60000")
        if self.compress not in ("none", "zstd"):
            raise SpecInvalid(f"compress is {self.compress!r}: give none or zstd")
        if not 1 <= self.max_rounds <= 1000:
            raise SpecInvalid(f"max_rounds is {self.max_rounds}: give 1 to 1000")
        if not 0 < self.timeout_s <= MAX_TIMEOUT:
            raise SpecInvalid(f"timeout_s is {self.timeout_s}: give more than 0, at most {MAX_TIMEOUT:g} seconds")
        if not 10 <= self.interval_ms <= 60000:
            raise SpecInvalid(f"interval_ms is {self.interval_ms}: give 10 to 60000")

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """:raises SpecInvalid: a field is unknown, of another type or out of range."""
        options = _build(cls, data, "migration options")
        options.validate()
        return options


@dataclasses.dataclass(frozen=True, slots=True)
class MigrationStatus:
    """One half of a migration as it is now. The target knows of the figures what it has counted itself.

    :ivar peer: the other host's name as agents address it, as it was told; only kept and given back.
    :ivar name: of the domain.
    :ivar memory_mib: what this half holds or set aside, MiB; `vcpus` likewise. 0 when it has ended.
    :ivar rounds: rounds of copying begun.
    :ivar pages_sent: guest pages that went over, each time counted; `bytes_sent` what the network carried.
    :ivar pages_total: pages of the guest; `dirty_pages` those still to be sent.
    :ivar rate_bytes: bytes a second of the last round; `dirty_rate_pages` pages a second the guest dirtied meanwhile.
    :ivar downtime_estimate_ms: what the switch would cost now; `downtime_ms` what it did cost, 0 before it.
    :ivar total_s: seconds since it began, to its end.
    :ivar epochs: of a standby, how many the target has had whole; `pause_ms` how long the guest stood still for the
        last one.
    :ivar lost_ms: of a target that holds the last epoch of a silent source: at most so long the guest had run on after
        it. 0: nothing is lost.
    :ivar error: JSON form of the `ToolstackError` that ended it, or None.
    :ivar detail: one line for a human; for a half that waits for a decision the command that makes it.
    """

    ident: str
    uuid: str
    role: MigrationRole
    phase: MigrationPhase
    mode: MigrationMode = MigrationMode.LIVE
    peer: str = ""
    name: str = ""
    memory_mib: int = 0
    vcpus: int = 0
    rounds: int = 0
    pages_sent: int = 0
    bytes_sent: int = 0
    pages_total: int = 0
    dirty_pages: int = 0
    rate_bytes: float = 0.0
    dirty_rate_pages: float = 0.0
    downtime_estimate_ms: float = 0.0
    downtime_ms: float = 0.0
    total_s: float = 0.0
    epochs: int = 0
    pause_ms: float = 0.0
    lost_ms: float = 0.0
    error: Mapping[str, Any] | None = None
    detail: str = ""

    def to_json(self) -> dict[str, Any]:
        return {**_shallow(self), "error": None if self.error is None else dict(self.error)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """:raises SpecInvalid: a field is missing, unknown or of another type."""
        fields = _mapping(data, "migration status")
        for name, kind in (("role", MigrationRole), ("phase", MigrationPhase), ("mode", MigrationMode)):
            if name in fields:
                fields = _enumerated(fields, name, kind, "migration status")
        return _build(cls, fields, "migration status")


def check_ident(ident: str) -> None:
    """:raises SpecInvalid: no UUID in canonical form."""
    try:
        canonical = str(uuid_module.UUID(ident))
    except (ValueError, AttributeError, TypeError):
        canonical = ""
    if not ident or canonical != ident:
        raise SpecInvalid(
            f"migration ident {ident!r} is no UUID in canonical form: give one like {uuid_module.UUID(int=1)}"
        )


def _shallow(item: Any) -> dict[str, Any]:
    return {field.name: getattr(item, field.name) for field in dataclasses.fields(item)}


def _mapping(data: object, what: str) -> dict[str, Any]:
    if not isinstance(data, Mapping):
        raise SpecInvalid(f"{what}: give an object with fields, not {str(data)[:60]!r}")
    return dict(data)


def _enumerated(fields: dict[str, Any], name: str, kind: type[enum.StrEnum], what: str) -> dict[str, Any]:
    try:
        return {**fields, name: kind(fields[name])}
    except (KeyError, ValueError):
        raise SpecInvalid(f"{what}: {name} is {fields.get(name)!r}: give one of {', '.join(kind)}") from None


def _build(cls: type[_T], data: Mapping[str, Any], what: str) -> _T:
    fields = _mapping(data, what)
    known = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    unknown = sorted(str(name) for name in fields if name not in known)
    if unknown:
        raise SpecInvalid(f"{what}: unknown field {unknown[0][:60]!r}: known are {', '.join(sorted(known))}")
    for name, value in fields.items():
        if not _fits(value, str(known[name].type)):
            raise SpecInvalid(f"{what}: {name} is {str(value)[:60]!r}: give a {known[name].type}")
    try:
        return cls(**fields)
    except TypeError as exc:
        raise SpecInvalid(f"{what} is not usable: {exc}") from None


def _fits(value: object, kind: str) -> bool:
    """Whether a value may stand in a field annotated `kind`; kinds that are not listed were checked before."""
    if kind == "bool":
        return isinstance(value, bool)
    if kind == "int":
        return isinstance(value, int) and not isinstance(value, bool)
    if kind == "float":
        return isinstance(value, int | float) and not isinstance(value, bool)
    if kind == "str":
        return isinstance(value, str)
    if kind.startswith("Mapping"):
        return isinstance(value, Mapping) or (value is None and "None" in kind)
    return True
