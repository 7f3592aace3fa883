"""Claims: memory and vCPUs set aside, so that two instructions cannot share what is there once.

A claim says what a domain is to have in all. It lives in the journal from before its domain is built or grows until
its instruction is finished. What is free is computed from the domain table and the claims each time, so there is
nothing to rebuild after a crash. A domain counts with the most of

* what it has, and what its balloon was told to have;
* what is set aside for it while it is on its way here;
* what a claim says: so growth is taken before it happens, and what a shrinking guest gives back is free only when
  its instruction has ended well;
* what it had before a cold resize that may still be reverted (`agent.resizing.Pending`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from agent.journal import Journal
from agent.resizing import Pending, held_mib
from hypervisor.errors import InsufficientMemory, InsufficientVcpus
from hypervisor.toolstack.api import Capability, MigrationRole, Toolstack

LOG = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, slots=True)
class Capacity:
    """What the host has and what is left of it. Memory in MiB; vCPUs after overcommit."""

    memory_total_mib: int
    memory_reserved_mib: int
    memory_used_mib: int
    memory_claimed_mib: int
    memory_free_mib: int
    cpus: int
    vcpus_total: int
    vcpus_used: int
    vcpus_claimed: int
    vcpus_free: int
    domains: int

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


class Share(NamedTuple):
    """A domain's part of the host."""

    memory_mib: int = 0
    vcpus: int = 0

    def most(self, other: Share) -> Share:
        return Share(max(self.memory_mib, other.memory_mib), max(self.vcpus, other.vcpus))


def _sum(shares: dict[str, Share]) -> Share:
    return Share(sum(share.memory_mib for share in shares.values()), sum(share.vcpus for share in shares.values()))


class ResourceClaims:
    """The agent's side of `agent.api.Claims`.

    :param vcpu_ratio: vCPUs that may be given per host CPU.
    :param reserved_mib: host memory no domain may have.
    """

    def __init__(
        self, toolstack: Toolstack, journal: Journal, *, vcpu_ratio: float = 16.0, reserved_mib: int = 0
    ) -> None:
        self._toolstack = toolstack
        self._journal = journal
        self.vcpu_ratio = vcpu_ratio
        self.reserved_mib = reserved_mib
        self.on_change: Callable[[], None] = lambda: None  # must not block
        self._lock = threading.Lock()

    def capacity(self, without: str = "") -> Capacity:
        """What is left now.

        :param without: instruction whose own claim is not counted.
        :raises ToolstackError: the host does not answer.
        """
        return self._look(without)[0]

    def shares(self) -> tuple[Capacity, dict[str, Share]]:
        """The capacity, and what is counted of it for each domain that is there, on its way here or claimed.

        :raises ToolstackError: the host does not answer.
        """
        return self._look("")

    def _look(self, without: str) -> tuple[Capacity, dict[str, Share]]:
        """The capacity, and what is counted of it for each domain."""
        # The claims first: one that ends in between has its domain in the table read after it.
        claims = [row for row in self._journal.claims() if row[0] != without]
        host = self._toolstack.host_info()
        domains = self._toolstack.list_domains()
        has = {domain.uuid: Share(held_mib(domain), domain.vcpus) for domain in domains}
        for half in self._toolstack.migration_list() if Capability.LIVE_MIGRATION in host.capabilities else ():
            if half.role is MigrationRole.TARGET and not half.phase.ended:
                # On its way here: the driver has set its memory aside before it lists the domain.
                has[half.uuid] = has.get(half.uuid, Share()).most(Share(half.memory_mib, half.vcpus))
        counted = dict(has)
        for domain in domains:
            pending = Pending.of(domain.metadata)
            if pending is not None and pending.open():
                old = Share(pending.old["memory_mib"], pending.old["vcpus"])
                counted[domain.uuid] = counted[domain.uuid].most(old)
        for _instruction, uuid, memory_mib, vcpus in claims:
            counted[uuid] = counted.get(uuid, Share()).most(Share(memory_mib, vcpus))
        used = _sum(has)
        claimed = Share(*(a - b for a, b in zip(_sum(counted), used, strict=True)))
        by_table = host.memory_total_mib - self.reserved_mib - used.memory_mib
        by_driver = host.memory_free_mib - self.reserved_mib
        vcpus_total = int(host.cpus * self.vcpu_ratio)
        capacity = Capacity(
            memory_total_mib=host.memory_total_mib,
            memory_reserved_mib=self.reserved_mib,
            memory_used_mib=used.memory_mib,
            memory_claimed_mib=claimed.memory_mib,
            memory_free_mib=max(0, min(by_table, by_driver) - claimed.memory_mib),
            cpus=host.cpus,
            vcpus_total=vcpus_total,
            vcpus_used=used.vcpus,
            vcpus_claimed=claimed.vcpus,
            vcpus_free=max(0, vcpus_total - used.vcpus - claimed.vcpus),
            domains=len(domains),
        )
        return capacity, counted

    def take(self, instruction: str, domain: str, memory_mib: int, vcpus: int) -> None:
        """See `agent.api.Claims.take`."""
        with self._lock:
            left, counted = self._look(instruction)
            has = counted.get(domain, Share())
            more_mib, more_vcpus = memory_mib - has.memory_mib, vcpus - has.vcpus
            beyond = " more" if domain in counted else ""
            # A domain that asks for no more than it has is never refused, even where the host is overcommitted.
            if more_mib > 0 and more_mib > left.memory_free_mib:
                raise InsufficientMemory(
                    f"the domain needs {more_mib} MiB{beyond}, the host has {left.memory_free_mib} MiB left of "
                    f"{left.memory_total_mib}: make it smaller or free memory"
                )
            if more_vcpus > 0 and more_vcpus > left.vcpus_free:
                raise InsufficientVcpus(
                    f"the domain needs {more_vcpus} vCPUs{beyond}, the host has {left.vcpus_free} left of "
                    f"{left.vcpus_total} ({left.cpus} CPUs, ratio {self.vcpu_ratio:g}): make it smaller or end other "
                    "domains"
                )
            self._journal.take_claim(instruction, domain, memory_mib, vcpus)
            LOG.debug("claimed %d MiB and %d vCPUs", memory_mib, vcpus)
        self.on_change()

    def domains(self) -> set[str]:
        """UUIDs of all domains that are there, are on their way here or have a claim.

        :raises ToolstackError: the host does not answer.
        """
        found = {row[1] for row in self._journal.claims()}  # first, as above
        if Capability.LIVE_MIGRATION in self._toolstack.capabilities():
            found |= {half.uuid for half in self._toolstack.migration_list() if not half.phase.ended}
        return found | {domain.uuid for domain in self._toolstack.list_domains()}

    def holds(self, instruction: str) -> bool:
        return any(row[0] == instruction for row in self._journal.claims())

    def release(self, instruction: str) -> None:
        self._journal.release_claim(instruction)
        self.on_change()

    @contextlib.contextmanager
    def held(self, instruction: str, domain: str, memory_mib: int, vcpus: int) -> Iterator[None]:
        """A claim for a block: given back when the block fails, else kept to the instruction's end."""
        self.take(instruction, domain, memory_mib, vcpus)
        try:
            yield
        except BaseException:
            self.release(instruction)
            raise
