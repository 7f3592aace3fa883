"""What the host process remembers of its domains on disk.

``<state>/domains/<uuid>/domain.json`` is replaced atomically at every change. It
need not survive a power cut, since no domain does; it must survive SIGKILL of
the host process, and a rename does.
"""

from __future__ import annotations

import dataclasses
import enum
import json
import logging
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hypervisor.errors import HostFailure, ToolstackError
from hypervisor.host.ledger import Claim
from hypervisor.toolstack.api import DomainSpec, DomainState, ShutdownReason

LOG = logging.getLogger(__name__)

FORMAT = 1
RECORD_NAME = "domain.json"
LAST_DOMID = 0x7FEF
"""Domains have 1 up to this (below DOMID_FIRST_RESERVED, public/xen.h)."""


class Phase(enum.StrEnum):
    BUILDING = "building"  # not yet a domain: after a crash of the host it is removed
    MADE = "made"
    ARRIVING = "arriving"  # comes from another host, and is not whole: after a crash of the host it is removed
    REMAKING = "remaking"  # being built anew: after a crash of the host that is begun again


@dataclasses.dataclass(frozen=True, slots=True)
class RunSizes:
    """Sizes of the present incarnation: its spec may have been changed for the next one.

    :ivar vcpus: how many the guest was asked to have online; `memory_mib` its balloon's target.
    """

    vcpus: int
    max_vcpus: int
    memory_mib: int
    max_memory_mib: int

    @classmethod
    def of(cls, spec: DomainSpec) -> RunSizes:
        return cls(spec.vcpus, spec.effective_max_vcpus, spec.memory_mib, spec.effective_max_memory_mib)

    def applied(self, spec: DomainSpec) -> DomainSpec:
        """The spec with these sizes."""
        sizes = dataclasses.asdict(self)
        return dataclasses.replace(spec, **sizes)


@dataclasses.dataclass(slots=True)
class DomainRecord:
    """One domain.

    :ivar spec: what its next incarnation is made from. :ivar run: what the present one was, and was resized to.
    :ivar claim: its machine frames; None when it holds none any more (its process is gone).
    :ivar created_at: seconds since the epoch; `started_at` of the present incarnation.
    :ivar restarts: how often it was built anew.
    :ivar pid: of its process, for people; what counts is who listens at its socket.
    :ivar console: what its console backend saved (`ConsoleRing.save`).
    :ivar suspending: it was asked to suspend itself, to be saved: if nobody waits for that any more it goes on.
    :ivar saved_as: where its image appears when it is whole, and device and inode of it: then the domain is to go.
    :ivar migration: ident of the migration that has it in its hands (`hypervisor.host.migration`), "" for none.
    :ivar template: ident of the template on whose memory it runs (`hypervisor.host.templates`), "" for none.
    :ivar devices: what its devices saved (`hypervisor.host.device_memory.DeviceMemory`), by ``kind/id``.
    """

    spec: DomainSpec
    domid: int
    phase: Phase = Phase.BUILDING
    state: DomainState = DomainState.PAUSED
    claim: Claim | None = None
    reason: ShutdownReason | None = None
    detail: str = ""
    created_at: float = 0.0
    started_at: float = 0.0
    restarts: int = 0
    cpu_time_ns: int = 0
    pid: int = 0
    console: dict[str, Any] = dataclasses.field(default_factory=dict)
    devices: dict[str, Any] = dataclasses.field(default_factory=dict)
    run: RunSizes = RunSizes(0, 0, 0, 0)
    suspending: bool = False
    saved_as: list[Any] = dataclasses.field(default_factory=list)
    migration: str = ""
    template: str = ""

    def __post_init__(self) -> None:
        if not self.run.vcpus:
            self.run = RunSizes.of(self.spec)

    @property
    def ended(self) -> bool:
        return self.state in (DomainState.SHUTDOWN, DomainState.CRASHED)

    def is_saved(self) -> bool:
        """Whether its image has appeared."""
        try:
            path, *identity = self.saved_as
            found = os.lstat(path)
        except (ValueError, OSError):
            return False
        return identity == [found.st_dev, found.st_ino]

    def to_json(self) -> dict[str, Any]:
        data = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        data["spec"] = self.spec.to_json()
        data["claim"] = self.claim.to_json() if self.claim else None
        data["run"] = dataclasses.asdict(self.run)
        return {"format": FORMAT, **data}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> DomainRecord:
        """:raises ValueError, KeyError, TypeError, SpecInvalid: not a record of ours."""
        fields = dict(data)
        if fields.pop("format") != FORMAT:
            raise ValueError(f"format is not {FORMAT}")
        fields["spec"] = DomainSpec.from_json(fields["spec"])
        fields["phase"] = Phase(fields["phase"])
        fields["state"] = DomainState(fields["state"])
        fields["claim"] = Claim.from_json(fields["claim"]) if fields["claim"] else None
        if "run" in fields:
            fields["run"] = RunSizes(**fields["run"])
        fields["reason"] = ShutdownReason(fields["reason"]) if fields["reason"] else None
        return cls(**fields)


class RecordStore:
    """The folder of all records. :param root: the host's state folder; made with mode 0700."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._domains = root / "domains"
        self._counter = root / "next-domid"
        for folder in (root, self._domains):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    def directory(self, uuid: str) -> Path:
        return self._domains / uuid

    def prepare(self, uuid: str) -> Path:
        """The empty folder of a new domain. :raises HostFailure: it cannot be made."""
        folder = self.directory(uuid)
        try:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(mode=0o700)
        except OSError as exc:
            raise HostFailure(f"{folder} cannot be made: {exc.strerror}; free space or correct its rights") from exc
        return folder

    def save(self, record: DomainRecord) -> None:
        """:raises HostFailure: the disk does not take it."""
        write_atomically(self.directory(record.spec.uuid) / RECORD_NAME, json.dumps(record.to_json()))

    def remove(self, uuid: str) -> None:
        shutil.rmtree(self.directory(uuid), ignore_errors=True)

    def load(self) -> Iterator[DomainRecord]:
        """Every record that can be read; what is no domain of ours is left alone and logged."""
        for folder in sorted(self._domains.iterdir()):
            path = folder / RECORD_NAME
            try:
                record = DomainRecord.from_json(json.loads(path.read_text()))
                if record.spec.uuid != folder.name:
                    raise ValueError(f"it tells of {record.spec.uuid}")
            except FileNotFoundError:
                LOG.info("%s holds no record: a create was cut short; removing it", folder)
                self.remove(folder.name)
            except (ValueError, KeyError, TypeError, OSError, ToolstackError) as exc:
                LOG.error("record %s cannot be read (%s): the domain is not adopted, its folder is kept", path, exc)
            else:
                yield record

    def next_domid(self, taken: frozenset[int]) -> int:
        """A domain number that was not given out lately.

        A new state folder begins at a random one: a domain that moves keeps its number, which must be free there.
        """
        try:
            last = int(self._counter.read_text())
        except (OSError, ValueError):
            # A domain that is being made has none yet.
            last = max(filter(None, taken), default=secrets.randbelow(LAST_DOMID))
        domid = last
        for _ in range(LAST_DOMID):
            domid = domid % LAST_DOMID + 1
            if domid not in taken:
                write_atomically(self._counter, str(domid))
                return domid
        raise HostFailure("every domain number is in use: end a domain")


def write_atomically(path: Path, text: str) -> None:
    """:raises HostFailure: the disk does not take it; the old content stays."""
    temporary = path.with_name(path.name + ".new")
    try:
        with open(temporary, "w") as file:
            file.write(text)
        os.replace(temporary, path)
    except OSError as exc:
        raise HostFailure(f"{path} cannot be written: {exc.strerror}; free space or correct its rights") from exc
