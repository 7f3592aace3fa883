"""A domain on its way to this host: a place is made for it, it arrives, and runs when it is known to have left.

A half that is not `MigrationPhase.COMPLETE` drops itself when anything goes wrong. A complete one may be the only copy:
it stays, paused, until the source or an agent says what it is to be.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import logging
import os
from typing import Any

from hypervisor.errors import HostFailure, MigrationFailed, MigrationNotTransparent, ToolstackError
from hypervisor.host import building, disk_mirror, priority
from hypervisor.host.ledger import ExtentTaken
from hypervisor.host.migration import disks
from hypervisor.host.migration import offer as offers
from hypervisor.host.migration.belongings import Belongings
from hypervisor.host.migration.clock import Steps
from hypervisor.host.migration.disks import IncomingDisks
from hypervisor.host.migration.hosting import Hosting
from hypervisor.host.migration.move import Move
from hypervisor.host.migration.offer import Detail
from hypervisor.host.migration.words import (
    COMPLETE,
    EARLY,
    FAILED,
    GO,
    HOST,
    KEPT,
    LAST_WORDS,
    NODES,
    PRINTED,
    PRINTED_BYTES,
    READY,
    RUNNING,
    STATE,
)
from hypervisor.host.mover import CLOSED, Receiver
from hypervisor.host.process import ProcessHold, describe_exit
from hypervisor.host.records import DomainRecord
from hypervisor.host.table import Domain
from hypervisor.toolstack.api import DomainState, MigrationOffer, MigrationPhase, MigrationTicket
from hypervisor.toolstack.migration import WAIT_SECONDS
from hypervisor.waiting import within
from hypervisor.xenstore import moving
from hypervisor.xenstore.domain_nodes import OWNER_NODE
from hypervisor.xenstore.errors import XenstoreError
from hypervisor.xenstore.path import domain_path

LOG = logging.getLogger(__name__)

STATE_TIMEOUT = 30.0
"""Seconds for the domain process to take its guest over."""
_LONG = 1e6
"""Seconds; that the source is silent is noticed by the mover."""


class Incoming:
    """One domain that is to come, or waits for the word that it may run."""

    def __init__(self, host: Hosting, move: Move, domain: Domain) -> None:
        self.move = move
        self.domain = domain
        self._host = host
        self._receiver: Receiver | None = None
        self._task: asyncio.Task[None] | None = None
        self._drivers: asyncio.Task[None] | None = None
        self._dropping: asyncio.Task[None] | None = None
        self._belongings: Belongings | None = None
        self._disks: IncomingDisks | None = None
        self._why: ToolstackError | None = None

    # -- before ---------------------------------------------------------------------------------------------------

    async def prepare(self, offer: MigrationOffer, detail: Detail, token: str) -> MigrationTicket:
        """Set aside what it needs and listen. :raises ToolstackError: nothing is left."""
        host, life, domain = self._host, self._host.life, self.domain
        record = domain.record
        assert domain.devices is not None
        try:
            record.claim = life.ledger.claim_at(domain.uuid, detail.base_mfn, detail.frames, detail.committed)
        except ExtentTaken as exc:
            raise MigrationNotTransparent(f"{exc}: move it as an image") from None
        tls = host.tls()
        self._disks = await IncomingDisks.of(detail.images, life.settings, self._made)
        elsewhere = self._disks.elsewhere
        offers.check_disks(detail, await domain.devices.check_all(elsewhere), elsewhere)
        life.records.save(record)
        await life.fork(domain, offers.request_of(offer, detail, record.spec, life.settings), detail.frames)
        process = domain.process
        assert process is not None
        folder = life.records.directory(domain.uuid)
        domain.boot = await building.built(domain, folder, life.settings.build_timeout)
        await process.request("commit")
        record.pid = process.pid
        life.records.save(record)
        life.watch(domain)
        process.on_exit = self._process_gone
        self._receiver = await self._listen(tls, token, process, detail.frames)
        self._receiver.on_connected = self._connected
        self._disks.begin(domain.devices.disk_backend(), record, self._receiver)
        settings = life.settings
        ticket = MigrationTicket(
            ident=self.move.ident,
            uuid=domain.uuid,
            mode=self.move.mode,
            address=settings.migration_name or settings.migration_address,
            port=self._receiver.port,
            detail={disks.ANSWERS: self._disks.answers},
        )
        self.move.ticket = ticket.to_json()
        host.write(self.move, MigrationPhase.WAITING)
        self._task = asyncio.get_running_loop().create_task(self._run())
        self._drivers = asyncio.get_running_loop().create_task(domain.devices.expect())
        return ticket

    async def _listen(self, tls: Any, token: str, process: ProcessHold, pages: int) -> Receiver:
        life = self._host.life
        first, last = life.settings.migration_ports
        problem: HostFailure | None = None
        for port in range(first, last + 1):
            try:
                return await Receiver.listen(
                    life.zygote,
                    address=life.settings.migration_address,
                    port=port,
                    tls=tls,
                    ident=self.move.ident,
                    token=token,
                    memory_fd=process.handles.memory,
                    pages=pages,
                    sandbox=life.settings.sandbox,
                )
            except HostFailure as exc:
                problem = exc
        assert problem is not None
        raise problem

    def _made(self, images: list[str]) -> None:
        """:raises HostFailure: it cannot be written down."""
        self.move.images = images
        self._host.moves.save(self.move)

    def _connected(self) -> None:
        if self.move.phase is MigrationPhase.WAITING:
            try:
                self._host.write(self.move, MigrationPhase.RECEIVING)
            except ToolstackError as exc:
                LOG.error("migration %s: %s", self.move.ident, exc)

    def _process_gone(self, code: int | None) -> None:
        self._host.life.process_gone(self.domain, code)
        task = self._task
        if self.move.phase in (MigrationPhase.WAITING, MigrationPhase.RECEIVING) and task is not None:
            self._why = MigrationFailed(f"the domain process on the target ended: {describe_exit(code)}: see its log")
            task.cancel()

    # -- ends -----------------------------------------------------------------------------------------------------

    async def cancel(self, why: ToolstackError) -> None:
        """Drop what is not complete yet."""
        task, self._why = self._task, why
        if task is not None:
            task.cancel()
            await asyncio.wait([task])
        if self._dropping is not None:
            await asyncio.wait([self._dropping])

    def stop(self) -> None:
        """The host process ends."""
        for task in (self._task, self._drivers, self._dropping):
            if task is not None:
                task.cancel()

    async def drop(self, why: ToolstackError) -> None:
        """Nothing of it stays here. Once begun it is done, whoever asks for it besides or does not wait for it."""
        before = self._dropping
        if before is None or (before.done() and (before.cancelled() or before.exception() is not None)):
            self._dropping = asyncio.get_running_loop().create_task(self._drop(why))
        assert self._dropping is not None
        await asyncio.shield(self._dropping)

    async def _drop(self, why: ToolstackError) -> None:
        life, domain, move = self._host.life, self.domain, self.move
        receiver = self._receiver
        if receiver is not None and receiver.free and move.phase is not MigrationPhase.COMPLETE:
            with contextlib.suppress(ToolstackError, TimeoutError):
                await within(receiver.blob(FAILED, json.dumps(why.to_json()).encode()), LAST_WORDS)
        await self.hang_up()
        if self._disks is not None:
            await self._disks.drop()
        async with domain.lock:
            domain.dying = True
            await life.forget(domain)
            moving.forget(self._host.backends.server, domain.record.domid, domain.uuid)
        disks.remove(move.images)
        move.images = []
        move.end(MigrationPhase.DROPPED, why)
        self._host.write(move, MigrationPhase.DROPPED)

    async def go(self) -> dict[str, float]:
        """It has left the source: let it run. :returns: what took how long, milliseconds.

        The phase is written first: a host process that is killed in between does the rest when it starts.
        """
        domain, move, life = self.domain, self.move, self._host.life
        steps = Steps()
        async with domain.lock:
            if not domain.record.migration:
                return {}
            if move.phase is not MigrationPhase.RUNNING:
                move.ending = True
                self._host.write(move, MigrationPhase.RUNNING, tell=False)
            steps.done("running")
            record, process = domain.record, domain.process
            domain.held = False
            if not record.ended and process is not None and process.alive and domain.devices is not None:
                domain.devices.arrive(self._disks.use() if self._disks is not None else None)
                if move.running:
                    await process.request("unpause")
                    record.state = DomainState.RUNNING
            steps.done("unpause")
            record.migration = record.detail = ""
            life.records.save(record)
        asyncio.get_running_loop().call_soon(self._settle)
        return steps.times

    def _settle(self) -> None:
        """What need not be done at once."""
        domain, life, process = self.domain, self._host.life, self.domain.process
        self.move.images = []
        self.move.end(MigrationPhase.RUNNING)
        self._host.write(self.move, MigrationPhase.RUNNING)
        life.resizer.begin(domain)
        life.table.emit("arrived", domain.uuid, f"from {self.move.peer or 'another host'}")
        if process is not None and process.alive:
            life.spawn(priority.apply(process.pid, domain.record.spec.weight))

    async def hang_up(self) -> None:
        receiver, self._receiver = self._receiver, None
        if self._disks is not None:
            await self._disks.end()
        if self._drivers is not None:
            self._drivers.cancel()
            await asyncio.gather(self._drivers, return_exceptions=True)
        if receiver is not None:
            await receiver.close()

    # -- the conversation -----------------------------------------------------------------------------------------

    async def _run(self) -> None:
        why: ToolstackError
        try:
            await self._receive()
            return
        except asyncio.CancelledError:
            if self._why is None:
                raise
            why = self._why
        except ToolstackError as exc:
            why = exc
        except Exception as exc:
            LOG.exception("migration %s", self.move.ident)
            why = HostFailure(f"receiving failed: {type(exc).__name__}: {exc}; see the target's log")
        if self.move.phase in (MigrationPhase.COMPLETE, MigrationPhase.RUNNING):
            LOG.error("migration %s: %s", self.move.ident, why)
            await self.hang_up()
            return
        LOG.warning("migration %s of domain %s: dropped: %s", self.move.ident, self.move.uuid, why)
        try:
            await self.drop(why)
        except ToolstackError as exc:
            LOG.error("migration %s: what has come cannot be dropped: %s", self.move.ident, exc)

    async def _receive(self) -> None:
        receiver = self._receiver
        assert receiver is not None
        await receiver.connected(WAIT_SECONDS)
        while True:
            kind, data = await receiver.receive(_LONG)
            if kind == CLOSED:
                if self.move.phase is not MigrationPhase.COMPLETE:
                    raise receiver.error or MigrationFailed(f"the source ended the connection ({receiver.why})")
                LOG.error("migration %s: %s", self.move.ident, self.move.detail)
                await self.hang_up()
                return
            if await self._heard(receiver, kind, data):
                await self.hang_up()
                return

    async def _heard(self, receiver: Receiver, kind: str, data: bytes) -> bool:
        """Whether that was all."""
        receiving = self.move.phase is MigrationPhase.RECEIVING
        if kind == disk_mirror.KIND and receiving and self._disks is not None:
            self._disks.heard(data)
        elif kind == HOST and receiving:
            self._belongings = Belongings.unpack(data)
        elif kind == PRINTED and receiving and len(data) <= PRINTED_BYTES:
            self.domain.console.add(data)
        elif kind == NODES and receiving:
            self._take_nodes(data)
        elif kind == EARLY and receiving:
            await self._make_ready(receiver, data)
        elif kind == STATE and receiving and self._belongings is not None:
            await receiver.blob(COMPLETE, json.dumps(await self._complete(data, self._belongings)).encode())
        elif kind == GO and self.move.phase is MigrationPhase.COMPLETE:
            took = await self.go()
            with contextlib.suppress(ToolstackError):
                await receiver.blob(RUNNING, json.dumps(took).encode())
            return True
        elif kind == KEPT:
            await self.drop(MigrationFailed("the source has kept the domain"))
            return True
        else:
            raise MigrationFailed(f"the source said {kind[:40]!r} out of place: are both hosts of one release?")
        return False

    async def _make_ready(self, receiver: Receiver, data: bytes) -> None:
        process = self._process()
        early = _in_memory(data)
        try:
            await process.request("migration_import", STATE_TIMEOUT, {}, [early])
        finally:
            os.close(early)
        if self._drivers is not None:
            results = await asyncio.gather(self._drivers, return_exceptions=True)
            if isinstance(results[0], BaseException):
                LOG.warning("migration %s: %s", self.move.ident, results[0])
        await receiver.blob(READY, b"{}")

    async def _complete(self, data: bytes, said: Belongings) -> dict[str, float]:
        """:raises ToolstackError: it is not whole."""
        domain, life, steps = self.domain, self._host.life, Steps()
        record, process = domain.record, self._process()
        self._check_same(record, said)
        state = _in_memory(data)
        taken = asyncio.ensure_future(process.request("migration_import", STATE_TIMEOUT, {}, [state]))
        try:
            await asyncio.sleep(0)  # it is on its way before the rest is done here
            self._take_store(said)
            steps.done("xenstore")
            here = await self._disks.take(record.spec) if self._disks is not None else record.spec
            # Written beside the domain process's work: it counts only once the move's own record says complete.
            life.records.save(said.tell(dataclasses.replace(record), here, self.move.commands()))
            steps.done("record")
        finally:
            await asyncio.gather(taken, return_exceptions=True)
            os.close(state)
        await taken
        steps.done("state")
        async with domain.lock:
            if said.printed:
                domain.console.add(said.printed)
            said.tell(record, here, self.move.commands())
            domain.held = True
            domain.attachment = self._host.backends.attach(domain, domain.boot, adopted=True)
            steps.done("rings")
            self._host.write(self.move, MigrationPhase.COMPLETE, record.detail, tell=False)
            steps.done("complete")
        asyncio.get_running_loop().call_soon(self._host.tell, self.move)
        return steps.times

    def _check_same(self, record: DomainRecord, said: Belongings) -> None:
        there = dataclasses.replace(said.spec, owner=record.spec.owner)
        if there != record.spec or said.domid != record.domid:
            raise MigrationFailed(f"domain {self.move.uuid} was changed after it had been offered: begin anew")

    def _take_nodes(self, data: bytes) -> None:
        record = self.domain.record
        try:
            moving.take_nodes(self._host.backends.server, record.domid, record.spec.uuid, json.loads(data))
        except (XenstoreError, ValueError, RecursionError) as exc:
            raise MigrationFailed(str(exc)) from exc

    def _take_store(self, said: Belongings) -> None:
        record, backends = self.domain.record, self._host.backends
        try:
            moving.take(backends.server, record.domid, record.spec.uuid, dict(said.store))
            backends.handle.write(f"{domain_path(record.domid)}/{OWNER_NODE}", record.spec.owner)
        except XenstoreError as exc:
            raise MigrationFailed(str(exc)) from exc

    def _process(self) -> ProcessHold:
        process = self.domain.process
        if process is None or not process.alive:
            raise MigrationFailed("the domain process on the target has ended: see its host's log")
        return process


def _in_memory(data: bytes) -> int:
    fd = os.memfd_create("reeve-arrived", os.MFD_CLOEXEC)
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
    return fd
