"""Local disks in a migration: their part of the conversation, rounds, and what is left of a half that fails."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import sys
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[4] / "support"))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "devices" / "block"))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "devices" / "block" / "mirror"))

from mirror_rig import Guest, Rig

from hypervisor.errors import MigrationFailed, MigrationRefused, ToolstackError
from hypervisor.host.disk_mirror import KIND
from hypervisor.host.migration import disks as module
from hypervisor.host.migration.disks import ANSWERS, IncomingDisks, OutgoingDisks, Talk
from hypervisor.host.mover import CLOSED
from hypervisor.toolstack.api import DomainSpec, KernelBoot, MigrationOptions

MIB = 1 << 20
UUID = "3f2504e0-4f89-41d3-9a0c-0305e82c3301"


def run(work: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(asyncio.wait_for(work, 60))


class FakeMover:
    """One end of two. :ivar error, why: as a `Mover` tells them."""

    def __init__(self) -> None:
        self.other: FakeMover
        self.error: ToolstackError | None = None
        self.why = ""
        self.inbox: asyncio.Queue[tuple[str, bytes]] = asyncio.Queue()

    async def blob(self, kind: str, data: bytes | int) -> None:
        if isinstance(data, int):
            data = os.pread(data, os.fstat(data).st_size, 0)
        self.other.inbox.put_nowait((kind, data))

    async def receive(self, timeout: float) -> tuple[str, bytes]:
        return await asyncio.wait_for(self.inbox.get(), timeout)

    def cut(self, why: str = "") -> None:
        self.why = why
        self.inbox.put_nowait((CLOSED, b""))


def movers() -> tuple[FakeMover, FakeMover]:
    one, other = FakeMover(), FakeMover()
    one.other, other.other = other, one
    return one, other


def test_a_conversation_is_divided() -> None:
    async def work() -> None:
        near, far = movers()
        talk = Talk(near)  # type: ignore[arg-type]
        for kind, data in ((KIND, b"1"), ("ready", b"{}"), (KIND, b"2")):
            await far.blob(kind, data)
        assert await talk.receive(5) == ("ready", b"{}")
        assert (await talk.link.receive(), await talk.link.receive()) == (b"1", b"2")
        with pytest.raises(TimeoutError):
            await talk.receive(0.01)
        await talk.link.send(b"3")
        assert await far.receive(5) == (KIND, b"3")
        near.cut("somebody pulled the cable")
        assert [await talk.receive(5) for _ in range(3)] == [(CLOSED, b"")] * 3
        assert talk.why == "somebody pulled the cable"
        with pytest.raises(MigrationFailed, match="pulled the cable"):
            await talk.link.receive()
        await talk.close()

    run(work())


def test_why_a_conversation_ended_is_told_to_the_disks() -> None:
    async def work() -> None:
        near, _ = movers()
        talk = Talk(near)  # type: ignore[arg-type]
        near.error = MigrationRefused("not with you")
        near.cut()
        with pytest.raises(MigrationRefused, match="not with you"):
            await talk.link.receive()
        other = Talk(movers()[0])  # type: ignore[arg-type]
        await other.close()
        with pytest.raises(MigrationFailed, match="closed by this one"):
            await other.link.send(b"x")

    run(work())


class Way:
    """The source's guest and disks on their way to the target, over two fake movers."""

    def __init__(self, rig: Rig, **options: Any) -> None:
        self.rig = rig
        self.options = MigrationOptions(**options)
        self.near, self.far = movers()
        self.talk = Talk(self.near)  # type: ignore[arg-type]
        self.made: list[list[str]] = []
        self.told: list[tuple[int, int]] = []
        self.incoming: IncomingDisks
        self.outgoing: OutgoingDisks
        self.record: Any
        self.devices: Any
        self._pump: asyncio.Task[None]

    async def begin(self) -> None:
        rig = self.rig
        devices = [
            SimpleNamespace(spec=spec, opened=opened, backend=rig.backends[0], ask=guest.ask, kind="disk", id=spec.id)
            for spec, opened, guest in zip(rig.specs, rig.opened, rig.guests, strict=True)
        ]
        spec = DomainSpec(UUID, "web", KernelBoot("/kernel"), 64, disks=tuple(rig.specs))
        self.record = SimpleNamespace(spec=spec, domid=3)
        folders = SimpleNamespace(
            image_folders=(str(rig.homes[1] / "images"),), state_dir=rig.homes[1], shared_folders=()
        )
        offers = await module.disk_mirror.offers(devices)  # type: ignore[arg-type]
        self.incoming = await IncomingDisks.of(offers, folders, self.made.append)  # type: ignore[arg-type]
        self.incoming.begin(rig.backends[1], self.record, self.far)  # type: ignore[arg-type]
        self._pump = asyncio.get_running_loop().create_task(self._hear())
        await self.begin_source(devices)

    async def begin_source(self, devices: Any) -> None:
        self.devices = devices
        ticket = SimpleNamespace(detail={ANSWERS: self.incoming.answers})
        self.outgoing = await OutgoingDisks.of(
            devices,  # type: ignore[arg-type]
            ticket,  # type: ignore[arg-type]
            self.options,
            self.talk.link,
            lambda sent, left: self.told.append((sent, left)),
        )

    async def _hear(self) -> None:
        while True:
            kind, data = await self.far.receive(60)
            assert kind == KIND
            self.incoming.heard(data)

    async def end(self) -> None:
        self._pump.cancel()
        await asyncio.gather(self._pump, return_exceptions=True)
        await self.talk.close()
        await self.rig.close()


async def guest_of(rig: Rig, name: str = "disk.img", size: int = 8 * MIB) -> Guest:
    path = rig.image(name, "raw", size)
    path.write_bytes(os.urandom(size))
    return await rig.attach(path, "raw")


def test_disks_go_along(tmp_path: Path) -> None:
    async def work() -> None:
        rig = Rig(tmp_path)
        guest, other = await guest_of(rig), await guest_of(rig, "other.img", MIB)
        way = Way(rig)
        await way.begin()
        assert way.outgoing.copied == way.incoming.elsewhere == {"disk/xvda", "disk/xvdb"}
        await way.outgoing.copy()
        guest.write(0, 1, 11)
        assert way.outgoing.left == 11 * 4096
        await way.outgoing.again()
        guest.write(8, 2)
        guest.disconnect()
        other.disconnect()
        await way.outgoing.last()
        spec = await way.incoming.take(way.record.spec)
        paths = [str(rig.homes[1] / "images" / name) for name in ("disk.img", "other.img")]
        assert [disk.path for disk in spec.disks] == paths and way.made[-1] == paths
        assert spec == dataclasses.replace(way.record.spec, disks=spec.disks)
        opened = way.incoming.use()
        assert list(opened) == ["disk/xvda", "disk/xvdb"] and way.incoming.use() == {}
        await way.incoming.drop()
        for path, disk in zip(paths, rig.specs, strict=True):
            assert Path(path).read_bytes() == Path(disk.path).read_bytes()
        assert sum(sent for sent, _ in way.told) == 9 * MIB + 12 * 4096 and way.told[-1][1] == 0
        for one in opened.values():
            one.close()
        await way.outgoing.abort()
        await way.end()

    run(work())


def test_rounds_end_when_they_bring_nothing(tmp_path: Path) -> None:
    async def work() -> None:
        rig = Rig(tmp_path)
        guest = await guest_of(rig)
        way = Way(rig, max_rounds=50)
        await way.begin()
        rounds = 0

        def busy() -> None:
            nonlocal rounds
            rounds += 1
            for number in range(40):
                guest.write(number * 160, number, 11)
                guest.front.answers()

        await with_each_round(way, busy)
        # All it writes in a round is always more than is little.
        assert rounds == 1 + module.PATIENCE
        assert way.outgoing.left > module.LITTLE
        await way.outgoing.abort()
        await way.incoming.drop()
        module.remove(way.made[-1])
        assert not rig.images_left()
        await way.end()

    run(work())


async def with_each_round(way: Way, action: Callable[[], None]) -> None:
    """`copy`, and at the beginning of each round's sending do something."""
    mirror: Any = way.outgoing._mirror
    real = mirror.round

    async def round_() -> Any:
        result = await real()
        action()
        return result

    mirror.round = round_
    await way.outgoing.copy()


def test_what_was_not_copied_is_missed(tmp_path: Path) -> None:
    async def work() -> None:
        rig = Rig(tmp_path)
        await guest_of(rig)
        way = Way(rig)
        await way.begin()
        with pytest.raises(MigrationFailed, match="disk xvda was not copied, and the target does not see it"):
            await way.incoming.take(way.record.spec)
        await way.incoming.drop()
        await way.outgoing.abort()
        await way.end()

    run(work())


def test_disks_epoch_by_epoch(tmp_path: Path) -> None:
    """What came of an epoch that was not whole is left out, however the connection ended."""

    async def work() -> None:
        rig = Rig(tmp_path)
        guest = await guest_of(rig)
        way = Way(rig)
        await way.begin()
        await way.outgoing.copy()
        await way.outgoing.aside()
        guest.write(0, 1, 11)
        batch = await way.outgoing.gather()
        guest.write(0, 2, 11)
        await way.outgoing.deliver(batch)
        await way.incoming.apply()
        then = bytes([1]) * 11 * 4096 + Path(rig.specs[0].path).read_bytes()[11 * 4096 :]
        await way.outgoing.deliver(await way.outgoing.gather())
        way.incoming.heard(b"nonsense")
        with pytest.raises(MigrationFailed, match="makes no sense"):
            await way.outgoing.deliver(await way.outgoing.gather())
        guest.disconnect()
        spec = await way.incoming.take(way.record.spec)
        for one in way.incoming.use().values():
            one.close()
        assert Path(spec.disks[0].path).read_bytes() == then
        assert sum(sent for sent, _ in way.told) == 8 * MIB + 2 * 11 * 4096
        await way.outgoing.abort()
        await way.end()

    run(work())


def test_epochs_of_a_domain_without_disks(tmp_path: Path) -> None:
    async def work() -> None:
        way = Way(Rig(tmp_path))
        await way.begin()
        await way.outgoing.aside()
        batch = await way.outgoing.gather()
        assert not batch.bytes
        await way.outgoing.deliver(batch)
        await way.incoming.apply()
        await way.outgoing.abort()
        await way.end()

    run(work())


def test_a_failed_half_leaves_nothing(tmp_path: Path) -> None:
    async def work() -> None:
        rig = Rig(tmp_path)
        guest = await guest_of(rig)
        way = Way(rig)
        await way.begin()
        await way.outgoing.copy()
        way.incoming.heard(b"nonsense")
        with pytest.raises(MigrationFailed, match="makes no sense"):
            await way.outgoing.again()
        with pytest.raises(MigrationFailed, match="makes no sense"):
            await way.incoming.take(way.record.spec)
        await way.outgoing.abort()
        await way.incoming.drop()
        await way.incoming.drop()
        guest.write(0, 3)
        await guest.settle()
        assert not rig.images_left()
        await way.end()

    run(work())


def test_disks_that_were_taken_are_closed_when_the_domain_does_not_come(tmp_path: Path) -> None:
    async def work() -> None:
        rig = Rig(tmp_path)
        guest = await guest_of(rig)
        way = Way(rig)
        await way.begin()
        await way.outgoing.copy()
        guest.disconnect()
        await way.outgoing.last()
        await way.incoming.take(way.record.spec)
        await way.incoming.drop()
        module.remove(way.made[-1])
        module.remove(way.made[-1])
        while rig.backends[1]._closing:
            await asyncio.wait(list(rig.backends[1]._closing.values()))
        assert not rig.images_left() and not list(rig.homes[1].glob("disks/*"))
        await way.end()

    run(work())


@pytest.mark.parametrize("disks", [[], [{"id": "xvdz"}]])
def test_answers_for_other_disks_are_refused(tmp_path: Path, disks: Sequence[Any]) -> None:
    async def work() -> None:
        rig = Rig(tmp_path)
        await guest_of(rig)
        way = Way(rig)
        await way.begin()
        way.incoming.answers[:] = disks
        with pytest.raises(MigrationRefused, match="not those that were offered"):
            await way.begin_source(way.devices)
        await way.incoming.drop()
        await way.outgoing.abort()
        await way.end()

    run(work())


def test_disks_nobody_offered_are_refused() -> None:
    async def work() -> None:
        near, _ = movers()
        incoming = await IncomingDisks.of([], SimpleNamespace(), lambda paths: None)  # type: ignore[arg-type]
        incoming.begin(SimpleNamespace(), SimpleNamespace(), near)  # type: ignore[arg-type]
        with pytest.raises(MigrationFailed, match="has not offered"):
            incoming.heard(b"x")
        spec = DomainSpec(UUID, "web", KernelBoot("/kernel"), 64)
        assert await incoming.take(spec) is spec
        with pytest.raises(MigrationRefused, match="does not describe its disks"):
            await IncomingDisks.of(None, SimpleNamespace(), lambda paths: None)  # type: ignore[arg-type]

    run(work())
