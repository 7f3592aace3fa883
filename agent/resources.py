"""Claims: memory and vCPUs set aside, so that two creates cannot share what is there once.

A claim lives in the journal from before its domain is built until its instruction is finished. What is free is
computed from the domain table and the claims each time, so there is nothing to rebuild after a crash: a claim
whose domain is in the table already is not counted twice.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import threading
from collections.abc import Iterator
from typing import Any

from agent.journal import Journal
from hypervisor.errors import InsufficientMemory, InsufficientVcpus
from hypervisor.toolstack.api import Toolstack

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
        self._vcpu_ratio = vcpu_ratio
        self._reserved_mib = reserved_mib
        self._lock = threading.Lock()

    def capacity(self, without: str = "") -> Capacity:
        """What is left now.

        :param without: instruction whose own claim is not counted.
        :raises ToolstackError: the host does not answer.
        """
        # The claims first: one that ends in between has its domain in the table read after it.
        claims = [row for row in self._journal.claims() if row[0] != without]
        host = self._toolstack.host_info()
        domains = self._toolstack.list_domains()
        known = {domain.uuid for domain in domains}
        pending = [row for row in claims if row[1] not in known]
        used = sum(domain.memory_mib for domain in domains)
        claimed = sum(row[2] for row in pending)
        by_table = host.memory_total_mib - self._reserved_mib - used
        by_driver = host.memory_free_mib - self._reserved_mib
        vcpus_total = int(host.cpus * self._vcpu_ratio)
        vcpus_used = sum(domain.vcpus for domain in domains)
        vcpus_claimed = sum(row[3] for row in pending)
        return Capacity(
            memory_total_mib=host.memory_total_mib,
            memory_reserved_mib=self._reserved_mib,
            memory_used_mib=used,
            memory_claimed_mib=claimed,
            memory_free_mib=max(0, min(by_table, by_driver) - claimed),
            cpus=host.cpus,
            vcpus_total=vcpus_total,
            vcpus_used=vcpus_used,
            vcpus_claimed=vcpus_claimed,
            vcpus_free=max(0, vcpus_total - vcpus_used - vcpus_claimed),
            domains=len(domains),
        )

    def take(self, instruction: str, domain: str, memory_mib: int, vcpus: int) -> None:
        """See `agent.api.Claims.take`."""
        with self._lock:
            left = self.capacity(without=instruction)
            if memory_mib > left.memory_free_mib:
                raise InsufficientMemory(
                    f"the domain needs {memory_mib} MiB, the host has {left.memory_free_mib} MiB left of "
                    f"{left.memory_total_mib}: make it smaller or free memory"
                )
            if vcpus > left.vcpus_free:
                raise InsufficientVcpus(
                    f"the domain needs {vcpus} vCPUs, the host has {left.vcpus_free} left of {left.vcpus_total} "
                    f"({left.cpus} CPUs, ratio {self._vcpu_ratio:g}): make it smaller or end other domains"
                )
            self._journal.take_claim(instruction, domain, memory_mib, vcpus)
            LOG.debug("claimed %d MiB and %d vCPUs", memory_mib, vcpus)

    def holds(self, instruction: str) -> bool:
        return any(row[0] == instruction for row in self._journal.claims())

    def release(self, instruction: str) -> None:
        self._journal.release_claim(instruction)

    @contextlib.contextmanager
    def held(self, instruction: str, domain: str, memory_mib: int, vcpus: int) -> Iterator[None]:
        """A claim for a block: given back when the block fails, else kept to the instruction's end."""
        self.take(instruction, domain, memory_mib, vcpus)
        try:
            yield
        except BaseException:
            self.release(instruction)
            raise
