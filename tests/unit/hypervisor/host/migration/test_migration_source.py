"""The source's half of a migration, where no host is needed. The rest is in tests/integration/test_migration.py."""

from __future__ import annotations

import asyncio
import contextlib
import types
from typing import Any

from hypervisor.errors import MigrationCancelled, ToolstackError
from hypervisor.host.migration.move import Move
from hypervisor.host.migration.source import Outgoing
from hypervisor.toolstack.api import MigrationPhase, MigrationRole


class Deaf(Outgoing):
    """One whose wait ends well in the moment in which it is cancelled."""

    given_up: ToolstackError | None = None

    async def _move(self) -> None:
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.Event().wait()
        self._check_there()

    async def _give_up(self, why: ToolstackError) -> None:
        self.given_up = why


def test_a_cancellation_that_a_wait_has_swallowed_is_heard() -> None:
    async def cancelled() -> ToolstackError | None:
        domain: Any = types.SimpleNamespace(process=None)
        move = Move("m", "u", MigrationRole.SOURCE, MigrationPhase.COPYING, secret="")
        host: Any = None
        outgoing = Deaf(host, move, domain)
        outgoing.start()
        await asyncio.sleep(0)
        await outgoing.cancel(move.cancelled())
        return outgoing.given_up

    assert isinstance(asyncio.run(cancelled()), MigrationCancelled)
