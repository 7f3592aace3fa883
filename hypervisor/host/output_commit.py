"""The devices of a domain that is kept on a second host too: still while an epoch is taken, seen when it is whole.

See `hypervisor.devices.driver.Committing`. What is kept back is given away by nothing but `release` and `let_out`: not
when a driver dies, nor when this process does.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from hypervisor.errors import ToolstackError
from hypervisor.host.device import Device
from hypervisor.host.device_memory import DeviceMemory
from hypervisor.host.device_specs import key_of
from hypervisor.host.drivers import Counters, parse_counters
from hypervisor.host.together import all_of
from hypervisor.toolstack.devices import DeviceState

LOG = logging.getLogger(__name__)


class OutputCommit:
    """:param devices: none of them is attached or detached meanwhile."""

    def __init__(self, devices: Sequence[Device]) -> None:
        self._devices = devices
        self._drivers = {device.kind: device.driver for device in devices}
        self._steady: list[Device] = []
        self._counted: dict[str, Counters] = {}

    async def hold(self) -> None:
        """From now on what the guest sends is kept back. :raises HostUnavailable: a driver does not answer."""
        for driver in self._drivers.values():
            driver.holding = True
        await self._tell("hold")

    # -- an epoch -------------------------------------------------------------------------------------------------

    async def steady(self) -> None:
        """Have no device connected or disconnected until `go_on`. Waits for those that are."""
        for device in self._devices:
            await device.looking.acquire()
            self._steady.append(device)

    async def boundary(self, epoch: int, *, still: bool = True) -> None:
        """What was sent until now belongs to `epoch`. :param still: drivers serve nothing until `go_on`.

        :raises HostUnavailable: a driver does not answer.
        """

        answers = await self._tell("boundary", epoch=epoch, still=still)
        self._counted = {kind: parse_counters(said.get("stats")) for kind, said in answers.items()}

    def told(self) -> dict[str, Any]:
        """What `DomainRecord.devices` is to be on a host that goes on from this epoch."""
        return {key_of(device.spec): self._told(device) for device in self._devices}

    def _told(self, device: Device) -> dict[str, Any]:
        memory = DeviceMemory.from_json(device.memory.to_json())
        if device.state is DeviceState.CONNECTED:
            memory.count(self._counted.get(device.kind, {}).get(device.devid, {}))
        carried = device.opened.leave() if device.opened is not None else memory.carried or {}
        return {**memory.to_json(), "carried": carried}

    async def go_on(self) -> None:
        """Harmless when repeated, and without `steady` or `boundary`."""
        try:
            await self._tell("go_on")
        except ToolstackError as exc:  # it goes on when it gets there
            LOG.warning("%s", exc)
        finally:
            steady, self._steady = self._steady, []
            for device in steady:
                device.looking.release()

    async def release(self, epoch: int) -> None:
        """It is whole on the other host. :raises HostUnavailable: a driver does not answer."""
        await self._tell("release", epoch=epoch)

    # -- the end --------------------------------------------------------------------------------------------------

    async def let_out(self) -> None:
        """The guest runs on here, without a standby."""
        for driver in self._drivers.values():
            driver.holding = False
        await self._quietly("let_out")

    async def discard(self) -> None:
        """It runs elsewhere, from the last whole epoch."""
        await self._quietly("discard")

    async def _quietly(self, op: str) -> None:
        try:
            await self._tell(op)
        except ToolstackError as exc:
            LOG.error("%s of what is kept back: %s", op, exc)

    async def _tell(self, op: str, **fields: Any) -> dict[str, dict[str, Any]]:
        """Answers by kind."""
        answers = await all_of(driver.commit(op, **fields) for driver in self._drivers.values())
        return dict(zip(self._drivers, answers, strict=True))
