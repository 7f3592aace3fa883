"""The second copy of a domain that runs elsewhere: its last whole epoch, and what becomes of it.

The memory is in its domain process, where the mover writes an epoch's pages once all of them have arrived; the rest of
the state waits here. When the source falls silent all that becomes a complete half as any migration's: paused, written
down, and `migration_resolve` or `migration_takeover` decides.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import logging
import time

from hypervisor.errors import MigrationFailed, ToolstackError, WrongState
from hypervisor.host.disk_mirror import KIND
from hypervisor.host.migration.belongings import Belongings
from hypervisor.host.migration.target import Incoming
from hypervisor.host.migration.words import (
    ACKNOWLEDGED,
    AGE,
    COMPLETE,
    HOST,
    LAST,
    LAST_WORDS,
    STATE,
    TAKEN,
    TAKEOVER,
)
from hypervisor.host.mover import CLOSED, EPOCH, Receiver
from hypervisor.host.process import describe_exit
from hypervisor.toolstack.api import MigrationPhase
from hypervisor.toolstack.migration import WAIT_SECONDS
from hypervisor.waiting import within
from hypervisor.xenstore import moving
from hypervisor.xenstore.errors import XenstoreError

LOG = logging.getLogger(__name__)

Phase = MigrationPhase
TAKEOVER_TIMEOUT = 30.0
"""Seconds for the source to hand the domain over when it was asked to."""
_LONG = 1e6
_KEPT_FOR_LATER = (HOST, STATE, AGE)


@dataclasses.dataclass(slots=True)
class Epoch:
    """:ivar said: without the xenstore nodes, which are in xenstore already. :ivar taken: `time.monotonic`, about when
    the guest was so.
    """

    said: Belongings
    state: bytes
    taken: float


class StandbyTarget(Incoming):
    """As `Incoming`; see above."""

    _epoch: Epoch | None = None

    async def takeover(self, *, force: bool) -> None:
        """In phase STANDBY. :raises ToolstackError: it does not run here."""
        receiver, task = self._receiver, self._task
        if receiver is None or task is None or task.done():
            raise WrongState(f"migration {self.move.ident} ends just now: look at its status, and try again")
        if not force:
            await self._ask(receiver, task)
            return
        with contextlib.suppress(ToolstackError, TimeoutError):
            await within(receiver.blob(TAKEN, b""), LAST_WORDS)
            # A source that hears it stops its guest, then hangs up.
            await asyncio.wait([task], timeout=LAST_WORDS)
        await receiver.close()
        await asyncio.wait([task])
        if self.move.phase is not Phase.COMPLETE:
            raise WrongState(f"migration {self.move.ident} is {self.move.phase} here: there is nothing to run")
        await self.go()

    async def _ask(self, receiver: Receiver, task: asyncio.Task[None]) -> None:
        with contextlib.suppress(TimeoutError):
            await within(receiver.blob(TAKEOVER, b""), LAST_WORDS)
            await asyncio.wait([task], timeout=TAKEOVER_TIMEOUT)
        if self.move.phase is not Phase.RUNNING:
            raise WrongState(
                f"the source does not hand domain {self.move.uuid} over (migration {self.move.ident} is "
                f"{self.move.phase} here): if it is known not to run there, take it over by force"
            )

    def _process_gone(self, code: int | None) -> None:
        super()._process_gone(code)
        if self.move.phase is Phase.STANDBY and self._task is not None:
            self._why = MigrationFailed(f"the domain process on the target ended: {describe_exit(code)}: see its log")
            self._task.cancel()

    # -- the conversation -----------------------------------------------------------------------------------------

    async def _receive(self) -> None:
        receiver = self._receiver
        assert receiver is not None
        await receiver.connected(WAIT_SECONDS)
        waiting: dict[str, bytes] = {}
        while True:
            kind, data = await receiver.receive(_LONG)
            if kind == CLOSED:
                await self._alone(receiver)
                return
            if kind == EPOCH:
                await self._whole(receiver, waiting, data)
                waiting = {}
            elif kind == KIND and self.move.phase is Phase.STANDBY and self._disks is not None:
                self._disks.heard(data)
            elif kind in _KEPT_FOR_LATER and self.move.phase in (Phase.RECEIVING, Phase.STANDBY):
                waiting[kind] = data
            elif kind == LAST and self._epoch is not None and self.move.phase is Phase.STANDBY:
                took = await self._complete(self._epoch.state, self._epoch.said)
                await receiver.blob(COMPLETE, json.dumps(took).encode())
            elif await self._heard(receiver, kind, data):
                await self.hang_up()
                return

    async def _whole(self, receiver: Receiver, waiting: dict[str, bytes], number: bytes) -> None:
        """The memory is that of a new epoch. What cannot be taken now could not be later: the standby ends."""
        try:
            said, state = Belongings.unpack(waiting[HOST]), waiting[STATE]
            age = float(json.loads(waiting[AGE])["ms"])
        except (KeyError, ValueError, TypeError, RecursionError) as exc:
            raise MigrationFailed(f"the source sent an epoch that is not whole ({exc!r})") from exc
        record = self.domain.record
        self._check_same(record, said)
        if self._disks is not None:
            await self._disks.apply()
        try:
            store = moving.take_changes(self._host.backends.server, record.domid, record.spec.uuid, dict(said.store))
        except XenstoreError as exc:
            raise MigrationFailed(str(exc)) from exc
        if said.printed:
            self.domain.console.add(said.printed)
        said = dataclasses.replace(said, store=store, printed=b"")
        self._epoch = Epoch(said, state, time.monotonic() - min(max(0.0, age), 1e6) / 1000)
        self.move.epochs += 1
        if self.move.phase is not Phase.STANDBY:
            self._host.write(self.move, Phase.STANDBY)
        with contextlib.suppress(ToolstackError):  # the next that is heard is the connection's end
            await receiver.blob(ACKNOWLEDGED, number)

    async def _alone(self, receiver: Receiver) -> None:
        """The connection has ended. :raises ToolstackError: nothing whole is here."""
        if self.move.phase is Phase.COMPLETE:
            LOG.error("migration %s: %s", self.move.ident, self.move.detail)
        elif self.move.phase is not Phase.STANDBY or self._epoch is None:
            raise receiver.error or MigrationFailed(f"the source ended the connection ({receiver.why})")
        elif receiver.torn:
            raise MigrationFailed("the target's mover was killed while it wrote an epoch: begin anew")
        else:
            await self._be_complete(self._epoch, receiver.why)
        await self.hang_up()

    async def _be_complete(self, epoch: Epoch, why: str) -> None:
        move, record = self.move, self.domain.record
        move.lost_ms = round((time.monotonic() - epoch.taken) * 1000, 1)
        await self._complete(epoch.state, epoch.said)
        detail = (
            f"paused at epoch {move.epochs}, at most {move.lost_ms / 1000:.1f} s of its run are lost: the source is "
            f"silent ({why or 'it was left'}); know that it runs there no more, then {move.commands()}"
        )
        record.detail = detail
        self._host.life.records.save(record)
        self._host.write(move, Phase.COMPLETE, detail)
        LOG.warning("migration %s of domain %s: %s", move.ident, move.uuid, detail)
