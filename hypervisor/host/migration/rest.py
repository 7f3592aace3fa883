"""What goes over while the guest stands still. Whatever can be done side by side, is."""

from __future__ import annotations

import asyncio
import dataclasses
import os
from typing import Any

from hypervisor.host.migration.belongings import Belongings
from hypervisor.host.migration.clock import Steps
from hypervisor.host.migration.disks import OutgoingDisks
from hypervisor.host.migration.words import HOST, PRINTED_BYTES, STATE
from hypervisor.host.mover import PagesSent, Sender
from hypervisor.host.process import ProcessHold
from hypervisor.host.table import Domain
from hypervisor.xenstore import moving
from hypervisor.xenstore.server import Server

STATE_TIMEOUT = 30.0
"""Seconds for the domain process to do its part."""


@dataclasses.dataclass(slots=True)
class Rest:
    """:ivar server: xenstored, which has let go of the domain's ring.

    :ivar domain: its vCPUs stand still, its devices are quiescent. :ivar bitmap: where it says what was written.
    :ivar printed: mark of `ConsoleHub.printed` up to which the target has the console's log.
    """

    server: Server
    domain: Domain
    process: ProcessHold
    sender: Sender
    disks: OutgoingDisks
    bitmap: int
    printed: int

    async def send(self, steps: Steps) -> PagesSent:
        """:raises ToolstackError: not all of it has gone over."""
        state = os.memfd_create("reeve-state", os.MFD_CLOEXEC)
        try:
            return await self._send(state, steps)
        finally:
            os.close(state)

    async def _pack(self) -> dict[str, Any]:
        """The disks' last blocks go beside the pages."""
        assert self.domain.devices is not None
        await self.disks.last()
        return await self.domain.devices.pack(self.disks.copied)

    async def _send(self, state: int, steps: Steps) -> PagesSent:
        domain, process = self.domain, self.process
        assert domain.devices is not None
        # Asked one after the other without waiting: the domain process does them in this order.
        frozen = asyncio.ensure_future(process.request("migration_freeze", STATE_TIMEOUT, {"on": True, "dirty": True}))
        export = asyncio.ensure_future(process.request("migration_export", STATE_TIMEOUT, {}, [state]))
        packed = asyncio.ensure_future(self._pack())
        try:
            await frozen
            steps.done("freeze")
            sent = await self.sender.pages(self.bitmap, last=True)
            steps.done("pages")
            await export
            steps.done("state")
            devices = await packed
            steps.done("disks")
        finally:
            await asyncio.gather(frozen, export, packed, return_exceptions=True)
        store = moving.give(self.server, domain.record.domid, domain.uuid)
        printed = domain.console.since(self.printed, PRINTED_BYTES)
        await self.sender.blob(HOST, Belongings.of(domain.record, store, printed, devices).pack())
        await self.sender.blob(STATE, state)
        steps.done("sent")
        return sent
