"""The nics of one guest, in its driver process: `hypervisor.devices.driver.Driver` for netif.

A guest's fault breaks its device and no other; so does an unexpected exception while one is served.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hypervisor.devices.driver import DeviceBroken, GuestLink, LinkClosed, Loop
from hypervisor.devices.net.outbox import Outbox
from hypervisor.devices.net.vif import Vif

LOG = logging.getLogger(__name__)

Report = Callable[[int, str, str], None]
MAX_PARTED = 16
"""Nics that are not served any more and of which something is kept back still."""


class NetDriver:
    """:param report: see `hypervisor.devices.driver.Driver`."""

    def __init__(self, link: GuestLink, loop: Loop, report: Report) -> None:
        self._link = link
        self._loop = loop
        self._report = report
        self._vifs: dict[int, Vif] = {}
        self._broken: set[int] = set()
        self._holding = False
        self._parted: list[Outbox] = []  # of nics that are not served any more

    def connect(self, devid: int, config: Mapping[str, Any], fds: Sequence[int]) -> None:
        """:param fds: as `hypervisor.devices.net.backend.NetBackend` gives them: socket, journal."""
        self._broken.discard(devid)
        guard = functools.partial(self._guard, devid)
        self._vifs[devid] = Vif(self._link, self._loop, config["frontend"], fds, guard, holding=self._holding)

    def update(self, devid: int, device: Mapping[str, Any]) -> None:
        """Limits are the switch's: nothing of the device matters here."""

    def disconnect(self, devid: int) -> None:
        vif = self._vifs.pop(devid, None)
        if vif is not None:
            vif.close()
            self._part(vif.outbox)

    def leave(self, devid: int) -> None:
        """The rings stay: what is in them is for the next driver, on another host."""
        vif = self._vifs.pop(devid, None)
        if vif is not None:
            vif.leave()
            self._part(vif.outbox)

    def stats(self) -> dict[int, dict[str, int]]:
        return {devid: vif.stats() for devid, vif in self._vifs.items()}

    # -- of a guest that is kept on a second host too (`hypervisor.devices.driver.Committing`)

    def hold(self) -> None:
        self._holding = True
        for outbox in self._outboxes():
            outbox.hold()

    def boundary(self, number: int) -> None:
        for outbox in self._outboxes():
            outbox.boundary(number)

    def release(self, number: int) -> None:
        for outbox in self._outboxes():
            outbox.release(number)

    def let_out(self) -> None:
        self._holding = False
        for outbox in self._outboxes():
            outbox.let_out()

    def discard(self) -> None:
        for outbox in self._outboxes():
            outbox.discard()

    def _outboxes(self) -> list[Outbox]:
        return [*self._parted, *(vif.outbox for vif in self._vifs.values())]

    def _part(self, outbox: Outbox) -> None:
        """Who is not served any more has said what it has said."""
        parted = self._parted = [*(other for other in self._parted if not other.closed), outbox]
        while len(parted) > MAX_PARTED:
            parted.pop(0).close()

    def _guard(self, devid: int, work: Callable[[], None]) -> Callable[[], None]:
        """`work` so that nothing it raises reaches the loop."""

        def guarded() -> None:
            if devid in self._broken:
                return
            try:
                work()
            except LinkClosed:
                self._give_up(devid)  # the process is about to be ended
            except DeviceBroken as exc:
                self._give_up(devid)
                self._report(devid, "broken", str(exc))
            except Exception as exc:
                LOG.exception("nic %d", devid)
                self._give_up(devid)
                self._report(devid, "broken", f"the driver failed ({type(exc).__name__}): see its log")

        return guarded

    def _give_up(self, devid: int) -> None:
        self._broken.add(devid)
        self.disconnect(devid)
