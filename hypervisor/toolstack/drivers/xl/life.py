"""A domain's life: made paused and marked, ended, made anew, and what its spec says when its guest ends."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import time
from collections.abc import Callable, Iterator

from hypervisor.errors import (
    DomainExists,
    DomainNotFound,
    InsufficientMemory,
    InsufficientVcpus,
    NameInUse,
    NotOurs,
    ToolstackError,
    Unsupported,
    WrongState,
)
from hypervisor.toolstack.api import Capability, DomainInfo, DomainSpec, DomainState, OnEvent, ShutdownReason
from hypervisor.toolstack.drivers._devices import check_disk, check_nic
from hypervisor.toolstack.drivers._files import check_files
from hypervisor.toolstack.drivers.xl import capabilities, config, parsers
from hypervisor.toolstack.drivers.xl.host import ENDED, REASONS, SUSPENDED, Host, node, pick, split_name, state
from hypervisor.toolstack.drivers.xl.records import Record
from hypervisor.toolstack.drivers.xl.runner import BUILD, STREAM

LOG = logging.getLogger(__name__)


class Life:
    def __init__(self, host: Host) -> None:
        self._host = host
        self._xl, self._records, self._store, self._events = host.xl, host.records, host.store, host.events

    # looking: what has ended is dealt with before it is shown

    def rows(self) -> list[parsers.Row]:
        known = set(self._records.uuids())  # first: a record goes with its domain, which may be in the rows still
        rows = self._host.rows()
        if any([self._settle(row) for row in rows if row.uuid in known]):
            rows = self._host.rows()
        return rows

    def row(self, uuid: str) -> parsers.Row:
        return pick(self.rows(), uuid)

    @contextlib.contextmanager
    def locked(self, uuid: str) -> Iterator[None]:
        """Nobody else of ours acts on it meanwhile; another agent does not act on this host at all."""
        self._host.claim()
        with self._records.lock(uuid):
            yield

    @contextlib.contextmanager
    def holding(self, uuid: str) -> Iterator[tuple[parsers.Row, Record]]:
        """A domain of ours, locked. :raises DomainNotFound, NotOurs."""
        with self.locked(uuid):
            row = self._host.row(uuid)
            if self._settle_held(row):
                row = self._host.row(uuid)
            yield row, self._host.ours(row)

    @contextlib.contextmanager
    def acting(self, uuid: str, verb: str) -> Iterator[tuple[parsers.Row, Record]]:
        """As `holding`. :raises WrongState: it has ended."""
        with self.holding(uuid) as (row, record):
            if state(row) in ENDED | {DomainState.DYING}:
                raise WrongState(f"domain {uuid} is {state(row).value}, cannot {verb} it: reset or destroy it")
            yield row, record

    # making

    def create(self, spec: DomainSpec) -> DomainInfo:
        spec.validate()
        check_files(spec)
        return self._made(spec, spec, "", lambda: self._start(spec))

    def restore(self, spec: DomainSpec, run: DomainSpec, path: str) -> DomainInfo:
        """As `create`, from a saved image that was looked at. :param run: as `Record.run`."""
        spec.validate()
        config_file = config.render(run, self._host.settings.networks)

        def start() -> None:
            file = self._records.config(spec.uuid, config_file)
            self._xl.run("restore", "-e", "-p", str(file), path, timeout=STREAM)

        return self._made(spec, run, "restored", start)

    def _made(self, spec: DomainSpec, run: DomainSpec, how: str, start: Callable[[], None]) -> DomainInfo:
        self._host.claim()
        self.rows()  # what has ended makes room
        with self._records.lock(), self._records.lock(spec.uuid):
            self.check(run, self._host.rows())
            record = Record(spec, run, time.time(), log_start=self._log_size(spec))
            self._records.put(record)
            try:
                start()
                row = self.mark(record)
            except BaseException:
                self.undo(spec.uuid)
                raise
        self._events.publish("created", spec.uuid, how)
        return self._host.info(row)

    def check(self, spec: DomainSpec, rows: list[parsers.Row]) -> None:
        """:raises ToolstackError: it cannot be made: see `hypervisor.toolstack.api.Toolstack.create`."""
        facts = self._host.facts()
        if Capability(spec.type.value) not in capabilities.here(facts):
            raise Unsupported(f"type {spec.type.value} is not something this Xen has: it has {facts['virt_caps']}")
        for row in rows:
            if row.uuid == spec.uuid:
                raise DomainExists(f"uuid {spec.uuid} is in use by domain {row.name!r}: destroy it or give another")
            if split_name(row.name)[0] == spec.name:
                raise NameInUse(f"name {spec.name!r} is in use by domain {row.uuid}: destroy it or give another")
        check_vcpus(spec, facts)
        free = self._host.free(facts, rows)
        if spec.memory_mib > free:
            raise InsufficientMemory(f"{spec.memory_mib} MiB asked for, {free} MiB are free: ask for less")
        there = self._host.specs() if spec.disks or spec.nics else []
        for disk in spec.disks:
            check_disk(spec.uuid, disk, there)
        for nic in spec.nics:
            check_nic(nic, there, self._host.settings.networks)

    def build(self, record: Record) -> parsers.Row:
        """Make it, paused, and mark it. Call with its lock held."""
        self._start(record.spec)
        return self.mark(dataclasses.replace(record, run=record.spec))

    def _start(self, spec: DomainSpec) -> None:
        file = self._records.config(spec.uuid, config.render(spec, self._host.settings.networks))
        self._xl.run("create", "-e", "-p", str(file), timeout=BUILD)

    def mark(self, record: Record) -> parsers.Row:
        """It is ours from now on: in xenstore, and on disk. Call with its lock held."""
        spec = record.spec
        row = self._host.row(spec.uuid)
        for name, value in (("uuid", spec.uuid), ("owner", spec.owner)):
            self._store.write(node(row, name), value)
            self._store.set_perms(node(row, name), ("n0",))
        self._records.put(dataclasses.replace(record, made=True, again=False))
        return row

    def undo(self, uuid: str) -> None:
        """A create that failed leaves nothing: what has its UUID was not there before. Call with its lock held."""
        with contextlib.suppress(ToolstackError):
            self._xl.run("destroy", str(self._host.row(uuid).domid), timeout=BUILD)
        try:
            self._host.row(uuid)
        except DomainNotFound:
            self._records.delete(uuid)
        except ToolstackError:
            LOG.warning("whether domain %s was left half made cannot be known: its record is kept", uuid)

    def _log_size(self, spec: DomainSpec) -> int:
        with contextlib.suppress(OSError):
            return os.path.getsize(self._host.log(spec))
        return 0

    # ending

    def reset(self, uuid: str) -> None:
        with self.locked(uuid):
            row = self._host.row(uuid)
            self.rebuild(row, self._host.ours(row))

    def destroy(self, uuid: str) -> None:
        with self.locked(uuid):
            row = self._host.row(uuid)
            self._host.ours(row)
            self._xl.run("destroy", str(row.domid), timeout=BUILD)
            self._records.delete(uuid)
        self._events.publish("destroyed", uuid)

    def rebuild(self, row: parsers.Row | None, record: Record) -> None:
        """End it and make it anew, running. Call with its lock held."""
        record = dataclasses.replace(record, again=True)
        self._records.put(record)
        if row is not None:
            self._xl.run("destroy", str(row.domid), timeout=BUILD)
        new = self.build(record)
        self._xl.run("unpause", str(new.domid))
        self._events.publish("rebooted", record.spec.uuid)

    def _settle(self, row: parsers.Row) -> bool:
        """Do what its spec says when a domain of ours has ended; whether the host must be looked at again."""
        if not _has_ended(row):
            return False
        try:
            with self.locked(row.uuid):
                self._settle_held(self._host.row(row.uuid))
        except DomainNotFound:
            pass  # another did it
        except ToolstackError as exc:  # one domain's trouble hides no other
            LOG.warning("domain %s ended, and what its spec says then failed: %s", row.uuid, exc)
        return True

    def _settle_held(self, row: parsers.Row) -> bool:
        """The same with its lock held; whether anything was done."""
        if not _has_ended(row):
            return False
        try:
            record = self._host.ours(row)
        except NotOurs:
            return False
        if self._store.read(node(row, "ended")):
            return False
        reason = REASONS.get(row.reason if row.reason is not None else 3, ShutdownReason.CRASH)
        crashed = state(row) is DomainState.CRASHED
        self._events.publish("crashed" if crashed else "shutdown", row.uuid, reason.value)
        action = _action(record.spec, reason)
        if action is OnEvent.RESTART:
            self.rebuild(row, record)
        elif action is OnEvent.DESTROY:
            self._xl.run("destroy", str(row.domid), timeout=BUILD)
            self._records.delete(row.uuid)
            self._events.publish("destroyed", row.uuid, f"after {reason.value}")
        else:
            self._store.write(node(row, "ended"), reason.value)
        return True


def check_vcpus(spec: DomainSpec, facts: dict[str, str]) -> None:
    """:raises InsufficientVcpus: more than the host has."""
    cpus = int(facts["nr_cpus"])
    if spec.effective_max_vcpus > cpus:
        raise InsufficientVcpus(f"{spec.effective_max_vcpus} vCPUs asked for, the host has {cpus}: give fewer")


def _has_ended(row: parsers.Row) -> bool:
    """By itself; one that is being saved has stopped, and is in the hands of who saves it."""
    return state(row) in ENDED and row.reason != SUSPENDED


def _action(spec: DomainSpec, reason: ShutdownReason) -> OnEvent:
    if reason in (ShutdownReason.CRASH, ShutdownReason.WATCHDOG):
        return spec.on_crash
    return spec.on_reboot if reason is ShutdownReason.REBOOT else spec.on_poweroff
