"""A Xen host as the driver sees it: the domains there are, and which are ours. Nothing here changes a domain."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path

from hypervisor.errors import DomainNotFound, HostFailure, NotOurs, ToolstackError
from hypervisor.toolstack.api import DomainInfo, DomainSpec, DomainState, ShutdownReason
from hypervisor.toolstack.drivers.xl import parsers
from hypervisor.toolstack.drivers.xl.events import Events
from hypervisor.toolstack.drivers.xl.records import Record, Records
from hypervisor.toolstack.drivers.xl.runner import Runner
from hypervisor.toolstack.drivers.xl.store import XenstoreClient

ENDED = frozenset({DomainState.SHUTDOWN, DomainState.CRASHED})
REASONS = dict(enumerate(ShutdownReason))  # SCHEDOP_shutdown's numbers 0..4 (public/sched.h)
SUSPENDED = 2
CLAIM = "/tool/reeve/xl"
HALF_MADE = "it is being made, or its maker died before it was marked"
INCOMING, MOVED_AWAY = "--incoming", "--migratedaway"
"""What ``xl migrate`` puts after a domain's name on its way (xl_migrate.c)."""
_ON_ITS_WAY = {INCOMING: "it arrives by xl migrate", MOVED_AWAY: "it left by xl migrate: destroy what is here"}


@dataclasses.dataclass(frozen=True, slots=True)
class Settings:
    """:ivar networks: of each name the bridge. :ivar console_logs: where xenconsoled writes guests' logs."""

    runner: Runner
    xenstore: Path
    state_dir: Path
    console_logs: Path
    networks: Mapping[str, str]


class Host:
    """What the parts of the driver share."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.xl = settings.runner
        self.records = Records(settings.state_dir)
        self.store = XenstoreClient(settings.xenstore)
        self.events = Events(self.store)
        self._ident = ""

    def claim(self) -> None:
        """Only one agent acts on a host, whose state folder came first. :raises HostFailure: it is another."""
        if not self._ident:
            self._ident = self.records.ident()
        mine = f"{self._ident} {self.records.folder}"
        found = self.store.claim(CLAIM, mine)
        if found.partition(" ")[0] != self._ident:
            raise HostFailure(
                f"another agent, with state folder {found.partition(' ')[2] or 'unknown'}, runs this host's domains:"
                f" stop this one; if the other is gone for good, remove {CLAIM} with xenstore-rm"
            )

    def facts(self) -> dict[str, str]:
        return parsers.host_facts(self.xl.run("info"))

    def free(self, facts: Mapping[str, str], rows: Iterable[parsers.Row]) -> int:
        """MiB that nobody has, claims, or was promised: a guest of ours takes what it may have when it likes."""
        promised = 0
        for row in rows:
            with contextlib.suppress(ToolstackError):  # of one that cannot be read nothing is known
                record = self.records.find(row.uuid)
                if record is not None and record.made and not set("sd") & set(row.flags):
                    promised += max(0, record.run.memory_mib - row.memory_mib)
        return max(0, int(facts["free_memory"]) - int(facts.get("outstanding_claims", "0")) - promised)

    def rows(self) -> list[parsers.Row]:
        """Every domain but dom0, once: of one that moves within the host, the half that counts."""
        rows = [row for row in parsers.domain_rows(self.xl.run("list", "-v")) if row.domid]
        best: dict[str, parsers.Row] = {}
        for row in rows:
            if row.uuid not in best or _rank(row) < _rank(best[row.uuid]):
                best[row.uuid] = row
        return sorted(best.values(), key=lambda row: row.domid)

    def row(self, uuid: str) -> parsers.Row:
        """:raises DomainNotFound: it is not there. What cannot be read raises something else."""
        return pick(self.rows(), uuid)

    def record(self, uuid: str) -> Record:
        record = self.records.find(uuid)
        if record is None:
            raise NotOurs(f"domain {uuid} was not made by this driver: use xl itself")
        return record

    def specs(self) -> list[DomainSpec]:
        """Of every domain made here, also while it is being made: what they name is taken.

        :raises HostFailure: one cannot be read, and what it holds is not known.
        """
        found = [self.records.find(uuid) for uuid in self.records.uuids()]
        return [record.spec for record in found if record is not None]

    def ours(self, row: parsers.Row) -> Record:
        """:raises NotOurs: not provably ours: no record of it here, or no marker in xenstore."""
        record = self.record(row.uuid)
        if self.store.read(node(row, "uuid")) != row.uuid:
            raise NotOurs(f"domain {row.uuid} has no marker of ours in xenstore: use xl itself")
        return record

    def info(self, row: parsers.Row) -> DomainInfo:
        """What cannot be read of it makes its state `DomainState.UNKNOWN`."""
        base, suffix = split_name(row.name)
        info = DomainInfo(row.uuid, base, row.domid, state(row), row.vcpus, row.memory_mib)
        info = dataclasses.replace(
            info,
            cpu_time_ns=int(row.seconds * 1e9),
            shutdown_reason=REASONS.get(row.reason) if row.reason is not None else None,
            detail=_ON_ITS_WAY.get(suffix, ""),
        )
        try:
            record = self.records.find(row.uuid)
            owner = self.store.read(node(row, "owner")) if record is not None else None
        except ToolstackError as exc:
            return dataclasses.replace(info, state=DomainState.UNKNOWN, detail=exc.message)
        if record is not None and not record.made:
            info = dataclasses.replace(info, detail=f"{HALF_MADE}; if nobody is: xl destroy {row.domid}")
        if record is None or owner is None:
            return info
        detail = info.detail
        if base != record.spec.name:
            detail = f"it was renamed by another: it was {record.spec.name}"
        return dataclasses.replace(
            info,
            owner=owner,
            detail=detail,
            type=record.run.type,
            created_at=record.created_at,
            metadata=record.spec.metadata,
            max_vcpus=record.run.effective_max_vcpus,
            memory_target_mib=record.run.memory_mib,
            max_memory_mib=record.run.effective_max_memory_mib,
        )

    def log(self, spec: DomainSpec) -> Path:
        """xenconsoled's log of it."""
        return self.settings.console_logs / f"guest-{spec.name}.log"


def pick(rows: Iterable[parsers.Row], uuid: str) -> parsers.Row:
    """:raises DomainNotFound: it is not among them."""
    for row in rows:
        if row.uuid == uuid:
            return row
    raise DomainNotFound(f"no domain {uuid} on this host: list them")


def split_name(name: str) -> tuple[str, str]:
    """A domain's own name, and what ``xl migrate`` put after it."""
    for suffix in _ON_ITS_WAY:
        if name.endswith(suffix):
            return name.removesuffix(suffix), suffix
    return name, ""


def node(row: parsers.Row, name: str) -> str:
    """Our nodes of a domain; the guest can read its folder and cannot write there."""
    return f"/local/domain/{row.domid}/reeve/{name}"


def state(row: parsers.Row) -> DomainState:
    if "d" in row.flags:
        return DomainState.DYING
    if "s" in row.flags:
        return DomainState.CRASHED if "c" in row.flags or row.reason in (3, 4) else DomainState.SHUTDOWN
    return DomainState.PAUSED if "p" in row.flags else DomainState.RUNNING


def _rank(row: parsers.Row) -> tuple[int, int]:
    """The half that was the domain before is it until ``xl`` has renamed it."""
    return ("", INCOMING, MOVED_AWAY).index(split_name(row.name)[1]), row.domid
