"""A domain on its way from this host: copied while it runs, stopped, handed over.

Until `MigrationPhase.MOVED` is written the domain is this host's, whatever happens; from then on it is the target's.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import os

from hypervisor.errors import (
    HostFailure,
    MigrationFailed,
    MigrationUnresolved,
    ToolstackError,
    WrongState,
    from_json,
)
from hypervisor.host.adoption import serve
from hypervisor.host.migration import bitmap
from hypervisor.host.migration.clock import Steps
from hypervisor.host.migration.disks import OutgoingDisks, Talk
from hypervisor.host.migration.hosting import Hosting
from hypervisor.host.migration.move import Move
from hypervisor.host.migration.rest import Rest, send_ahead
from hypervisor.host.migration.rounds import Rounds, Verdict
from hypervisor.host.migration.sent import Sent
from hypervisor.host.migration.words import COMPLETE, EARLY, GO, KEPT, LAST_WORDS, READY, RUNNING, Words
from hypervisor.host.mover import PagesSent, Sender
from hypervisor.host.process import ProcessHold
from hypervisor.host.table import Domain
from hypervisor.toolstack.api import DomainState, MigrationOptions, MigrationPhase, MigrationTicket
from hypervisor.waiting import within
from hypervisor.xenstore import moving

LOG = logging.getLogger(__name__)

Phase = MigrationPhase
STATE_TIMEOUT = 30.0
"""Seconds for the domain process or the target to do its part of a switch."""
GOING = 1.0
"""Seconds in which a process that does not answer may turn out to be gone."""
READY_TIMEOUT = 60.0
"""Seconds for the target's drivers to be started."""
BEGUN = (Phase.STARTING, Phase.COPYING, Phase.STANDBY, Phase.SWITCHING)


class Outgoing:
    """:param token: which only the target knows besides. `start` begins."""

    def __init__(
        self,
        host: Hosting,
        move: Move,
        domain: Domain,
        token: str = "",
        ticket: MigrationTicket | None = None,
        options: MigrationOptions | None = None,
    ) -> None:
        self.move = move
        self.domain = domain
        self._host = host
        self._token = token
        self._ticket = ticket
        self._options = options or MigrationOptions()
        self._process: ProcessHold | None = domain.process
        self._sender: Sender | None = None
        self._talk: Talk | None = None
        self._disks: OutgoingDisks | None = None
        self._bitmap = -1
        self._rounds = Rounds(self._options)
        self._sent = Sent(host, move)
        self._why: ToolstackError | None = None
        self._giving_up = False
        self._given = moving.Given()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def cancel(self, why: ToolstackError) -> None:
        """End it, the guest runs on. :raises WrongState: it is too late."""
        if self._has_moved():
            raise WrongState(f"migration {self.move.ident} has moved the domain already, too late to cancel it")
        task = self._task
        if task is None or self.move.phase.ended:
            return
        if self._why is None and not self._giving_up:
            self._why = why
            task.cancel()
        await asyncio.wait([task])
        if self._has_moved():
            raise WrongState(f"migration {self.move.ident} has moved the domain already, too late to cancel it")

    def _has_moved(self) -> bool:
        return self.move.phase is Phase.MOVED

    def stop(self) -> None:
        """The host process ends; the next one sees what is to be done."""
        if self._task is not None:
            self._task.cancel()

    async def keep(self, why: ToolstackError) -> None:
        """Let the guest go on here, from wherever it was stopped, and write that down.

        It ends in phase UNRESOLVED if the guest cannot go on though its process lives.
        """
        domain, move = self.domain, self.move
        try:
            await self._go_on()
        except ToolstackError as exc:
            # A process that is gone is a crash, and dealt with as such.
            if not domain.record.ended and domain.process is not None and not await domain.process.gone(GOING):
                stuck = MigrationUnresolved(f"migration {move.ident}: the guest cannot go on here by itself: {exc}")
                move.error = stuck.to_json()
                detail = f"paused, and it has not left this host: {move.commands()}"
                domain.record.state, domain.record.detail = DomainState.PAUSED, detail
                self._host.life.records.save(domain.record)
                self._host.write(move, Phase.UNRESOLVED, detail)
                return
        domain.record.migration = ""
        if domain.process is not None:
            self._host.life.records.save(domain.record)
        move.end(Phase.KEPT, why)
        self._host.write(move, Phase.KEPT)
        # Without this word a half that is not complete drops itself, too: when the connection ends.
        with contextlib.suppress(ToolstackError, TimeoutError):
            if self._sender is not None and self._sender.free:
                await within(self._sender.blob(KEPT, b""), LAST_WORDS)

    async def resolve(self, *, keep: bool) -> None:
        """Of one in phase UNRESOLVED. :raises MigrationUnresolved: it still cannot go on here."""
        move = self.move
        async with self.domain.lock:
            if keep:
                await self.keep(MigrationUnresolved(f"migration {move.ident} was resolved: the domain runs on"))
                if move.phase is Phase.UNRESOLVED:
                    raise from_json(move.error or {})
            else:
                move.ending = True
                self._host.write(move, Phase.MOVED, tell=False)
                await self._gone()

    # -- the way --------------------------------------------------------------------------------------------------

    async def _run(self) -> None:
        try:
            await self._move()
        except asyncio.CancelledError:
            if self._why is None:
                raise
            await self._give_up(self._why)
        except ToolstackError as exc:
            await self._give_up(exc)
        except Exception as exc:
            LOG.exception("migration %s", self.move.ident)
            await self._give_up(HostFailure(f"migration failed: {type(exc).__name__}: {exc}; see the host's log"))
        finally:
            await self._close()

    async def _give_up(self, why: ToolstackError) -> None:
        self._giving_up = True
        why = await self._reason(why)
        if self.move.phase is Phase.MOVED:
            LOG.error("migration %s: %s; the next start of the host process clears up", self.move.ident, why)
            return
        LOG.warning("migration %s of domain %s: %s", self.move.ident, self.move.uuid, why)
        async with self.domain.lock:
            await self.keep(why)

    async def _close(self) -> None:
        if self._bitmap >= 0:
            os.close(self._bitmap)
            self._bitmap = -1
        if self._disks is not None:
            await self._disks.abort()
        if self._talk is not None:
            await self._talk.close()
            self._talk = None
        sender, self._sender = self._sender, None
        if sender is not None:
            await sender.close()

    async def _move(self) -> None:
        try:
            async with asyncio.timeout(self._options.timeout_s):
                await self._connect()
                await self._copy()
        except TimeoutError:
            raise MigrationFailed(
                f"the domain was not copied within {self._options.timeout_s:g} s: give more time or bandwidth, "
                "or let it be slowed down"
            ) from None
        async with self.domain.lock:
            self._check_there()
            await self._switch()

    async def _connect(self) -> None:
        process, ticket = self._there(), self._ticket
        assert ticket is not None and self.domain.record.claim is not None
        pages = self.domain.record.claim.frames
        self._bitmap = bitmap.create(pages)
        self._sender = await Sender.start(
            self._host.life.zygote,
            address=ticket.address,
            port=ticket.port,
            tls=dataclasses.replace(self._host.tls(), peer=str(ticket.detail.get("name", ""))),
            ident=self.move.ident,
            token=self._token,
            memory_fd=process.handles.memory,
            pages=pages,
            rate=self._options.bandwidth_bytes,
            zstd=self._options.compress == "zstd",
            sandbox=self._host.life.settings.sandbox,
        )
        self._sender.on_progress = self._sent.progress
        self._talk = Talk(self._sender)
        assert self.domain.devices is not None
        disks, link = self.domain.devices.all("disk"), self._talk.link
        self._disks = await OutgoingDisks.of(disks, ticket, self._options, link, self._sent.disks)
        self._host.write(self.move, Phase.COPYING)

    async def _copy(self) -> None:
        """Until the rest is quickly done."""
        process, disks = self._there(), self._disks
        assert disks is not None
        await disks.copy()
        await process.request("migration_log", fields={"on": True}, fds=[self._bitmap])
        assert self.domain.record.claim is not None
        bitmap.mark_data(self._bitmap, process.handles.memory, self.domain.record.claim.frames)
        sent = await self._round()
        ready = False
        while True:
            left = await self._written(sent)
            verdict = self._rounds.after(sent.seconds, sent.pages - sent.unchanged, sent.bytes, left)
            self.move.downtime_estimate_ms = round(self._rounds.estimate_ms, 1)
            self._host.tell(self.move)
            if verdict is Verdict.SLOWER:
                LOG.info("domain %s: %d per cent of a CPU while it is moved", self.move.uuid, self._rounds.cap)
                await process.request("set_cap", fields={"percent": self._rounds.cap})
            if verdict is Verdict.SWITCH:
                await disks.again()
            sent = await self._round()
            if verdict is Verdict.SWITCH and ready:
                return
            if verdict is Verdict.SWITCH:
                await self._make_ready()
                ready = True

    async def _round(self) -> PagesSent:
        self._check_there()
        await self._words().hear()
        assert self._sender is not None
        self.move.rounds += 1
        sent = await self._sender.pages(self._bitmap)
        self._sent.round(sent)
        self.move.rate_bytes = round(sent.bytes / sent.seconds, 1) if sent.seconds > 0 else 0.0
        return sent

    async def _written(self, sent: PagesSent) -> int:
        """Ask what the guest has written since; pages that have to go over, as far as that is known."""
        said = await self._there().request("migration_dirty", STATE_TIMEOUT)
        try:
            pages, shared = int(said["pages"]), int(said["shared"])
        except (KeyError, TypeError, ValueError) as exc:
            raise HostFailure("the domain process does not say what was written: see domain.log") from exc
        # What might have been written is mostly what it was.
        left = pages - shared if said.get("log") == "write-protection" else sent.pages - sent.unchanged
        self.move.dirty_pages = left
        self.move.dirty_rate_pages = round(left / sent.seconds, 1) if sent.seconds > 0 else 0.0
        return left

    async def _make_ready(self) -> None:
        """What the target can do before the switch, and the disks' content on its way."""
        process, devices = self._there(), self.domain.devices
        assert self._sender is not None and devices is not None
        state = os.memfd_create("reeve-early", os.MFD_CLOEXEC)
        try:
            await process.request("migration_export", STATE_TIMEOUT, {"early": True}, [state])
            self._printed = await send_ahead(self._host.backends.server, self.domain, self._sender, self._given)
            await self._sender.blob(EARLY, state)
        finally:
            os.close(state)
        flushed = asyncio.ensure_future(devices.flush())
        try:
            await self._words().answer(READY, READY_TIMEOUT)
        finally:
            await asyncio.gather(flushed, return_exceptions=True)
        await flushed

    # -- the switch -----------------------------------------------------------------------------------------------

    async def _switch(self) -> None:
        """The guest stands still from here to the target's word that it runs."""
        domain, process, sender = self.domain, self._there(), self._sender
        assert domain.devices is not None and domain.attachment is not None
        assert sender is not None and self._disks is not None
        self._host.write(self.move, Phase.SWITCHING)
        steps = Steps()
        if self.move.running:
            await process.request("pause")
        domain.record.state = DomainState.PAUSED
        domain.record.detail = f"on its way to {self.move.peer or 'another host'} (migration {self.move.ident})"
        steps.done("pause")
        attachment, domain.attachment = domain.attachment, None
        attachment.let_go()
        steps.done("rings")
        await domain.devices.quiesce()
        steps.done("drivers")
        server = self._host.backends.server
        rest = Rest(server, domain, process, sender, self._disks, self._bitmap, self._printed, self._given)
        self._sent.round(await rest.send(steps))
        await self._leave(steps)

    async def _leave(self, steps: Steps) -> None:
        """The target has been sent all that there is."""
        sender = self._sender
        assert sender is not None
        said = await self._words().answer(COMPLETE, STATE_TIMEOUT)
        steps.done("target takes it")
        self.move.ending = True
        try:
            self._host.write(self.move, Phase.MOVED, tell=False)
        except ToolstackError:
            self.move.ending = False
            raise
        steps.done("moved")
        with contextlib.suppress(ToolstackError, TimeoutError):
            await sender.blob(GO, b"")
            steps.done("go")
            said |= await self._words().answer(RUNNING, LAST_WORDS)
            steps.done("target runs")
        self.move.downtime = {**steps.times, **{f"target: {name}": ms for name, ms in said.items()}}
        self.move.downtime_ms = steps.total_ms
        LOG.info("migration %s: downtime %.1f ms: %s", self.move.ident, steps.total_ms, self.move.downtime)
        await self._gone()

    async def _gone(self) -> None:
        """It is the target's: nothing of it stays here."""
        domain, move = self.domain, self.move
        domain.dying = True
        await self._host.life.forget(domain)
        moving.forget(self._host.backends.server, domain.record.domid, domain.uuid)
        move.end(Phase.MOVED)
        move.dirty_pages = 0
        self._host.moves.save(move)
        self._host.tell(move)
        self._host.life.table.emit("destroyed", domain.uuid, f"moved to {move.peer or 'another host'}")

    async def _go_on(self) -> None:
        """Take back what was done for the move; harmless for what was not. :raises ToolstackError: it cannot go on."""
        domain, process = self.domain, self.domain.process
        record = domain.record
        if record.ended or process is None or process is not self._process or not process.alive:
            return
        await process.request("migration_log", STATE_TIMEOUT, {"on": False})
        await process.request("migration_freeze", STATE_TIMEOUT, {"on": False})
        if domain.attachment is None:
            domain.attachment = self._host.backends.attach(domain, domain.boot, adopted=True)
        if self._rounds.cap:
            await process.request("set_cap", fields={"percent": record.spec.cap})
        if self.move.phase in (Phase.SWITCHING, Phase.UNRESOLVED):
            assert domain.devices is not None
            serve(self._host.life, domain) if domain.held else domain.devices.resume()
        record.detail = ""
        if self.move.running:
            await process.request("unpause")
            record.state = DomainState.RUNNING

    # -- inside ---------------------------------------------------------------------------------------------------

    def _words(self) -> Words:
        assert self._talk is not None
        return Words(self._talk)

    async def _reason(self, why: ToolstackError) -> ToolstackError:
        if self._talk is None or self._has_moved() or not isinstance(why, MigrationFailed):
            return why
        return await self._words().last(why)

    def _there(self) -> ProcessHold:
        self._check_there()
        assert self._process is not None
        return self._process

    def _check_there(self) -> None:
        """:raises WrongState: it is not the domain any more that was to be moved. :raises ToolstackError: cancelled."""
        if self._why is not None:
            raise self._why  # a task's cancellation is lost if what it waits for comes then (wait_for before 3.12)
        domain = self.domain
        same = domain.process is self._process and self._process is not None and self._process.alive
        if not same or domain.record.ended or domain.dying or self._host.life.table.find(domain.uuid) is not domain:
            raise WrongState(f"domain {domain.uuid} ended or restarted by itself while it was moved")

    _printed = 0
