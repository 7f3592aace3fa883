"""What goes over while the guest stands still. Whatever can be done side by side, is."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
from typing import Any

from hypervisor.host.migration.belongings import Belongings
from hypervisor.host.migration.clock import Steps
from hypervisor.host.migration.disks import OutgoingDisks
from hypervisor.host.migration.words import HOST, NODES, PRINTED, PRINTED_BYTES, STATE
from hypervisor.host.mover import PagesSent, Sender
from hypervisor.host.process import ProcessHold
from hypervisor.host.table import Domain
from hypervisor.xenstore import moving
from hypervisor.xenstore.server import Server

STATE_TIMEOUT = 30.0
"""Seconds for the domain process to do its part."""


async def send_ahead(server: Server, domain: Domain, sender: Sender, given: moving.Given) -> int:
    """What the target may know while the guest still runs. :returns: for `Rest.printed`."""
    printed = domain.console.printed
    await sender.blob(PRINTED, domain.console.tail(PRINTED_BYTES))
    nodes = moving.give_nodes(server, domain.record.domid, domain.uuid, given)
    await sender.blob(NODES, json.dumps(nodes).encode())
    return printed


@dataclasses.dataclass(slots=True)
class Rest:
    """:ivar server: xenstored, which has let go of the domain's ring.

    :ivar domain: its vCPUs stand still, its devices are quiescent. :ivar bitmap: where it says what was written.
    :ivar given: what the target knows of its nodes.
    :ivar printed: mark of `ConsoleHub.printed` up to which the target has the console's log.
    """

    server: Server
    domain: Domain
    process: ProcessHold
    sender: Sender
    disks: OutgoingDisks
    bitmap: int
    printed: int
    given: moving.Given

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
            pages = asyncio.ensure_future(self.sender.pages(self.bitmap, last=True))
            try:
                await asyncio.sleep(0)  # they are on their way
                devices = await packed
                steps.done("disks")
                store = moving.give(self.server, domain.record.domid, domain.uuid, self.given)
                printed = domain.console.since(self.printed, PRINTED_BYTES)
                belongings = Belongings.of(domain.record, store, printed, devices).pack()
                steps.done("xenstore")
                await export
                steps.done("state")
            finally:
                await asyncio.gather(pages, return_exceptions=True)
            sent = await pages
            steps.done("pages")
        finally:
            await asyncio.gather(frozen, export, packed, return_exceptions=True)
        await asyncio.gather(self.sender.blob(HOST, belongings), self.sender.blob(STATE, state))
        steps.done("sent")
        return sent
