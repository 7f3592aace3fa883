"""The domain table: what the host process knows of each domain right now."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from hypervisor.devices.driver import Opened
from hypervisor.errors import DomainExists, DomainNotFound, NameInUse, ToolstackError
from hypervisor.host.consoles import ConsoleHub
from hypervisor.host.ledger import PAGES_PER_MIB
from hypervisor.host.process import ProcessHold
from hypervisor.host.records import DomainRecord, Phase
from hypervisor.toolstack.api import DomainEvent, DomainInfo, DomainSpec, DomainState
from hypervisor.toolstack.devices import DeviceInfo, DiskSpec, NicSpec
from hypervisor.toolstack.info import still
from hypervisor.waiting import within

LOG = logging.getLogger(__name__)

STATS_TIMEOUT = 1.0
NOT_THERE = (Phase.BUILDING, Phase.ARRIVING)
"""Domains in these phases are not listed."""


class Orphan(Protocol):
    async def end(self) -> None:
        """Kill it and let go of it."""


class Attachment(Protocol):
    """The backends of one running domain (xenstore and console rings)."""

    def request_shutdown(self, reason: str) -> None:
        """Write control/shutdown."""

    def withdraw_shutdown(self) -> bool:
        """Forget what was asked, and take it back if the guest has not taken it; whether it had not."""

    def request_sysrq(self, key: str) -> None:
        """Write control/sysrq."""

    def notice(self) -> str:
        """What was asked of the guest and whether it has taken it; "" when nothing was."""

    def set_vcpus(self, vcpus: int, max_vcpus: int) -> None:
        """Ask the guest to have that many online."""

    def set_memory_target(self, kib: int) -> None:
        """Ask the guest's balloon driver for that."""

    def ended(self) -> None:
        """The guest runs no more."""

    def detach(self) -> None:
        """The domain is gone: its nodes, watches and rings too."""

    def let_go(self) -> None:
        """The host process ends, the domain does not."""


class Devices(Protocol):
    """The devices of one domain (`hypervisor.host.devices.DomainDevices`)."""

    async def open_all(self) -> None: ...

    def begin(self) -> None: ...

    def adopt(self) -> None: ...

    def guest_ended(self) -> None: ...

    async def halt(self) -> None: ...

    async def end(self) -> None: ...

    async def let_go(self) -> None: ...

    async def flush(self) -> None: ...

    async def quiesce(self) -> None: ...

    def all(self, *kinds: str) -> Sequence[Any]: ...

    def disk_backend(self) -> Any: ...

    async def pack(self, copied: frozenset[str]) -> dict[str, Any]: ...

    def resume(self) -> None: ...

    async def check_all(self, elsewhere: frozenset[str]) -> dict[str, int]: ...

    async def expect(self) -> None: ...

    def arrive(self, opened: Mapping[str, Opened] | None = None) -> None: ...

    async def list(self) -> list[DeviceInfo]: ...

    async def attach(self, kind: str, spec: DiskSpec | NicSpec) -> DeviceInfo: ...

    async def detach(self, kind: str, ident: str, timeout: float, *, force: bool) -> None: ...

    async def resize(self, ident: str, size_bytes: int) -> DeviceInfo: ...


@dataclasses.dataclass(slots=True, eq=False)
class Domain:
    """One entry.

    :ivar lock: one verb at a time.
    :ivar devices: set as long as the domain is in the table.
    :ivar stats: what its process said last.
    :ivar process: None when the domain holds nothing any more.
    :ivar lost: the process is there but has not identified itself yet: nothing can be said of its state.
    :ivar orphan: that process.
    :ivar dying: its end is being dealt with.
    :ivar suspension: somebody waits until its guest has suspended itself.
    :ivar held: it came from another host, and it is not known that it has left that: it must not run.
    :ivar boot: what its process said of the guest when it was built.
    """

    record: DomainRecord
    console: ConsoleHub
    lock: asyncio.Lock = dataclasses.field(default_factory=asyncio.Lock)
    process: ProcessHold | None = None
    attachment: Attachment | None = None
    devices: Devices | None = None
    stats: dict[str, Any] = dataclasses.field(default_factory=dict)
    lost: bool = False
    orphan: Orphan | None = None
    dying: bool = False
    suspension: asyncio.Future[None] | None = None
    held: bool = False
    boot: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def uuid(self) -> str:
        return self.record.spec.uuid

    @property
    def state(self) -> DomainState:
        if self.dying:
            return DomainState.DYING
        return DomainState.UNKNOWN if self.lost else self.record.state

    async def refresh(self) -> str:
        """Ask the process what it knows of the guest; "" or why that cannot be known."""
        if self.lost:
            return "its process does not answer"
        if self.process is None or not self.process.alive or self.dying or self.record.phase is not Phase.MADE:
            return ""
        try:
            stats = await self.process.request("stats", STATS_TIMEOUT)
            self.record.cpu_time_ns = int(stats["cpu_time_ns"])
            self.stats = stats
        except (ToolstackError, KeyError, TypeError, ValueError) as exc:
            LOG.debug("stats of %s: %s", self.uuid, exc)
            return "" if self.record.ended or self.dying else "its process does not answer"
        return ""

    def _notice(self) -> str:
        return "" if self.record.ended or self.attachment is None else self.attachment.notice()

    async def info(self) -> DomainInfo:
        silent = await self.refresh()
        record, spec = self.record, self.record.spec
        state = self.state
        if silent and state in (DomainState.RUNNING, DomainState.PAUSED):
            state = DomainState.UNKNOWN
        most = record.run.max_memory_mib * PAGES_PER_MIB
        pages = self._told("memory_pages", record.run.memory_mib * PAGES_PER_MIB, most)
        return DomainInfo(
            uuid=spec.uuid,
            name=spec.name,
            domid=record.domid,
            state=state,
            vcpus=self._told("vcpus", record.run.vcpus, record.run.max_vcpus),
            memory_mib=-(-pages // PAGES_PER_MIB),
            owner=spec.owner,
            type=spec.type,
            cpu_time_ns=record.cpu_time_ns,
            shutdown_reason=record.reason if record.ended else None,
            created_at=record.created_at,
            detail=silent or record.detail or self._notice(),
            metadata=spec.metadata,
            max_vcpus=record.run.max_vcpus,
            memory_target_mib=record.run.memory_mib,
            max_memory_mib=record.run.max_memory_mib,
        )

    def _told(self, name: str, otherwise: int, most: int) -> int:
        """A number that the domain process said last."""
        value = self.stats.get(name)
        return value if type(value) is int and 0 <= value <= most else otherwise


class DomainTable:
    """All domains of the host, those being built included; events; waiting for a change."""

    def __init__(self) -> None:
        self._domains: dict[str, Domain] = {}
        self._changed = asyncio.Event()
        self._listeners: dict[int, Callable[[DomainEvent], None]] = {}
        self._numbers = itertools.count()

    def check_free(self, spec: DomainSpec) -> None:
        """:raises DomainExists, NameInUse: the UUID or the name is taken."""
        if spec.uuid in self._domains:
            other = self._domains[spec.uuid].record.spec.name
            raise DomainExists(f"uuid {spec.uuid} is in use by domain {other!r}: destroy it or give another uuid")
        for domain in self._domains.values():
            if domain.record.spec.name == spec.name:
                raise NameInUse(f"name {spec.name!r} is in use by domain {domain.uuid}: destroy it or rename yours")

    def add(self, domain: Domain) -> None:
        """:raises DomainExists, NameInUse: the UUID or the name is taken."""
        self.check_free(domain.record.spec)
        self._domains[domain.uuid] = domain
        self.changed()

    def remove(self, domain: Domain) -> None:
        if self._domains.get(domain.uuid) is domain:
            del self._domains[domain.uuid]
        self.changed()

    def find(self, uuid: str) -> Domain | None:
        return self._domains.get(uuid)

    def get(self, uuid: str) -> Domain:
        """:raises DomainNotFound: no such domain, or one that is only being built."""
        domain = self._domains.get(uuid)
        if domain is None:
            raise DomainNotFound(f"no domain with uuid {uuid} on this host: see the list of domains")
        if domain.record.phase is Phase.ARRIVING:
            raise DomainNotFound(
                f"domain {uuid} is on its way to this host (migration {domain.record.migration}): wait until it is here"
            )
        return domain

    def all(self) -> list[Domain]:
        return list(self._domains.values())

    def made(self) -> list[Domain]:
        """Every domain that has been built, ordered by domid."""
        made = [domain for domain in self._domains.values() if domain.record.phase not in NOT_THERE]
        return sorted(made, key=lambda domain: domain.record.domid)

    def domids(self) -> frozenset[int]:
        return frozenset(domain.record.domid for domain in self._domains.values())

    def changed(self) -> None:
        """Wake whoever waits for a state."""
        self._changed.set()
        self._changed = asyncio.Event()

    def emit(self, kind: str, uuid: str, detail: str = "", *, loud: bool = True) -> None:
        """:param loud: it is worth a line of the log."""
        event = DomainEvent(kind, uuid, time.time(), detail)
        LOG.log(logging.INFO if loud else logging.DEBUG, "domain %s %s%s", uuid, kind, f": {detail}" if detail else "")
        for listener in list(self._listeners.values()):
            listener(event)
        self.changed()

    def subscribe(self, listener: Callable[[DomainEvent], None]) -> Callable[[], None]:
        number = next(self._numbers)
        self._listeners[number] = listener
        return lambda: self._listeners.pop(number, None) and None

    async def wait(self, uuid: str, states: frozenset[DomainState], timeout: float) -> Domain | None:
        """:raises OperationTimeout: still in another state after `timeout` seconds."""
        deadline = time.monotonic() + timeout
        while True:
            changed = self._changed
            domain = self._domains.get(uuid)
            if domain is None:
                return None
            if domain.record.phase not in NOT_THERE and domain.state in states:
                return domain
            left = deadline - time.monotonic()
            if left <= 0:
                raise still(uuid, domain.state, states, timeout)
            try:
                await within(changed.wait(), left)
            except TimeoutError:
                continue
