"""The runtime of real domains: builder and machine, put together for one domain process.

Imported by the zygote only: it loads the engine, so that every domain process
starts with it and shares its pages.
"""

from __future__ import annotations

import dataclasses
import logging
import mmap
import os
from collections.abc import Callable
from typing import Any

import numpy as np

from hypervisor import engines, native
from hypervisor.core_state import CoreState
from hypervisor.domain import MachineConfig
from hypervisor.engines import unicorn
from hypervisor.engines.tsc import measure_khz
from hypervisor.errors import (
    CpuIncompatible,
    HostFailure,
    HypervisorBug,
    MigrationFailed,
    StreamInvalid,
    Unsupported,
    WrongState,
    XenError,
)
from hypervisor.evtchn.hostside import HostRouter
from hypervisor.host.cow import CowMemory
from hypervisor.host.guest_link_state import LinkTarget
from hypervisor.host.runtime import CONSOLE_PORT, STORE_PORT, BuildRequest, Ended, RuntimeFacts, Template
from hypervisor.machine import Machine
from hypervisor.moving import MovingState
from hypervisor.stages import stage
from hypervisor.suspended.rebuild import rebuild
from hypervisor.suspended.saver import MachineSaver
from hypervisor.suspended.state import GuestState
from hypervisor.suspended.template import read_state
from hypervisor.suspended.transfer import Incoming
from hypervisor.toolstack import builder
from hypervisor.toolstack.api import Capability
from hypervisor.toolstack.builder import BuildMemory, Kernel
from hypervisor.toolstack.stream import envelope
from hypervisor.toolstack.stream.source import Source
from hypervisor.types import PAGE_SIZE, Mfn, Port

LOG = logging.getLogger(__name__)

MAX_VCPUS = 32
_LOADERS = ("GRUB",)
"""They map all memory executable, and start kernels that inherit this."""
CAPABILITIES = (
    Capability.PV,
    Capability.SMP,
    Capability.CONSOLE,
    Capability.REBOOT,
    Capability.ADOPTION,
    Capability.DISK,
    Capability.NIC,
    Capability.HOTPLUG,
    Capability.RESIZE,
    Capability.DISK_RESIZE,
    Capability.SYSRQ,
    Capability.DUMP_CORE,
    Capability.SAVE,
    Capability.TEMPLATES,
    Capability.LIVE_MIGRATION,
    Capability.STANDBY,
)
DIRECT_CAPABILITIES = (Capability.PV32,)
"""What the engine's public path cannot do."""


class PvGuest:
    """A `hypervisor.host.runtime.Guest` over a `Machine`."""

    def __init__(self, machine: Machine, boot: dict[str, Any], *, incoming: bool = False) -> None:
        self._machine = machine
        self.boot = boot
        self.pause = machine.pause
        self.notify = machine.notify
        self.stats = machine.stats
        self.limit_memory = machine.limit_memory
        self.set_cap = machine.set_cap
        self._core = CoreState(machine)
        self._moving = MovingState(machine, boot, incoming=incoming)
        self._saver = MachineSaver(machine)

    def unpause(self) -> None:
        if self._moving.incoming:
            raise WrongState("the guest has not arrived yet")
        self._machine.unpause()

    def run(self) -> Ended:
        if self._moving.incoming:
            self._moving.stand_still()
        shutdown = self._machine.run()
        self._core.ended()
        self._moving.ended()
        self._saver.ended()
        return Ended(shutdown.reason, shutdown.detail)

    def moving(self) -> MovingState:
        return self._moving

    def saver(self) -> MachineSaver:
        return self._saver

    def core(self) -> CoreState:
        return self._core

    def link_target(self) -> LinkTarget:
        return link_target(self._machine)


def _machine(
    config: MachineConfig, memory: mmap.mmap, notify_host: Callable[[int], None], engine: Any, fast_path: str
) -> Machine:
    try:
        return Machine(config, memory, notify_host=notify_host, engine=engine, fast_path=fast_path)
    except native.Unavailable as exc:
        raise HostFailure(f"fast_path needs compiled code, and {exc}; or set it to auto") from exc


def link_target(machine: Machine) -> LinkTarget:
    """What drivers reach of a machine."""
    domain = machine.domain
    router = domain.events.router
    assert isinstance(router, HostRouter)
    memory = domain.memory
    return LinkTarget(
        domain.config.domid,
        memory.frames,
        memory.index,
        domain.grants.own,
        domain.events,
        router,
        machine.post,
        domain,
        share=memory.share,
    )


@dataclasses.dataclass(frozen=True, slots=True)
class _Facts:
    """What of a machine's configuration the guest decides."""

    bits: int
    lazy_nx: bool
    cpu_policy: str | dict[str, Any]
    boot: dict[str, Any] = dataclasses.field(default_factory=dict)
    mcg_cap: int = 0

    @classmethod
    def of_kernel(cls, kernel: Kernel, request: BuildRequest) -> _Facts:
        return cls(kernel.bits, kernel.notes.guest_os in _LOADERS, request.cpu_policy)

    @classmethod
    def of_guest(cls, request: BuildRequest) -> _Facts:
        """:raises MigrationFailed: what the other host says of its guest makes no sense."""
        said = request.incoming or {}
        boot, frames = said.get("boot"), range(request.base_mfn, request.base_mfn + request.max_pages)
        good = said.get("bits") in (32, 64) and isinstance(said.get("lazy_nx"), bool)
        good = good and isinstance(said.get("cpu_policy"), dict)
        if not (
            good and isinstance(boot, dict) and boot.get("store_mfn") in frames and boot.get("console_mfn") in frames
        ):
            raise MigrationFailed("what the other host says of the guest makes no sense: are both of one release?")
        mcg_cap = said.get("mcg_cap", 0)
        if type(mcg_cap) is not int or not 0 <= mcg_cap < 1 << 64:
            raise MigrationFailed("what the other host says of the guest makes no sense: are both of one release?")
        return cls(said["bits"], said["lazy_nx"], said["cpu_policy"], boot, mcg_cap)


def _start(
    machine: Machine, kernel: Kernel, ramdisk: bytes | None, request: BuildRequest, memory: mmap.mmap
) -> dict[str, Any]:
    """Lay out a new guest. :returns: what the host is told of it."""
    boot = builder.build(
        BuildMemory(memoryview(memory), Mfn(request.base_mfn), request.nr_pages),
        kernel,
        ramdisk,
        request.spec.boot.cmdline,
        shared_info_mfn=Mfn(machine.shared_info_mfn),
        store_port=Port(STORE_PORT),
        console_port=Port(CONSOLE_PORT),
    )
    machine.start(boot)
    return {
        "store_mfn": int(boot.store_mfn),
        "console_mfn": int(boot.console_mfn),
        "entry": boot.entry,
        "guest_os": boot.guest_os,
        "guest_version": boot.guest_version,
    }


class PvRuntime:
    """A `hypervisor.host.runtime.Runtime`. What costs time and is the same for all domains is done here, once."""

    def __init__(self) -> None:
        self._check = unicorn.selfcheck()
        self._engines = engines.available()
        self._tsc_khz = measure_khz()
        # For the first domain of this process, which in a child of the zygote is the only one: a copy of it is there
        # at once, and shares the pages that it does not write.
        self._ready: Any = self._engines[engines.DEFAULT]() if engines.DEFAULT in self._engines else None

    def facts(self) -> RuntimeFacts:
        private = self._check.layout is not None
        detail = {"engine": "unicorn", "engine_path": "private" if private else "public", "tsc_khz": str(self._tsc_khz)}
        detail["fast_path"] = native.library()[1]
        capabilities = CAPABILITIES + (DIRECT_CAPABILITIES if private else ())
        return RuntimeFacts("pv", MAX_VCPUS, capabilities, tuple(sorted(detail.items())))

    def shed(self) -> None:
        self._ready = None  # with it goes the buffer for translated code, which can be written and executed

    def build(
        self, request: BuildRequest, memory: mmap.mmap, notify_host: Callable[[int], None], seal: Callable[[], None]
    ) -> PvGuest:
        """:raises ToolstackError: kernel, ramdisk or memory are not what a guest can be made of."""
        kernel, ramdisk = self._read(request) if request.incoming is None else (None, None)
        # The engine looks at this process's memory map when it is made, and then no more files.
        engine = self._new_engine(request.engine)
        seal()
        facts = _Facts.of_kernel(kernel, request) if kernel is not None else _Facts.of_guest(request)
        config = self._config(request, facts)
        try:
            machine = _machine(config, memory, notify_host, engine, request.fast_path)
            if kernel is None:
                guest = PvGuest(machine, facts.boot, incoming=True)
            else:
                guest = PvGuest(machine, _start(machine, kernel, ramdisk, request, memory))
        except (XenError, HypervisorBug) as exc:
            LOG.exception("the machine could not be started")
            raise HostFailure(f"the machine could not be started: {exc!r}; see the log of the host process") from exc
        guest.limit_memory(request.nr_pages)
        guest.set_cap(request.spec.cap)
        return guest

    def restore(
        self,
        request: BuildRequest,
        memory: mmap.mmap,
        notify_host: Callable[[int], None],
        seal: Callable[[], None],
        image: int,
    ) -> PvGuest:
        """:raises ToolstackError: the image is damaged, or needs what is not here."""
        engine = self._new_engine(request.engine)
        seal()
        source = Source(lambda size: os.read(image, size))
        incoming = Incoming(source)
        incoming.begin()
        state, frames = incoming.finish(np.frombuffer(memory, np.uint64, request.max_pages * 512), request.max_pages)
        envelope.read_end(source)
        os.close(image)
        machine = self._suspended_machine(request, state, memory, notify_host, engine)
        return self._go_on(request, machine, state, frames)

    def clone(
        self,
        request: BuildRequest,
        memory: mmap.mmap,
        notify_host: Callable[[int], None],
        seal: Callable[[], None],
        template: Template,
    ) -> PvGuest:
        """:raises ToolstackError: the template is damaged, or needs what is not here."""
        engine = self._new_engine(request.engine)
        stage("engine")
        seal()
        stage("sealed")
        state, frames = read_state(template.state, request.max_pages)
        stage("state")
        if os.fstat(template.memory).st_size != request.max_pages * PAGE_SIZE:
            raise StreamInvalid("the template is damaged: its memory has another size; make it again")
        machine = self._suspended_machine(request, state, memory, notify_host, engine)
        stage("machine")
        ram = machine.domain.memory
        ram.private = CowMemory(ram, template.own, template.memory, request.max_pages)
        os.close(template.memory)
        os.close(template.state)
        stage("mapped")
        guest = self._go_on(request, machine, state, frames)
        stage("rebuilt")
        return guest

    def _suspended_machine(
        self, request: BuildRequest, state: GuestState, memory: mmap.mmap, notify: Callable[[int], None], engine: Any
    ) -> Machine:
        """For a guest that suspended itself, without memory."""
        policy: str | dict[str, Any] = request.cpu_policy if state.policy is None else state.policy.save()
        facts = _Facts(state.bits, False, policy, mcg_cap=state.mcg_cap)
        config = dataclasses.replace(self._config(request, facts), nr_pages=0)
        try:
            return _machine(config, memory, notify, engine, request.fast_path)
        except Unsupported as exc:
            raise CpuIncompatible(exc.message) from exc

    def _go_on(self, request: BuildRequest, machine: Machine, state: GuestState, frames: Any) -> PvGuest:
        rebuilt = rebuild(machine.domain, state, frames, (STORE_PORT, CONSOLE_PORT))
        memory = machine.domain.memory
        for mfn in (rebuilt.store_mfn, rebuilt.console_mfn):
            memory.share(memory.index(mfn))
        guest = PvGuest(machine, {"store_mfn": int(rebuilt.store_mfn), "console_mfn": int(rebuilt.console_mfn)})
        guest.limit_memory(max(request.nr_pages, machine.domain.frames.pages()))
        guest.set_cap(request.spec.cap)
        return guest

    def _config(self, request: BuildRequest, facts: _Facts) -> MachineConfig:
        return MachineConfig(
            uuid=request.spec.uuid,
            name=request.spec.name,
            domid=request.domid,
            base_mfn=request.base_mfn,
            nr_pages=request.nr_pages,
            max_pages=request.max_pages,
            vcpus=request.spec.vcpus,
            max_vcpus=request.spec.effective_max_vcpus,
            tsc_khz=self._tsc_khz,
            linear_page_tables=request.linear_page_tables,
            lazy_nx=facts.lazy_nx,
            cpu_policy=facts.cpu_policy,
            bits=facts.bits,
            mcg_cap=facts.mcg_cap,
        )

    def _new_engine(self, name: str) -> Any:
        kind = self._engine(name)
        if kind is self._engines.get(engines.DEFAULT) and self._ready is not None:
            engine, self._ready = self._ready, None
            return engine
        return kind()

    def _engine(self, name: str) -> Any:
        if not self._engines:
            raise HostFailure("no engine is installed (entry points reeve.engines): install the package again")
        engine = name or engines.DEFAULT
        if engine not in self._engines:
            known = ", ".join(sorted(self._engines))
            raise HostFailure(f"there is no engine {engine!r}: set engine to one of {known}, or leave it empty")
        return self._engines[engine]

    def _read(self, request: BuildRequest) -> tuple[Kernel, bytes | None]:
        """Everything that comes from files."""
        spec = request.spec
        self._engine(request.engine)
        if request.cache_dir:
            kernel = builder.KernelCache(request.cache_dir).load(spec.boot.kernel)
        else:
            kernel = builder.load_kernel(spec.boot.kernel)
        ramdisk = None
        if spec.boot.ramdisk is not None:
            ramdisk = builder.load_ramdisk(spec.boot.ramdisk, guest_os=kernel.notes.guest_os)
        builder.plan_memory(kernel, len(ramdisk or b""), spec.memory_mib)
        return kernel, ramdisk
