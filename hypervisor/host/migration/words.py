"""What two host processes say to each other over their movers, besides pages.

=============  ===========================================================================================
source says    with
=============  ===========================================================================================
``printed``    the end of the console's log, while the guest still runs
``nodes``      what xenstore has of it (`hypervisor.xenstore.moving`), likewise
``early``      part of the machine's state, likewise
``host``       `hypervisor.host.migration.belongings`
``state``      the machine's state: now all is there
``go``         nothing: it has left the source
``kept``       nothing: it has not, and will not
``disk``       `hypervisor.devices.block.mirror.wire`, to be answered likewise
``age``        of a standby, JSON: how old (``ms``) the state of the epoch is that was sent before it
``last``       of a standby: the guest stays as it was in the last epoch, be complete
=============  ===========================================================================================

The target says ``ready`` (to ``early``), ``complete`` (to ``state``), ``running`` (to ``go``), each with milliseconds
by step as JSON, and ``failed`` with the JSON of a `ToolstackError` when it gives up. Of a standby it says ``epoch``
with the number of one that is whole, ``takeover`` when it wants to run the domain, and ``taken`` when it is about to
without having been given it.
"""

from __future__ import annotations

import contextlib
import json
from typing import Any

from hypervisor.errors import HostUnavailable, MigrationFailed, MigrationUnresolved, ToolstackError, from_json
from hypervisor.host.migration.disks import Talk
from hypervisor.host.mover import CLOSED

PRINTED, NODES, EARLY, HOST, STATE, GO, KEPT = "printed", "nodes", "early", "host", "state", "go", "kept"
AGE, LAST = "age", "last"
READY, COMPLETE, RUNNING, FAILED = "ready", "complete", "running", "failed"
ACKNOWLEDGED, TAKEOVER, TAKEN = "epoch", "takeover", "taken"

PRINTED_BYTES = 1 << 20
"""Of the console's log that goes along."""
LAST_WORDS = 5.0
"""Seconds for a word that is said when all is decided already."""
MOMENT = 0.001
"""Seconds for a word that lies there already."""


class TakenOver(MigrationUnresolved):
    """The target runs the domain without having been given it."""


class Words:
    """The source's ear."""

    def __init__(self, talk: Talk) -> None:
        self._talk = talk

    async def hear(self) -> None:
        """Nothing should have been said by now. :raises ToolstackError: the target has given up, or is gone."""
        with contextlib.suppress(TimeoutError):
            self._check(*await self._talk.receive(MOMENT))

    async def answer(self, kind: str, timeout: float) -> dict[str, Any]:
        """:raises ToolstackError: the target has given up, is gone, or does not answer."""
        try:
            said, content = await self._talk.receive(timeout)
        except TimeoutError:
            raise HostUnavailable(f"the target did not answer within {timeout:g} s: try again") from None
        self._check(said, content, kind)
        try:
            data = json.loads(content or b"{}")
        except ValueError:
            data = {}
        return data if isinstance(data, dict) else {}

    async def last(self, why: ToolstackError, timeout: float = 1.0) -> ToolstackError:
        """What the target said when it gave up or took over, if that is what ended the connection."""
        with contextlib.suppress(TimeoutError):
            while True:
                said, content = await self._talk.receive(timeout)
                if said == CLOSED:
                    break
                try:
                    self._check(said, content)
                except ToolstackError as exc:
                    if said in (FAILED, TAKEN):
                        return exc
        return why

    async def among(self, kinds: tuple[str, ...], timeout: float) -> tuple[str, bytes]:
        """One of several words. :raises TimeoutError. :raises ToolstackError: as `answer`."""
        said, content = await self._talk.receive(timeout)
        self._check(said, content, said if said in kinds else "")
        return said, content

    def _check(self, said: str, content: bytes, expected: str = "") -> None:
        if said == TAKEN:
            raise TakenOver("the target runs the domain's last epoch, it was told that this host is dead")
        if said == FAILED:
            raise _failure(content)
        if said == CLOSED:
            if self._talk.error is not None:
                raise self._talk.error
            raise MigrationFailed(f"the connection to the target was lost ({self._talk.why}): try again")
        if said != expected:
            raise MigrationFailed(f"the target said {said[:40]!r} out of place: are both hosts of one release?")


def _failure(content: bytes) -> ToolstackError:
    try:
        return from_json(json.loads(content))
    except (ValueError, KeyError, TypeError, AttributeError):
        return MigrationFailed("the target has given up, and does not say why: see its log")
