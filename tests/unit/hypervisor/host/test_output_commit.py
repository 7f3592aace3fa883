"""Devices of a guest with a standby: still while an epoch is taken, and what of them goes over."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from hypervisor.errors import HostUnavailable
from hypervisor.host.device_memory import DeviceMemory
from hypervisor.host.output_commit import OutputCommit
from hypervisor.toolstack.devices import DeviceState, NicSpec


class Driver:
    """A `hypervisor.host.drivers.DriverHold`. :ivar fails: the op that it does not answer."""

    def __init__(self) -> None:
        self.holding = False
        self.said: list[Any] = []
        self.fails = ""

    async def commit(self, op: str, **fields: Any) -> dict[str, Any]:
        await asyncio.sleep(0)
        if op == self.fails:
            raise HostUnavailable("it does not answer")
        self.said.append((op, *fields.values()))
        return {"stats": {"0": {"tx_packets": 5}, "1": {"tx_packets": 7}}} if op == "boundary" else {}


class Opened:
    def leave(self) -> dict[str, Any]:
        return {"journal": "abc"}


class Device:
    kind = "nic"

    def __init__(self, driver: Driver, number: int) -> None:
        self.driver = driver
        self.spec = NicSpec(number, f"00:16:3e:00:00:0{number}", "default")
        self.devid = number
        self.memory = DeviceMemory(front={"queues": []}, counted={"tx_packets": 1})
        self.opened: Opened | None = Opened()
        self.state = DeviceState.CONNECTED
        self.looking = asyncio.Lock()


class Rig:
    def __init__(self) -> None:
        self.driver = Driver()
        self.devices = [Device(self.driver, number) for number in range(2)]
        self.commit = OutputCommit(self.devices)  # type: ignore[arg-type]


def test_an_epoch() -> None:
    async def epoch() -> None:
        rig = Rig()
        await rig.commit.hold()
        assert rig.driver.holding
        await rig.commit.steady()
        assert all(device.looking.locked() for device in rig.devices)
        await rig.commit.boundary(4)
        rig.devices[1].state, rig.devices[1].opened = DeviceState.RECOVERING, None
        rig.devices[1].memory.carried = {"journal": "old"}
        told = rig.commit.told()
        assert told["nic/0"]["counted"] == {"tx_packets": 6} and told["nic/0"]["carried"] == {"journal": "abc"}
        assert told["nic/1"]["counted"] == {"tx_packets": 1} and told["nic/1"]["carried"] == {"journal": "old"}
        for memory in told.values():
            assert DeviceMemory.from_json(memory).front == {"queues": []}
        assert rig.devices[0].memory.counted == {"tx_packets": 1}, "it goes on here"
        for _ in range(2):
            await rig.commit.go_on()
        assert not any(device.looking.locked() for device in rig.devices)
        await rig.commit.release(4)
        assert rig.driver.said == [("hold",), ("boundary", 4, True), ("go_on",), ("go_on",), ("release", 4)]

    asyncio.run(epoch())


def test_a_step_that_a_device_takes_is_waited_for() -> None:
    async def waits() -> None:
        rig = Rig()
        async with rig.devices[1].looking:
            steady = asyncio.ensure_future(rig.commit.steady())
            await asyncio.sleep(0)
            assert not steady.done()
            steady.cancel()
            await asyncio.wait([steady])
        assert rig.devices[0].looking.locked()
        await rig.commit.go_on()
        assert not rig.devices[0].looking.locked()

    asyncio.run(waits())


def test_a_driver_that_does_not_answer() -> None:
    async def silent() -> None:
        rig = Rig()
        await rig.commit.steady()
        rig.driver.fails = "boundary"
        with pytest.raises(HostUnavailable):
            await rig.commit.boundary(1)
        rig.driver.fails = "go_on"
        await rig.commit.go_on()
        assert not any(device.looking.locked() for device in rig.devices)

    asyncio.run(silent())


@pytest.mark.parametrize("answers", [True, False])
def test_the_end(answers: bool) -> None:
    async def ends() -> None:
        for op, holds in (("let_out", False), ("discard", True)):
            rig = Rig()
            await rig.commit.hold()
            rig.driver.fails = "" if answers else op
            await (rig.commit.let_out() if op == "let_out" else rig.commit.discard())
            assert rig.driver.holding is holds, "and so does the next process"
            assert rig.driver.said == [("hold",), *([(op,)] if answers else [])]

    asyncio.run(ends())
