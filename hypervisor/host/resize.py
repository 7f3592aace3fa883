"""What of a running domain can be changed: vCPUs, memory, its share of the CPU.

The guest is asked by xenstore (``cpu/<n>/availability``, ``memory/target``) and follows as it can. The host counts
as used what a domain may have: its memory target, or what it has still above that. The domain process lets the
guest take no more than the target.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
from typing import Any

from hypervisor.errors import InsufficientMemory, SpecInvalid, ToolstackError
from hypervisor.host import priority
from hypervisor.host.ledger import PAGES_PER_MIB, Ledger
from hypervisor.host.process import ProcessHold
from hypervisor.host.records import RecordStore
from hypervisor.host.table import Domain
from hypervisor.memory import layout
from hypervisor.toolstack.api import DomainSpec, check_scheduling

LOG = logging.getLogger(__name__)

FIRST_LOOK, LONGEST_LOOK = 0.25, 5.0
"""Seconds between two looks at a guest that has more memory than it should."""
MUST_STAY = ("uuid", "name", "owner", "type", "disks", "nics")


class Resizer:
    def __init__(self, ledger: Ledger, records: RecordStore) -> None:
        self._ledger = ledger
        self._records = records
        self._watched: dict[str, asyncio.Task[None]] = {}

    # -- verbs, each under the domain's lock and for one that lives, unless said otherwise ------------------------

    def set_vcpus(self, domain: Domain, vcpus: int) -> None:
        """:raises SpecInvalid: beyond what it was made with."""
        record = domain.record
        most = record.run.max_vcpus
        if not 1 <= vcpus <= most:
            raise SpecInvalid(f"vcpus is {vcpus}: give 1 to {most} (max_vcpus)")
        assert domain.attachment is not None
        record.spec = record.spec.with_vcpus(vcpus)
        record.run = dataclasses.replace(record.run, vcpus=vcpus)
        self._records.save(record)
        domain.attachment.set_vcpus(vcpus, most)

    async def set_memory(self, domain: Domain, memory_mib: int) -> None:
        """:raises SpecInvalid: beyond what it was made with. :raises InsufficientMemory: nothing has changed."""
        record, process = domain.record, domain.process
        most = record.run.max_memory_mib
        if not 1 <= memory_mib <= most:
            raise SpecInvalid(f"memory_mib is {memory_mib}: give 1 to {most} (max_memory_mib)")
        assert domain.attachment is not None and process is not None
        await self._stop_watching(domain)
        before = record.run.memory_mib
        try:
            await self._take(domain, memory_mib)
            stats = await process.request("limit_memory", fields={"pages": memory_mib * PAGES_PER_MIB})
        except ToolstackError:
            self._watch(domain, before)
            raise
        record.spec = record.spec.with_memory(memory_mib)
        record.run = dataclasses.replace(record.run, memory_mib=memory_mib)
        self._records.save(record)
        domain.attachment.set_memory_target(memory_mib * 1024)
        if not self._count(domain, process, stats):
            self._watch(domain, memory_mib)

    async def set_scheduling(self, domain: Domain, weight: int, cap: int) -> None:
        """Of any domain; one that has ended gets it when it starts. :raises SpecInvalid."""
        check_scheduling(weight, cap)
        record = domain.record
        record.spec = dataclasses.replace(record.spec, weight=weight, cap=cap)
        self._records.save(record)
        process = domain.process
        if process is not None and process.alive and not record.ended:
            await process.request("set_cap", fields={"percent": cap})
            await priority.apply(process.pid, weight)

    def redefine(self, domain: Domain, spec: DomainSpec) -> None:
        """Of any domain. :raises SpecInvalid: it differs in what must stay."""
        spec.validate()
        old = domain.record.spec
        for name in MUST_STAY:
            if getattr(spec, name) != getattr(old, name):
                raise SpecInvalid(f"{name} cannot be redefined: leave it as it is")
        domain.record.spec = spec
        self._records.save(domain.record)

    # -- what is counted ------------------------------------------------------------------------------------------

    def begin(self, domain: Domain) -> None:
        """A domain was made or adopted: it may still have more than its target."""
        if domain.record.claim is not None and domain.process is not None:
            self._watch(domain, domain.record.run.memory_mib)

    async def _take(self, domain: Domain, memory_mib: int) -> None:
        """Commit so much before the guest may have it; what others no longer have is counted first."""
        wanted = self._needed(domain, memory_mib * PAGES_PER_MIB)
        claim = domain.record.claim
        assert claim is not None
        if wanted <= claim.committed:
            return
        try:
            domain.record.claim = self._ledger.recommit(claim, wanted)
        except InsufficientMemory as exc:
            raise InsufficientMemory(f"memory_mib is {memory_mib}: {exc}") from None
        self._records.save(domain.record)

    def _needed(self, domain: Domain, pages: int) -> int:
        return pages + layout.xen_frames(domain.record.run.max_memory_mib * PAGES_PER_MIB)

    def _count(self, domain: Domain, process: ProcessHold, stats: dict[str, Any]) -> bool:
        """Commit what the domain has, or its target if that is more; whether it is down to that.

        The process's word is not enough: what the kernel says of its memory counts, too.
        """
        record = domain.record
        claim = record.claim
        if claim is None or domain.process is not process:
            return True
        target = self._needed(domain, record.run.memory_mib * PAGES_PER_MIB)
        said = stats.get("memory_pages")
        has = self._needed(domain, said) if isinstance(said, int) and said >= 0 else target
        with contextlib.suppress(OSError):
            has = max(has, process.handles.resident_bytes() >> 12)
        wanted = min(claim.frames, max(target, has))
        if wanted < claim.committed:
            record.claim = self._ledger.recommit(claim, wanted)
            self._records.save(record)
        return wanted <= target

    def _watch(self, domain: Domain, memory_mib: int) -> None:
        """Look after a guest that is giving memory back, until it has."""
        if domain.uuid in self._watched:
            return
        task = asyncio.get_running_loop().create_task(self._follow(domain))
        self._watched[domain.uuid] = task
        task.add_done_callback(lambda done: self._watched.pop(domain.uuid, None) if done is task else None)
        LOG.debug("domain %s is to have %d MiB", domain.uuid, memory_mib)

    async def _follow(self, domain: Domain) -> None:
        process, delay = domain.process, FIRST_LOOK
        while process is not None and process.alive and domain.process is process and not domain.record.ended:
            with contextlib.suppress(ToolstackError):
                if self._count(domain, process, await process.request("stats")):
                    return
            await asyncio.sleep(delay)
            delay = min(LONGEST_LOOK, delay * 1.5)

    async def _stop_watching(self, domain: Domain) -> None:
        task = self._watched.pop(domain.uuid, None)
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    def stop(self) -> None:
        for task in self._watched.values():
            task.cancel()
