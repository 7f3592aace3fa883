"""The runtime of domain processes: the domain builder and the PV machine behind `hypervisor.host.runtime`."""

from __future__ import annotations

import functools
import mmap
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypervisor.domain import MachineConfig
from hypervisor.engines import unicorn as unicorn_engine
from hypervisor.engines.tsc import measure_khz
from hypervisor.errors import Unsupported
from hypervisor.host.runtime import CONSOLE_PORT, STORE_PORT, BuildRequest, Ended, RuntimeFacts
from hypervisor.machine import Machine
from hypervisor.toolstack import builder
from hypervisor.toolstack.api import Capability, DomainType
from hypervisor.types import Mfn, Port

MAX_VCPUS = 1
"""vCPUs of one domain that this machine runs."""


@functools.cache
def tsc_khz() -> int:
    """Measured once, in the zygote: every domain process inherits it."""
    return measure_khz()


class PvGuest:
    """`hypervisor.host.runtime.Guest` over a `Machine`."""

    def __init__(self, machine: Machine, boot: builder.BootState) -> None:
        self._machine = machine
        self._boot = boot

    @property
    def boot(self) -> dict[str, Any]:
        return self._boot.to_json()

    def run(self) -> Ended:
        ended = self._machine.run()
        return Ended(ended.reason, ended.detail)

    def pause(self) -> None:
        self._machine.pause()

    def unpause(self) -> None:
        self._machine.unpause()

    def notify(self, port: int) -> None:
        self._machine.notify(port)

    def stats(self) -> dict[str, Any]:
        return self._machine.stats()


class PvRuntime:
    """Builds 64-bit PV guests on the Unicorn engine."""

    def __init__(self) -> None:
        self._check = unicorn_engine.selfcheck()
        tsc_khz()

    def facts(self) -> RuntimeFacts:
        detail = (("engine", self._check.reason), ("tsc_khz", str(tsc_khz())))
        capabilities = (Capability.PV, Capability.CONSOLE, Capability.REBOOT, Capability.ADOPTION)
        return RuntimeFacts("pv", MAX_VCPUS, tuple(str(c) for c in capabilities), detail)

    def build(self, request: BuildRequest, memory: mmap.mmap, notify_host: Callable[[int], None]) -> PvGuest:
        """See `hypervisor.host.runtime.Runtime.build`."""
        spec = request.spec
        if spec.type is not DomainType.PV:
            raise Unsupported(f"domain type {spec.type}: this hypervisor runs pv guests; give type pv")
        kernel = _load_kernel(spec.boot.kernel, request.cache_dir)
        ramdisk = builder.load_ramdisk(spec.boot.ramdisk, guest_os=kernel.notes.guest_os) if spec.boot.ramdisk else None
        builder.plan_memory(kernel, len(ramdisk) if ramdisk else 0, spec.memory_mib)
        config = MachineConfig(
            uuid=spec.uuid,
            name=spec.name,
            domid=request.domid,
            base_mfn=request.base_mfn,
            nr_pages=request.nr_pages,
            max_pages=request.max_pages,
            vcpus=spec.vcpus,
            max_vcpus=spec.effective_max_vcpus,
            tsc_khz=tsc_khz(),
        )
        machine = Machine(
            config, memory, notify_host=notify_host, use_private=os.environ.get("REEVE_PUBLIC_ENGINE") != "1"
        )
        with memoryview(memory) as view:
            target = builder.BuildMemory(view, Mfn(request.base_mfn), request.nr_pages)
            boot = builder.build(
                target,
                kernel,
                ramdisk,
                spec.boot.cmdline,
                shared_info_mfn=Mfn(machine.shared_info_mfn),
                store_port=Port(STORE_PORT),
                console_port=Port(CONSOLE_PORT),
            )
        machine.start(boot)
        return PvGuest(machine, boot)


def _load_kernel(path: str, cache_dir: str) -> builder.Kernel:
    return builder.KernelCache(Path(cache_dir)).load(path) if cache_dir else builder.load_kernel(path)
