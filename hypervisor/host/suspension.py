"""What becomes of guests that have suspended themselves."""

from __future__ import annotations

import time
from collections.abc import Awaitable

from hypervisor.host.records import RecordStore
from hypervisor.host.table import Domain
from hypervisor.toolstack.api import OnEvent


class Suspension:
    """A part of `hypervisor.host.lifecycle.Lifecycle`."""

    __slots__ = ()
    records: RecordStore

    def spawn(self, work: Awaitable[object]) -> None:
        """Do it in the background."""
        raise NotImplementedError

    async def after_end(self, domain: Domain, action: OnEvent) -> None:
        """Its guest has ended: do with it what its spec says."""
        raise NotImplementedError

    def suspended(self, domain: Domain) -> None:
        """It was asked to. If nobody waits for it any more it goes on; unless that is because the host process ended
        when the guest was in its file already.
        """
        waiter = domain.suspension
        if waiter is not None and not waiter.done():
            waiter.set_result(None)
        elif domain.record.is_saved():
            self.saved(domain)
        else:
            self.spawn(self.resume(domain))

    def saved(self, domain: Domain) -> None:
        """Its image is whole, and it is to go."""
        domain.dying = True
        self.spawn(self.after_end(domain, OnEvent.DESTROY))

    async def resume(self, domain: Domain) -> float:
        """Let a guest that suspended itself go on where it is. :returns: when it did, by the monotonic clock."""
        process, record = domain.process, domain.record
        if process is not None and process.alive:
            await process.request("resume")
        went_on = time.monotonic()
        if domain.attachment is not None:
            domain.attachment.withdraw_shutdown()
        record.suspending, record.saved_as = False, []
        self.records.save(record)
        return went_on
