"""A domain that is kept on a second host too: epoch after epoch its state goes there, while it runs here.

An epoch: the guest and its drivers stand still; what it has written since the one before is copied, its state is
taken; it runs on, and all that is sent. When the target has said that it holds the epoch whole, what the guest had sent
by then leaves its nics (`OutputCommit`), and when the interval has passed, the next begins.
Whatever goes wrong ends the standby, and the guest runs on here: this host's record decides, as in every migration.
Only a target that says that it runs the domain itself (`TakenOver`) leaves it paused.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import logging
import os
import time
from collections.abc import Awaitable
from typing import Any

from hypervisor.devices.block.mirror.source import Batch
from hypervisor.errors import HostUnavailable, MigrationFailed, ToolstackError
from hypervisor.host.migration.belongings import Belongings
from hypervisor.host.migration.clock import Steps
from hypervisor.host.migration.hosting import Hosting
from hypervisor.host.migration.move import Move
from hypervisor.host.migration.rest import STATE_TIMEOUT, send_ahead
from hypervisor.host.migration.source import Outgoing
from hypervisor.host.migration.words import (
    ACKNOWLEDGED,
    AGE,
    HOST,
    LAST,
    MOMENT,
    PRINTED_BYTES,
    STATE,
    TAKEOVER,
    TakenOver,
)
from hypervisor.host.output_commit import OutputCommit
from hypervisor.host.process import ProcessHold
from hypervisor.host.table import Domain
from hypervisor.host.together import all_of
from hypervisor.toolstack.api import DomainState, MigrationOptions, MigrationPhase, MigrationTicket
from hypervisor.xenstore import moving

LOG = logging.getLogger(__name__)

Phase = MigrationPhase
ACK_TIMEOUT = 60.0
"""Seconds for the target to hold an epoch whole, once all of it was sent."""
PATIENCE = 10.0
"""Seconds that an epoch may take to its end before it is cut off by whoever ends the standby."""
ROUNDS_BEFORE = 4
"""Rounds of copying before the first epoch, at most; epochs need not be small."""
TELL_EVERY = 1.0
"""Seconds between two events of a standby."""


@dataclasses.dataclass(slots=True)
class Epoch:
    """What was taken of a guest that stood still. :ivar state: descriptor. :ivar taken: `time.monotonic` of it.

    :ivar disks: what was written to them since the one before.
    """

    state: int
    belongings: bytes
    taken: float
    disks: Batch

    def close(self) -> None:
        """Harmless when repeated."""
        self.disks.close()
        if self.state >= 0:
            os.close(self.state)
            self.state = -1


class Standby(Outgoing):
    """As `Outgoing`, which ends when it is told to, when it cannot go on, or when the target takes over."""

    def __init__(
        self,
        host: Hosting,
        move: Move,
        domain: Domain,
        token: str,
        ticket: MigrationTicket,
        options: MigrationOptions,
    ) -> None:
        copying = dataclasses.replace(
            options,
            throttle=False,
            max_rounds=min(options.max_rounds, ROUNDS_BEFORE),
            # What both hosts write to would be ahead of the last epoch after a takeover by force.
            copy_disks=options.copy_disks or any(not disk.readonly for disk in domain.record.spec.disks),
        )
        super().__init__(host, move, domain, token, ticket, copying)
        self._asked = False
        self._idle = True  # no epoch is under way
        self._ending: ToolstackError | None = None
        self._told = 0.0
        self._output: OutputCommit | None = None

    async def cancel(self, why: ToolstackError) -> None:
        """Between two epochs, so that the target can be told; a connection that just ends means something else."""
        task = self._task
        if task is not None and not self._idle:
            self._ending = why
            await asyncio.wait([task], timeout=PATIENCE)
        await super().cancel(why)

    async def _move(self) -> None:
        try:
            async with asyncio.timeout(self._options.timeout_s):
                await self._connect()
                await self._copy()
                assert self._disks is not None
                await self._disks.aside()
        except TimeoutError:
            raise MigrationFailed(
                f"the domain was not copied within {self._options.timeout_s:g} s: give more time or bandwidth"
            ) from None
        assert self._sender is not None
        await self._sender.commit(0)
        await self._held_back().hold()
        while not self._asked:
            began = time.monotonic()
            self._idle = False
            await self._epoch()
            if self._ending is not None:
                raise self._ending
            self._idle = True
            await self._rest_of_interval(began)
        self._idle = False
        await self._hand_over()

    async def _make_ready(self) -> None:
        assert self._sender is not None
        self._printed = await send_ahead(self._host.backends.server, self.domain, self._sender, self._given)

    async def _rest_of_interval(self, began: float) -> None:
        left = began + self._options.interval_ms / 1000 - time.monotonic()
        with contextlib.suppress(TimeoutError):
            await self._words().among((TAKEOVER,), max(0.001, left))
            self._asked = True

    # -- one epoch ------------------------------------------------------------------------------------------------

    async def _epoch(self) -> None:
        async with self.domain.lock:
            self._check_there()
            await self._held_back().steady()
            steps = Steps()
            epoch, sent = await self._take(steps)
            try:
                await self._run_on()
            except BaseException:
                epoch.close()
                sent.cancel()
                raise
            self.move.pause_ms = steps.total_ms
        await self._send(epoch, sent)
        if self.move.phase is not Phase.STANDBY:
            self._host.write(self.move, Phase.STANDBY)
        elif time.monotonic() - self._told > TELL_EVERY:
            self._told = time.monotonic()
            self._host.tell(self.move)

    async def _take(self, steps: Steps, *, last: bool = False) -> tuple[Epoch, asyncio.Task[Any]]:
        """Stop the guest and take its state, its memory copied. :returns: and the task that sends the pages.

        :param last: it does not go on here; its drivers let go of it.
        """
        domain, process, sender, held_back = self.domain, self._there(), self._sender, self._held_back()
        assert sender is not None and self._disks is not None
        assert domain.devices is not None and domain.attachment is not None
        stops: list[Awaitable[Any]] = [process.request("pause")] if self.move.running else []
        if not last:
            stops.append(held_back.boundary(self.move.epochs + 1))
        await all_of(stops)
        domain.console.hold()
        attachment, domain.attachment = domain.attachment, None
        attachment.let_go()
        if last:
            await domain.devices.quiesce()
            await held_back.boundary(self.move.epochs + 1, still=False)
        state = os.memfd_create("reeve-epoch", os.MFD_CLOEXEC)
        copied: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        sender.on_copied = lambda: None if copied.done() else copied.set_result(None)
        pages: asyncio.Task[Any] | None = None
        # Asked one after the other without waiting: the domain process does them in this order.
        frozen = asyncio.ensure_future(process.request("migration_freeze", STATE_TIMEOUT, {"on": True, "dirty": True}))
        disks = asyncio.ensure_future(self._disks.gather())
        export = asyncio.ensure_future(process.request("migration_export", STATE_TIMEOUT, {"served": True}, [state]))
        try:
            await frozen
            taken = time.monotonic()
            pages = asyncio.ensure_future(sender.epoch(self._bitmap))
            store = moving.give(self._host.backends.server, domain.record.domid, domain.uuid, self._given)
            printed, upto = domain.console.since(self._printed, PRINTED_BYTES), domain.console.printed
            belongings = Belongings.of(domain.record, store, printed, held_back.told()).pack()
            self._printed = upto
            batch = await disks
            await export
            await asyncio.wait({pages, copied}, return_when=asyncio.FIRST_COMPLETED)
            if not copied.done():
                await pages  # says why
            steps.done("taken")
        except BaseException:
            # The pages, too: the target can be told nothing meanwhile.
            disks.add_done_callback(_close)
            await asyncio.gather(frozen, export, disks, *([pages] if pages is not None else []), return_exceptions=True)
            os.close(state)
            raise
        return Epoch(state, belongings, taken, batch), pages

    async def _run_on(self) -> None:
        domain, process = self.domain, self._there()
        domain.attachment = self._host.backends.attach(domain, domain.boot, adopted=True)
        asked = [process.request("migration_freeze", STATE_TIMEOUT, {"on": False})]
        if self.move.running:
            asked.append(process.request("unpause"))
        await asyncio.gather(*asked, self._held_back().go_on())

    async def _send(self, epoch: Epoch, pages: asyncio.Task[Any]) -> None:
        """Until the target has it whole."""
        sender = self._sender
        assert sender is not None
        try:
            self.move.rounds += 1
            self._sent.round(await pages)
            assert self._disks is not None
            await self._disks.deliver(epoch.disks)
            await sender.blob(HOST, epoch.belongings)
            await sender.blob(STATE, epoch.state)
        finally:
            epoch.close()
        age = round((time.monotonic() - epoch.taken) * 1000, 1)
        await sender.blob(AGE, json.dumps({"ms": age}).encode())
        number = self.move.epochs + 1
        await sender.commit(number)
        await self._acknowledged(number)
        await self._held_back().release(number)
        self.move.epochs = number

    async def _acknowledged(self, number: int) -> None:
        """:raises ToolstackError: it will not be."""
        until = time.monotonic() + ACK_TIMEOUT
        while True:
            try:
                said, content = await self._words().among((ACKNOWLEDGED, TAKEOVER), until - time.monotonic())
            except TimeoutError:
                raise HostUnavailable(f"the target did not take an epoch within {ACK_TIMEOUT:g} s") from None
            if said == TAKEOVER:
                self._asked = True
            elif content == str(number).encode():
                return
            else:
                raise MigrationFailed("the target speaks of an epoch that it was not sent: are both of one release?")

    # -- the end --------------------------------------------------------------------------------------------------

    async def _hand_over(self) -> None:
        """The target was told to take over, and asked: it gets the guest as it is, nothing is lost."""
        domain, sender = self.domain, self._sender
        assert sender is not None
        async with domain.lock:
            self._check_there()
            self._host.write(self.move, Phase.SWITCHING)
            steps = Steps()
            epoch, pages = await self._take(steps, last=True)
            domain.record.state = DomainState.PAUSED
            domain.record.detail = f"on its way to {self.move.peer or 'another host'} (migration {self.move.ident})"
            await self._send(epoch, pages)
            await sender.blob(LAST, b"")
            steps.done("sent")
            await self._leave(steps)

    async def _give_up(self, why: ToolstackError) -> None:
        self._giving_up = True
        if self._talk is not None and not self._has_moved():
            last = await self._words().last(why, 1.0 if isinstance(why, MigrationFailed) else MOMENT)
            why = last if isinstance(why, MigrationFailed) or isinstance(last, TakenOver) else why
        if not isinstance(why, TakenOver):
            await super()._give_up(why)
            return
        async with self.domain.lock:
            await self._stay_paused(why)

    async def _stay_paused(self, why: TakenOver) -> None:
        domain, move = self.domain, self.move
        process: ProcessHold | None = domain.process
        if process is not None and process.alive and not domain.record.ended:
            await process.request("pause")
        if self._output is not None and domain.devices is not None:
            await self._output.go_on()
            try:
                await domain.devices.quiesce()
            except ToolstackError as exc:  # what it sends is kept back still
                LOG.error("migration %s: %s", move.ident, exc)
            await self._output.discard()
        detail = f"paused, {why}: {move.commands()}"
        domain.record.state, domain.record.detail = DomainState.PAUSED, detail
        self._host.life.records.save(domain.record)
        move.error = why.to_json()
        self._host.write(move, Phase.UNRESOLVED, detail)

    async def keep(self, why: ToolstackError) -> None:
        if self._output is not None:
            await self._output.go_on()
        await super().keep(why)
        if self._output is not None and self.move.phase is Phase.KEPT:
            await self._output.let_out()

    def _held_back(self) -> OutputCommit:
        if self._output is None:
            assert self.domain.devices is not None
            self._output = OutputCommit(self.domain.devices.all())
        return self._output

    async def _close(self) -> None:
        self.domain.console.unhold()
        await super()._close()


def _close(gathered: asyncio.Task[Batch]) -> None:
    if not gathered.cancelled() and gathered.exception() is None:
        gathered.result().close()
