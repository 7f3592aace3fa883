"""A device between a front end that does what it likes and drivers that die."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hypervisor.devices.driver import DeviceBroken, Opened
from hypervisor.devices.xenbus import DevicePaths, XenbusDevice, XenbusState
from hypervisor.errors import HostUnavailable, ImageInvalid
from hypervisor.host import device as module
from hypervisor.host import finishing
from hypervisor.host.device import Device
from hypervisor.host.device_memory import DeviceMemory
from hypervisor.host.drivers import numbers
from hypervisor.toolstack.devices import DeviceState, DiskSpec
from hypervisor.xenstore.handle import Handle
from hypervisor.xenstore.server import Server

SPEC = DiskSpec("xvda", "/images/a")
PATHS = DevicePaths(7, "vbd", SPEC.devid)


class FakeHold:
    """A `DriverHold` whose processes live in this one. :ivar nonsense: what it should not have been told."""

    def __init__(self) -> None:
        self.order = SimpleNamespace(uuid="u", kind="disk")
        self.generation = 0
        self.pid: int | None = None
        self.served: dict[int, Any] = {}
        self.log: list[str] = []
        self.broken: str = ""
        self.refuses_to_start = 0
        self.nonsense: list[str] = []
        self.left: list[dict[str, int]] = []  # what a front end that has closed still brings, the first last

    async def counters(self, devid: int) -> dict[str, int]:
        answer = await self.request("stats", {}, timeout=1.0)
        return numbers(answer["stats"].get(str(devid)))

    async def finish(self, devid: int) -> dict[str, int] | None:
        await self.request("finish", {"devid": devid})
        return self.left.pop() if self.left else {}

    async def ensure(self) -> int:
        await asyncio.sleep(0)
        if self.refuses_to_start:
            self.refuses_to_start -= 1
            raise HostUnavailable("not now")
        if self.pid is None:
            self.generation += 1
            self.pid = self.generation + 100
        return self.generation

    async def request(
        self, op: str, fields: dict[str, Any], fds: Sequence[int] = (), timeout: float = 0
    ) -> dict[str, Any]:
        await asyncio.sleep(0)
        if self.pid is None:
            raise HostUnavailable("gone")
        if op == "stats":
            return {"stats": {str(devid): {"read_requests": 2, "odd": "text"} for devid in self.served}}
        devid = fields["devid"]
        self.log.append(op)
        if op == "connect":
            if devid in self.served:
                self.nonsense.append("connected twice")
            if self.broken:
                return {"broken": self.broken}
            self.served[devid] = fields["config"]
        elif op == "finish":
            assert devid in self.served
        elif op == "disconnect":
            if self.served.pop(devid, None) is None:
                self.nonsense.append("disconnected and not connected")
            return {"stats": {"read_requests": 2}}
        else:
            self.served[devid]["device"] = fields["device"]
        return {}

    def die(self) -> None:
        self.pid = None
        self.served.clear()


class FakeBackend:
    kind, type, driver = "disk", "vbd", ""

    def __init__(self) -> None:
        self.open_count = 0
        self.fails = 0

    async def open(self, domain: str, domid: int, spec: Any) -> Opened:
        if self.fails:
            self.fails -= 1
            raise ImageInvalid("not there")
        self.open_count += 1

        def close() -> None:
            self.open_count -= 1

        return Opened({"size": 1}, {"feature-flush-cache": "1"}, {"sectors": "8"}, {}, lambda: [], close, 4096)

    def frontend(self, read: Callable[[str], str | None]) -> dict[str, Any]:
        ring = read("ring-ref")
        if ring is None or not ring.isdigit():
            raise DeviceBroken(f"ring-ref is {ring!r}")
        return {"ring": int(ring)}

    async def resize(self, opened: Opened, spec: Any, size_bytes: int) -> dict[str, str]:
        raise NotImplementedError


class World:
    def __init__(self, memory: DeviceMemory | None = None, handle: Handle | None = None) -> None:
        self.handle = handle or Handle(Server(), asyncio.get_running_loop().call_soon)
        self.hold, self.backend = FakeHold(), FakeBackend()
        self.bus = XenbusDevice(self.handle, PATHS)
        self.left: list[Device] = []
        self.saved = 0
        hold: Any = self.hold
        self.device = Device(SPEC, self.backend, self.bus, hold, save=self._save, gone=self.left.append, memory=memory)

    def _save(self) -> None:
        self.saved += 1

    async def begin(self) -> World:
        self.device.opened = await self.backend.open("u", 7, SPEC)
        self.device.begin()
        await self.settle()
        return self

    async def settle(self) -> None:
        for _ in range(60):
            await asyncio.sleep(0)

    def front(self, state: object, ring: str | None = None) -> None:
        if ring is not None:
            self.handle.write(f"{PATHS.frontend}/ring-ref", ring)
        self.handle.write(f"{PATHS.frontend}/state", str(state))

    def die(self) -> None:
        self.hold.die()
        self.device.driver_died({"read_requests": 5})

    @property
    def back(self) -> XenbusState:
        return self.bus.state()


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LOOKS_AT_ONCE", 1e9)
    monkeypatch.setattr(module, "RETRY_AFTER", 0.0)
    monkeypatch.setattr(finishing, "PAUSE", 0.0)


def in_loop(test: Callable[[], Awaitable[None]]) -> None:
    async def whole() -> None:
        await test()

    asyncio.run(whole())


def test_the_way_up_and_down() -> None:
    async def test() -> None:
        world = await World().begin()
        assert world.back is XenbusState.INIT_WAIT and world.device.state is DeviceState.CONNECTING
        assert world.handle.read(f"{PATHS.backend}/feature-flush-cache") == "1"
        world.front(3, "9")
        await world.settle()
        assert world.back is XenbusState.CONNECTED and world.device.state is DeviceState.CONNECTED
        assert world.handle.read(f"{PATHS.backend}/sectors") == "8"
        assert world.hold.served[SPEC.devid] == {"frontend": {"ring": 9}, "device": {"size": 1}}
        assert world.device.memory.front == {"ring": 9} and world.saved
        world.front(5)
        await world.settle()
        assert world.back is XenbusState.CLOSING
        world.front(6)
        await world.settle()
        assert world.back is XenbusState.CLOSED and world.device.state is DeviceState.CLOSED
        assert world.hold.log == ["connect", "disconnect"]
        info = await world.device.info()
        assert info.stats == {"read_requests": 2, "restarts": 0}
        await world.device.end()
        assert world.backend.open_count == 0

    in_loop(test)


def test_what_goes_wrong_for_a_time_is_tried_again() -> None:
    async def test() -> None:
        world = await World().begin()
        world.hold.refuses_to_start = 3
        world.front(3, "9")
        await world.settle()
        assert world.device.state is DeviceState.CONNECTED
        world.die()
        await world.settle()
        assert world.device.state is DeviceState.CONNECTED
        info = await world.device.info()
        assert info.stats == {"read_requests": 7, "restarts": 1} and info.detail == ""
        await world.device.end()

    in_loop(test)


def test_a_new_host_process_goes_on_where_the_old_one_was() -> None:
    async def test() -> None:
        old = await World().begin()
        old.front(3, "9")
        await old.settle()
        await old.device.let_go()
        saved = DeviceMemory.from_json(old.device.memory.to_json())
        assert saved == old.device.memory
        new = World(saved, old.handle)
        new.handle.write(f"{PATHS.frontend}/ring-ref", "77")  # what the driver was told counts
        new.device.driver_died({"read_requests": 4})
        new.device.begin()  # its image could not be opened yet
        new.backend.fails = 2
        await new.settle()
        assert new.hold.served[SPEC.devid]["frontend"] == {"ring": 9}
        assert new.device.state is DeviceState.CONNECTED and new.back is XenbusState.CONNECTED
        assert (await new.device.info()).stats == {"read_requests": 6, "restarts": 1}
        await new.device.end()

    in_loop(test)


def test_a_broken_one_stays_closed_until_it_begins_anew() -> None:
    async def test() -> None:
        world = await World().begin()
        world.front(3, "rubbish")
        await world.settle()
        assert world.device.state is DeviceState.FAILED and world.back is XenbusState.CLOSING
        assert "rubbish" in (world.handle.read(f"{PATHS.error}/error") or "")
        for state in (3, 4, 3):
            world.front(state, "9")
            await world.settle()
        assert world.hold.log == []
        world.front(6)
        await world.settle()
        world.front(1)
        await world.settle()
        world.front(4, "9")
        await world.settle()
        assert world.device.state is DeviceState.CONNECTED
        world.device.report("broken", "gone \x1b[2J mad")
        await world.settle()
        assert world.device.memory.broken == "gone ?[2J mad" and world.hold.served == {}
        await world.device.end()

    in_loop(test)


def test_what_a_closed_front_end_still_brings_is_served() -> None:
    """Also when the driver dies meanwhile."""

    async def test() -> None:
        world = await World().begin()
        world.front(3, "9")
        await world.settle()
        world.hold.left = [{"reads": 3}, {"reads": 2}, {"reads": 1}]
        world.device.leave()
        world.front(6)
        for _ in range(8):
            await asyncio.sleep(0)
        assert not world.left and world.hold.log.count("finish") >= 1
        world.die()
        await world.settle()
        assert world.left and not world.hold.left
        assert world.hold.log[-finishing.QUIET_ROUNDS :] == ["finish"] * (finishing.QUIET_ROUNDS - 1) + ["disconnect"]
        assert world.hold.log.count("connect") == 2 and world.hold.nonsense == []

    in_loop(test)


def test_a_bug_of_ours_is_survived() -> None:
    """Or the guest's disk would stand still for ever, as nothing wakes the device again."""

    async def test() -> None:
        world = await World().begin()
        right, bugs = world.backend.frontend, [ZeroDivisionError()]

        def frontend(read: Callable[[str], str | None]) -> dict[str, Any]:
            if bugs:
                raise bugs.pop()
            return right(read)

        world.backend.frontend = frontend  # type: ignore[method-assign]
        world.front(3, "9")
        await world.settle()
        assert world.device.state is DeviceState.CONNECTED
        await world.device.end()

    in_loop(test)


def test_leaving() -> None:
    async def test() -> None:
        world = await World().begin()
        world.front(3, "9")
        await world.settle()
        world.device.leave()
        await world.settle()
        assert world.back is XenbusState.CLOSING and not world.bus.is_online() and not world.left
        world.die()
        await world.settle()
        assert world.hold.served, "as long as the guest holds it, it is served"
        assert world.device.state is DeviceState.CLOSING
        world.front(6)
        await world.settle()
        assert world.left == [world.device] and world.device.closed.is_set()
        assert not world.bus.is_laid_out() and world.backend.open_count == 0

        forced = await World().begin()
        forced.front(3, "9")
        await forced.settle()
        forced.device.force()
        await forced.settle()
        assert forced.left and forced.hold.log == ["connect", "disconnect"] and not forced.bus.is_laid_out()

    in_loop(test)


def test_an_ended_guest_is_not_served() -> None:
    async def test() -> None:
        world = await World().begin()
        world.front(3, "9")
        await world.settle()
        world.device.guest_ended()
        await world.settle()
        assert world.hold.served == {} and world.device.state is DeviceState.CLOSED
        world.front(3, "9")
        await world.settle()
        assert world.hold.served == {}
        await world.device.end()

    in_loop(test)


STATES = st.sampled_from(["0", "1", "2", "3", "4", "5", "6", "7", "8", "", "-4", "44", "\x04", "x" * 99])
EVENTS = st.one_of(
    st.tuples(st.just("front"), STATES, st.sampled_from([None, "9", "10", "rubbish"])),
    st.tuples(st.sampled_from(["die", "remove", "settle", "broken", "mend", "report", "no-start"])),
)


@settings(max_examples=150, deadline=None)
@example([("front", "3", "9"), ("settle",), ("report",)])
@given(st.lists(EVENTS, max_size=25))
def test_whatever_happened_a_well_behaved_front_end_gets_its_disk(events: list[tuple[Any, ...]]) -> None:
    async def test() -> None:
        world = await World().begin()
        for event in events:
            match event:
                case ("front", state, ring):
                    world.front(state, ring)
                case ("die",):
                    world.die()
                case ("remove",):
                    world.handle.remove(PATHS.frontend)
                case ("broken",):
                    world.hold.broken = "no"
                case ("mend",):
                    world.hold.broken = ""
                case ("report",):
                    world.device.report("broken", "gone mad")
                case ("no-start",):
                    world.hold.refuses_to_start = 2
                case _:
                    await world.settle()
        world.hold.broken = ""
        for state, expected in ((6, XenbusState.CLOSED), (1, XenbusState.INIT_WAIT), (3, XenbusState.CONNECTED)):
            world.front(state, "9")
            await world.settle()
            assert world.back is expected, (state, world.back)
        assert world.device.state is DeviceState.CONNECTED
        assert world.hold.served[SPEC.devid]["frontend"] == {"ring": 9}
        assert world.hold.nonsense == []
        await world.device.end()
        assert world.backend.open_count == 0

    in_loop(test)
