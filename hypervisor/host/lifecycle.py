"""Making, ending and remaking domains. Every step that fails takes back those before it."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Protocol

from hypervisor.errors import (
    HostUnavailable,
    InsufficientMemory,
    InsufficientVcpus,
    SpecInvalid,
    ToolstackError,
    Unsupported,
    WrongState,
)
from hypervisor.host import building, priority
from hypervisor.host import channel as channels
from hypervisor.host.building import Image
from hypervisor.host.channel import Message
from hypervisor.host.consoles import ConsoleHub
from hypervisor.host.introductions import introduce
from hypervisor.host.ledger import PAGES_PER_MIB, Claim, Ledger
from hypervisor.host.process import ProcessHold, describe_exit
from hypervisor.host.records import DomainRecord, Phase, RecordStore, RunSizes
from hypervisor.host.resize import Resizer
from hypervisor.host.runtime import BuildRequest, RuntimeFacts
from hypervisor.host.settings import HostSettings
from hypervisor.host.suspension import Suspension
from hypervisor.host.table import Attachment, Devices, Domain, DomainTable
from hypervisor.host.word_size import is_64bit
from hypervisor.host.zygote_client import ZygoteClient
from hypervisor.memory import layout
from hypervisor.stages import stage
from hypervisor.toolstack.api import DomainSpec, DomainState, DomainType, OnEvent, ShutdownReason

LOG = logging.getLogger(__name__)

MAX_SPEC_BYTES = channels.MAX_MESSAGE // 2

ENDED_STATES = (DomainState.SHUTDOWN, DomainState.CRASHED)


async def _nothing(*_about: object) -> None:
    """Until `hypervisor.host.adoption` and `hypervisor.host.migration` say what."""


class Backends(Protocol):
    """Connects a domain to xenstore and console. :raises ToolstackError: its rings cannot be reached."""

    def attach(self, domain: Domain, boot: dict[str, object], *, adopted: bool) -> Attachment: ...


@dataclasses.dataclass(slots=True)
class Lifecycle(Suspension):
    settings: HostSettings
    records: RecordStore
    table: DomainTable
    ledger: Ledger
    zygote: ZygoteClient
    backends: Backends
    devices: Callable[[Domain], Devices]
    resizer: Resizer
    # A process is to be spoken to again; a guest that is being moved has ended.
    reconnect: Callable[[Domain, ProcessHold], Awaitable[None]] = _nothing
    leaving: Callable[[Domain], Awaitable[None]] = _nothing
    tasks: set[asyncio.Task[None]] = dataclasses.field(default_factory=set)

    # -- verbs ----------------------------------------------------------------------------------------------------

    async def create(self, spec: DomainSpec, image: Image | None = None) -> Domain:
        """:param image: it comes from there, instead of being built from its spec."""
        spec.validate()
        self.check(spec, await self.zygote.start())
        record = DomainRecord(spec, 0, created_at=time.time())
        self.table.check_free(spec)  # before anything on disk is touched
        folder = self.records.prepare(spec.uuid)
        domain = self.new_domain(record, folder)
        self.table.add(domain)
        async with domain.lock:
            try:
                await self._make(domain, image)
            except BaseException:
                await self.forget(domain)
                raise
            self.table.emit("created", spec.uuid, "restored" if image is not None else "")
        return domain

    def new_domain(self, record: DomainRecord, folder: Path) -> Domain:
        domain = Domain(record, self.open_console(folder))
        domain.devices = self.devices(domain)
        return domain

    async def unpause(self, domain: Domain) -> None:
        await self._run_state(domain, "unpause", DomainState.RUNNING, "unpaused")

    async def pause(self, domain: Domain) -> None:
        await self._run_state(domain, "pause", DomainState.PAUSED, "paused")

    def request_shutdown(self, domain: Domain, reason: str) -> None:
        self.check_alive(domain, reason)
        assert domain.attachment is not None
        domain.attachment.request_shutdown(reason)

    async def reset(self, domain: Domain) -> None:
        self.check_known(domain)
        await self._remake(domain, "reset")

    async def destroy(self, domain: Domain) -> None:
        domain.dying = True
        await self.forget(domain)
        self.table.emit("destroyed", domain.uuid)

    # -- ends -----------------------------------------------------------------------------------------------------

    def watch(self, domain: Domain) -> None:
        """Hear of the end of the domain's guest and process."""
        process = domain.process
        assert process is not None
        process.on_ended = lambda message: self.guest_ended(domain, message)
        process.on_exit = lambda code: self.process_gone(domain, code)
        process.on_neighbour = lambda domid: introduce(self.table, domain, domid)
        process.on_unlinked = lambda: self.spawn(self.reconnect(domain, process))

    def guest_ended(self, domain: Domain, message: Message) -> None:
        try:
            reason = ShutdownReason(message["reason"])
        except (KeyError, ValueError):
            reason = ShutdownReason.CRASH
        detail = str(message.get("detail", ""))[:500].replace("\n", " ")
        if reason is ShutdownReason.SUSPEND and domain.record.suspending:
            self.suspended(domain)
            return
        self._ended(domain, reason, detail)

    def process_gone(self, domain: Domain, code: int | None) -> None:
        """Its process ended. Without a word before that, it is a crash."""
        if domain.record.ended or domain.dying:
            return
        self._ended(domain, ShutdownReason.CRASH, f"its process ended: {describe_exit(code)}")

    def lost(self, domain: Domain) -> None:
        """An adopted domain has no process: nobody saw how it ended."""
        domain.lost = False
        if domain.record.ended:
            self.spawn(self.after_end(domain, OnEvent.PRESERVE))
        elif domain.record.is_saved():
            self.saved(domain)
        else:
            self._ended(domain, ShutdownReason.CRASH, "its process ended while the host process was away")

    def restart(self, domain: Domain, why: str) -> None:
        """Build it anew in the background."""
        domain.dying = True
        self.spawn(self._restart(domain, why))

    async def _restart(self, domain: Domain, why: str) -> None:
        async with domain.lock:
            if self.table.find(domain.uuid) is domain:
                await self._remake(domain, why)

    def _ended(self, domain: Domain, reason: ShutdownReason, detail: str) -> None:
        record = domain.record
        if record.ended or domain.dying or record.phase is not Phase.MADE:
            return
        if domain.suspension is not None and not domain.suspension.done():
            domain.suspension.set_exception(WrongState(f"domain {domain.uuid} ended ({reason}): it was not saved"))
        crashed = reason is ShutdownReason.CRASH
        spec = record.spec
        action = spec.on_poweroff
        if crashed or reason is ShutdownReason.WATCHDOG:
            action = spec.on_crash
        elif reason is ShutdownReason.REBOOT:
            action = spec.on_reboot
        if reason is ShutdownReason.SUSPEND or domain.held:
            action = OnEvent.PRESERVE
        record.state = DomainState.CRASHED if crashed else DomainState.SHUTDOWN
        record.reason = reason
        record.detail = detail
        if domain.attachment is not None:
            domain.attachment.ended()
        if domain.devices is not None:
            domain.devices.guest_ended()
        domain.dying = action is not OnEvent.PRESERVE
        if crashed or action is not OnEvent.RESTART:
            self.table.emit("crashed" if crashed else "shutdown", domain.uuid, detail or reason)
        self.spawn(self.after_end(domain, action))

    async def after_end(self, domain: Domain, action: OnEvent) -> None:
        if domain.record.migration:
            await self.leaving(domain)
        async with domain.lock:
            if self.table.find(domain.uuid) is not domain:
                return
            if action is OnEvent.DESTROY:
                await self.destroy(domain)
            elif action is OnEvent.RESTART:
                await asyncio.sleep(max(0.0, domain.record.started_at + self.settings.restart_interval - time.time()))
                await self._remake(domain, domain.record.reason or "reboot")
            else:
                if domain.process is None or not domain.process.alive:
                    await self._unmake(domain)
                self.records.save(domain.record)
                self.table.changed()

    # -- steps ----------------------------------------------------------------------------------------------------

    async def _make(self, domain: Domain, image: Image | None = None) -> None:
        """Claim, fork, build, connect, commit. What it has done stays noted in `domain`, so that `_unmake` finds it."""
        record, spec = domain.record, domain.record.spec
        record.run, domain.stats = image.run if image is not None else RunSizes.of(spec), {}
        pages = record.run.memory_mib * PAGES_PER_MIB
        max_pages = record.run.max_memory_mib * PAGES_PER_MIB
        most = max(pages, image.pages) if image is not None else pages
        frames = layout.total_frames(max_pages)
        record.phase = Phase.REMAKING if record.restarts else Phase.BUILDING
        record.state = DomainState.PAUSED
        record.reason, record.detail, record.cpu_time_ns, record.console = None, "", 0, {}
        record.suspending, record.saved_as = False, []
        record.template = image.template if image is not None else ""
        folder = self.records.directory(spec.uuid)
        wide = is_64bit(spec.boot.kernel) if image is None else image.bits == 64
        record.claim = self._claim(spec, frames, most + layout.xen_frames(max_pages), wide=wide)
        record.domid = self.records.next_domid(self.table.domids())
        stage("claimed")
        self.records.save(record)
        stage("saved")
        assert domain.devices is not None
        await domain.devices.open_all()
        stage("devices")
        request = BuildRequest(
            spec=spec if image is None else record.run.applied(spec),
            domid=record.domid,
            base_mfn=record.claim.base_mfn,
            nr_pages=pages,
            max_pages=max_pages,
            cache_dir=self.settings.cache_dir,
            engine=self.settings.engine,
            linear_page_tables=self.settings.linear_page_tables,
            fast_path=self.settings.fast_path,
            cpu_policy=self.settings.cpu_policy,
            image=image is not None and not image.template,
            template=bool(record.template),
        )
        await self.fork(domain, request, frames, image.descriptors if image is not None else ())
        stage("spawned")
        process = domain.process
        assert process is not None
        timeout = self.settings.build_timeout + (image.seconds if image is not None else 0)
        boot = await building.built(domain, folder, timeout)
        stage("built")
        domain.attachment = self.backends.attach(domain, boot, adopted=False)
        domain.devices.begin()
        stage("attached")
        await process.request("commit")
        stage("committed")
        await priority.apply(process.pid, spec.weight)
        stage("weighted")
        record.pid = process.pid
        record.phase = Phase.MADE
        record.started_at = time.time()
        self.records.save(record)
        stage("made")
        self.watch(domain)
        if image is not None:
            self.resizer.begin(domain)
        self.table.changed()

    async def fork(self, domain: Domain, request: BuildRequest, frames: int, sources: Sequence[int] = ()) -> None:
        """Give the domain a process, which begins to build. :raises ToolstackError: it has none."""
        folder = self.records.directory(domain.uuid)
        domain.process = await building.fork(self.zygote, folder, request, frames, self.settings.sandbox, sources)

    async def _unmake(self, domain: Domain) -> None:
        """Take back all that `_make` did. The record and the table entry stay."""
        if domain.devices is not None:
            await domain.devices.halt()
        if domain.attachment is not None:
            domain.attachment.detach()
            domain.attachment = None
        if domain.process is not None:
            await domain.process.end()
            domain.process = None
        if domain.orphan is not None:
            await domain.orphan.end()
            domain.orphan, domain.lost = None, False
        if domain.devices is not None:
            await domain.devices.end()
        if domain.record.claim is not None:
            self.ledger.release(domain.record.claim)
            domain.record.claim = None

    async def forget(self, domain: Domain) -> None:
        """Nothing of it stays. :raises HostFailure: a process does not end."""
        await self._unmake(domain)
        domain.console.close()
        self.records.remove(domain.uuid)
        self.table.remove(domain)

    async def _remake(self, domain: Domain, why: str) -> None:
        """The same domain anew: same UUID, spec and console, another process and domid; it runs afterwards."""
        domain.dying = True
        record = domain.record
        try:
            await self._unmake(domain)
            record.restarts += 1
            await self._make(domain)
            domain.dying = False
            await self.unpause(domain)
        except ToolstackError as exc:
            LOG.error("domain %s could not be restarted: %s", domain.uuid, exc)
            await self._unmake(domain)
            record.phase, record.state = Phase.MADE, DomainState.CRASHED
            record.reason, record.detail = ShutdownReason.CRASH, f"restart after {why} failed: {exc}"
            domain.dying = False
            self.records.save(record)
            self.table.emit("crashed", domain.uuid, record.detail)
            raise
        self.table.emit("rebooted", domain.uuid, why)

    async def _run_state(self, domain: Domain, op: str, state: DomainState, event: str) -> None:
        self.check_alive(domain, op)
        if domain.record.state is state:
            return
        process = domain.process
        assert process is not None
        try:
            await process.request(op)
            stage(op)
        except HostUnavailable:
            if not await process.gone(1.0):
                raise
            # A guest that took its process down at once did run; that and how it ended is told as of any crash.
            if state is not DomainState.RUNNING:
                self.check_alive(domain, op)
            return
        if domain.record.ended:  # it ended while it was asked
            return
        domain.record.state = state
        self.records.save(domain.record)
        self.table.emit(event, domain.uuid)

    def _claim(self, spec: DomainSpec, frames: int, committed: int, *, wide: bool) -> Claim:
        try:
            return self.ledger.claim(spec.uuid, frames, committed, wide=wide)
        except InsufficientMemory as exc:
            raise InsufficientMemory(f"memory_mib is {spec.memory_mib}: {exc}") from None

    def check(self, spec: DomainSpec, facts: RuntimeFacts) -> None:
        """:raises ToolstackError: this host cannot run it."""
        if spec.type is not DomainType.PV:
            raise Unsupported(f"type {spec.type} is not something this host can run: give type pv")
        cpus = min(facts.max_vcpus, self.settings.effective_cpus)
        if spec.effective_max_vcpus > cpus:
            raise InsufficientVcpus(
                f"{spec.effective_max_vcpus} vCPUs asked for, a domain of this host has at most {cpus}: ask for less"
            )
        self.check_size(spec)

    def check_size(self, spec: DomainSpec) -> None:
        """:raises SpecInvalid: it does not fit a message."""
        size = len(channels.encode({"spec": spec.to_json()}))
        if size > MAX_SPEC_BYTES:
            raise SpecInvalid(f"the spec has {size} bytes: give less metadata, at most {MAX_SPEC_BYTES} bytes in all")

    def check_known(self, domain: Domain) -> None:
        """:raises HostUnavailable: nothing can be said of its state."""
        if domain.lost:
            raise HostUnavailable(f"domain {domain.uuid} does not answer just now: try again, or destroy it")

    def check_alive(self, domain: Domain, verb: str) -> None:
        """:raises WrongState: it has ended, so that one cannot `verb` it. :raises HostUnavailable."""
        self.check_known(domain)
        if domain.record.ended or domain.dying or domain.process is None:
            raise WrongState(f"domain {domain.uuid} is {domain.state}, cannot {verb} it: reset or destroy it")

    def open_console(self, folder: Path) -> ConsoleHub:
        return ConsoleHub(folder, self.settings.console_log_kib * 1024)

    def spawn(self, work: Awaitable[object]) -> None:
        async def guarded() -> None:
            try:
                await work
            except ToolstackError as exc:
                LOG.error("%s", exc)
            except Exception:
                LOG.exception("background work failed")

        task = asyncio.get_running_loop().create_task(guarded())
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
