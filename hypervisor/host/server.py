"""The host process, put together."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import fcntl
import logging
import os
import resource
from pathlib import Path

from hypervisor import sdnotify
from hypervisor.devices.block.backend import BlockBackend
from hypervisor.errors import HostFailure
from hypervisor.host import sandbox
from hypervisor.host.adoption import Adoption
from hypervisor.host.backends import HostBackends
from hypervisor.host.control import ControlServer
from hypervisor.host.devices import HostDevices
from hypervisor.host.ledger import PAGES_PER_MIB, Ledger
from hypervisor.host.lifecycle import Lifecycle
from hypervisor.host.migration.service import Migrations
from hypervisor.host.records import RecordStore
from hypervisor.host.resize import Resizer
from hypervisor.host.settings import HostSettings, available_mib
from hypervisor.host.table import DomainTable
from hypervisor.host.verbs import Verbs
from hypervisor.host.zygote_client import ZygoteClient
from hypervisor.waiting import within

LOG = logging.getLogger(__name__)

_PR_SET_CHILD_SUBREAPER = 36
STOP_SECONDS = 60.0
"""What the service manager is told that stopping may take; it takes one or two."""


class HostProcess:
    """Start, serve, stop. Stopping touches no domain."""

    def __init__(self, settings: HostSettings) -> None:
        self.settings = settings
        self._lock_fd = -1
        self._zygote: ZygoteClient | None = None
        self._backends: HostBackends | None = None
        self._control: ControlServer | None = None
        self._adoption: Adoption | None = None
        self._life: Lifecycle | None = None
        self._migrations: Migrations | None = None

    async def start(self) -> None:
        """:raises HostFailure: another host process has the state folder, or something cannot be made."""
        settings = self.settings
        report = sandbox.probe()
        if settings.sandbox == "required" and not report.seccomp:
            raise HostFailure(f"sandbox is required and {report.missing[-1]}: use another kernel or set sandbox=auto")
        for line in report.missing:
            LOG.warning("sandbox: %s", line)
        records = _records(settings.state_dir)
        self._lock_fd = lock(settings.state_dir)
        _raise_limits()
        zygote = self._zygote = ZygoteClient(settings.runtime, settings.log_level)
        await zygote.start()
        backends = self._backends = HostBackends(settings)
        table = DomainTable()
        devices = HostDevices(settings, backends.handle, zygote, records, table)
        ledger = Ledger(0)
        resizer = Resizer(ledger, records)
        life = self._life = Lifecycle(settings, records, table, ledger, zygote, backends, devices.of, resizer)
        migrations = self._migrations = Migrations(life, backends)
        migrations.load()
        self._adoption = Adoption(life, migrations.fate)
        await self._adoption.run()
        life.ledger.total = self._total(life)
        known = frozenset(d.record.domid for d in life.table.all() if d.record.claim is not None)
        await backends.start(known)
        devices.forget_strangers(known)
        await migrations.recover()
        if any((settings.state_dir / "disks").glob("*")) and isinstance(disks := devices.backend("disk"), BlockBackend):
            await disks.sweep()
        self._control = ControlServer(Verbs(life, report, migrations), max_clients=settings.max_clients)
        await self._control.start(settings.socket)
        LOG.info(
            "serving at %s: %d domains adopted, %d MiB for domains",
            settings.socket,
            len(life.table.all()),
            life.ledger.total // PAGES_PER_MIB,
        )

    async def stop(self) -> None:
        """Domains go on; the next host process adopts them."""
        if self._control is not None:
            await self._control.stop()
        if self._adoption is not None:
            self._adoption.stop()
        if self._migrations is not None:
            self._migrations.stop()
        if self._life is not None:
            self._life.resizer.stop()
            records = self._life.records
            for task in list(self._life.tasks):
                task.cancel()
            for domain in self._life.table.all():
                if domain.devices is not None:
                    await domain.devices.let_go()
                if domain.attachment is not None:
                    domain.attachment.let_go()
                    records.save(domain.record)
                if domain.process is not None:
                    domain.process.close()
        if self._backends is not None:
            await self._backends.stop()
        if self._zygote is not None:
            await self._zygote.stop()
        if self._lock_fd >= 0:
            os.close(self._lock_fd)
            self._lock_fd = -1

    def _total(self, life: Lifecycle) -> int:
        """Pages for domains. What adopted domains fill already is available to them, though not to the system."""
        if self.settings.memory_mib:
            return self.settings.memory_mib * PAGES_PER_MIB
        filled = sum(d.process.handles.resident_bytes() for d in life.table.all() if d.process is not None) >> 20
        return (available_mib() + filled) * self.settings.memory_share // 100 * PAGES_PER_MIB


def lock(state_dir: Path) -> int:
    """:raises HostFailure: another host process holds it."""
    fd = os.open(state_dir / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        holder = os.pread(fd, 32, 0).decode(errors="replace").strip() or "unknown"
        os.close(fd)
        raise HostFailure(
            f"a host process (pid {holder}) uses {state_dir} already: stop it or give another --state-dir"
        ) from None
    os.ftruncate(fd, 0)
    os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
    return fd


def _records(state_dir: Path) -> RecordStore:
    try:
        return RecordStore(state_dir)
    except OSError as exc:
        raise HostFailure(
            f"state folder {exc.filename} cannot be made: {exc.strerror}; give another --state-dir"
        ) from exc


def _raise_limits() -> None:
    """Ten descriptors a domain; children of a zygote that was killed come to us, so that we see how they end."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


async def until(stop: asyncio.Event) -> None:
    """Tells the service manager that this loop runs, if it asks for that."""
    interval = sdnotify.watchdog_seconds() / 2
    while interval and not stop.is_set():
        sdnotify.alive()
        with contextlib.suppress(TimeoutError):
            await within(stop.wait(), interval)
    await stop.wait()


async def serve(settings: HostSettings, stop: asyncio.Event) -> None:
    """Run until `stop` is set."""
    host = HostProcess(settings)
    try:
        await host.start()
        sdnotify.ready(f"serving at {settings.socket}")
        await until(stop)
    finally:
        sdnotify.stopping(STOP_SECONDS, "stopping; domains go on")
        await host.stop()
