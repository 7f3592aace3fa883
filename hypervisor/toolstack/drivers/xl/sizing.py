"""vCPUs, memory and shares of the CPU of a domain that is there, and what it is built from when it starts next."""

from __future__ import annotations

import dataclasses

from hypervisor.errors import InsufficientMemory, SpecInvalid, Unsupported
from hypervisor.toolstack.api import DomainSpec, check_scheduling
from hypervisor.toolstack.drivers.xl.host import Host
from hypervisor.toolstack.drivers.xl.life import Life, check_vcpus

_SCHEDULERS = {"credit": "sched-credit", "credit2": "sched-credit2"}
_FIXED = ("uuid", "name", "owner", "type", "disks", "nics")


class Sizing:
    """The verbs of `Capability.RESIZE`; see `hypervisor.toolstack.api.Toolstack`."""

    def __init__(self, host: Host, life: Life) -> None:
        self._host, self._life = host, life

    def set_vcpus(self, uuid: str, vcpus: int) -> None:
        with self._life.acting(uuid, "change the vCPUs of") as (row, record):
            most = record.run.effective_max_vcpus
            if not 1 <= vcpus <= most:
                raise SpecInvalid(f"vcpus is {vcpus}: give 1 to {most} (max_vcpus)")
            self._host.xl.run("vcpu-set", str(row.domid), str(vcpus))
            new = dataclasses.replace(record, spec=record.spec.with_vcpus(vcpus), run=record.run.with_vcpus(vcpus))
            self._host.records.put(new)

    def set_memory(self, uuid: str, memory_mib: int) -> None:
        self._host.claim()  # before the lock, which it takes the first time
        with self._host.records.lock(), self._life.acting(uuid, "change the memory of") as (row, record):
            most = record.run.effective_max_memory_mib
            if not 1 <= memory_mib <= most:
                raise SpecInvalid(f"memory_mib is {memory_mib}: give 1 to {most} (max_memory_mib)")
            has = max(row.memory_mib, record.run.memory_mib)
            free = self._host.free(self._host.facts(), self._host.rows()) + has
            if memory_mib > free:
                raise InsufficientMemory(f"{memory_mib} MiB asked for, the host has {free} MiB for it: ask for less")
            self._host.xl.run("mem-set", str(row.domid), f"{memory_mib}m")
            spec, run = record.spec.with_memory(memory_mib), record.run.with_memory(memory_mib)
            self._host.records.put(dataclasses.replace(record, spec=spec, run=run))

    def redefine(self, uuid: str, spec: DomainSpec) -> None:
        with self._life.holding(uuid) as (_, record):
            spec.validate()
            for name in _FIXED:
                if getattr(spec, name) != getattr(record.spec, name):
                    raise SpecInvalid(f"{name} cannot be redefined: leave it as it is")
            check_vcpus(spec, self._host.facts())
            self._host.records.put(dataclasses.replace(record, spec=spec))

    def set_scheduling(self, uuid: str, weight: int, cap: int) -> None:
        check_scheduling(weight, cap)
        with self._life.holding(uuid) as (row, record):
            scheduler = self._host.facts().get("xen_scheduler", "")
            if scheduler not in _SCHEDULERS:
                raise Unsupported(f"this Xen's scheduler is {scheduler!r}, which has no weights: boot Xen with credit2")
            verb = _SCHEDULERS[scheduler]
            self._host.xl.run(verb, "-d", str(row.domid), "-w", str(weight), "-c", str(cap))
            spec, run = (dataclasses.replace(old, weight=weight, cap=cap) for old in (record.spec, record.run))
            self._host.records.put(dataclasses.replace(record, spec=spec, run=run))
