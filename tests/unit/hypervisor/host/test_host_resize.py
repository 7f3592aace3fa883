"""What a domain that is resized counts for, and what of a spec may change."""

from __future__ import annotations

import asyncio
import dataclasses
from pathlib import Path
from typing import Any

import pytest

from hypervisor.errors import HostUnavailable, InsufficientMemory, SpecInvalid
from hypervisor.host import priority, resize
from hypervisor.host.ledger import PAGES_PER_MIB, Ledger
from hypervisor.host.records import DomainRecord, RecordStore
from hypervisor.host.resize import Resizer
from hypervisor.host.table import Domain
from hypervisor.memory import layout
from hypervisor.toolstack.api import DomainSpec, KernelBoot

UUID = "00000000-0000-4000-8000-000000000001"
SPEC = DomainSpec(uuid=UUID, name="d", boot=KernelBoot("/k"), memory_mib=64, max_memory_mib=256, vcpus=1, max_vcpus=4)
OVERHEAD = layout.xen_frames(256 * PAGES_PER_MIB)


class FakeHandles:
    resident = 0

    def resident_bytes(self) -> int:
        return self.resident << 20


class FakeProcess:
    alive, pid = True, 0

    def __init__(self, pages: int) -> None:
        self.pages = pages
        self.limit = pages
        self.handles = FakeHandles()
        self.fails = False

    async def request(self, op: str, timeout: float = 0, fields: Any = None, fds: Any = ()) -> dict[str, Any]:
        await asyncio.sleep(0)
        if self.fails:
            raise HostUnavailable("no answer")
        if op == "limit_memory":
            self.limit = fields["pages"]
        return {"memory_pages": self.pages}


class FakeAttachment:
    def __init__(self) -> None:
        self.told: list[tuple[Any, ...]] = []

    def set_vcpus(self, vcpus: int, max_vcpus: int) -> None:
        self.told.append(("vcpus", vcpus, max_vcpus))

    def set_memory_target(self, kib: int) -> None:
        self.told.append(("memory", kib))


class World:
    def __init__(self, folder: Path, total_mib: int = 300) -> None:
        self.records = RecordStore(folder)
        self.records.prepare(UUID)
        self.ledger = Ledger(total_mib * PAGES_PER_MIB + OVERHEAD)
        self.resizer = Resizer(self.ledger, self.records)
        self.process = FakeProcess(64 * PAGES_PER_MIB)
        self.attachment = FakeAttachment()
        record = DomainRecord(SPEC, 3)
        frames = layout.total_frames(256 * PAGES_PER_MIB)
        record.claim = self.ledger.claim(UUID, frames, 64 * PAGES_PER_MIB + OVERHEAD)
        anything: Any = self
        self.domain = Domain(record, console=anything, process=anything.process, attachment=anything.attachment)

    @property
    def held_mib(self) -> int:
        return (self.ledger.committed - OVERHEAD) // PAGES_PER_MIB

    def saved(self) -> DomainRecord:
        (record,) = self.records.load()
        return record


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resize, "FIRST_LOOK", 0.0)
    monkeypatch.setattr(resize, "LONGEST_LOOK", 0.0)


def test_memory_counts_as_it_may_be_had(tmp_path: Path) -> None:
    async def test() -> None:
        world = World(tmp_path)
        await world.resizer.set_memory(world.domain, 200)
        assert world.held_mib == 200 and world.process.limit == 200 * PAGES_PER_MIB
        assert world.attachment.told == [("memory", 200 << 10)]
        record = world.saved()
        assert record.spec.memory_mib == 200 and record.run.memory_mib == 200 and record.claim is not None
        assert record.claim == world.domain.record.claim
        world.process.pages = 200 * PAGES_PER_MIB
        await world.resizer.set_memory(world.domain, 100)
        assert world.held_mib == 200 and world.process.limit == 100 * PAGES_PER_MIB
        for has, held in ((150, 150), (100, 100)):
            world.process.pages = has * PAGES_PER_MIB
            for _ in range(20):
                await asyncio.sleep(0)
            assert world.held_mib == held
        world.process.pages = 1 << 40  # it says what cannot be
        await world.resizer.set_memory(world.domain, 90)
        assert world.held_mib == 100
        world.resizer.stop()

    asyncio.run(test())


def test_what_the_kernel_says_counts_more(tmp_path: Path) -> None:
    async def test() -> None:
        world = World(tmp_path)
        await world.resizer.set_memory(world.domain, 200)
        world.process.handles.resident = 150
        world.process.pages = 0
        await world.resizer.set_memory(world.domain, 80)
        assert world.ledger.committed == 150 * PAGES_PER_MIB
        world.resizer.stop()

    asyncio.run(test())


def test_memory_the_host_has_not_got_changes_nothing(tmp_path: Path) -> None:
    async def test() -> None:
        world = World(tmp_path, total_mib=128)
        with pytest.raises(InsufficientMemory, match="memory_mib is 200"):
            await world.resizer.set_memory(world.domain, 200)
        for size in (0, -1, 257):
            with pytest.raises(SpecInvalid):
                await world.resizer.set_memory(world.domain, size)
        assert world.held_mib == 64 and world.domain.record.spec == SPEC and world.attachment.told == []
        world.process.fails = True
        with pytest.raises(HostUnavailable):
            await world.resizer.set_memory(world.domain, 100)
        assert world.domain.record.run.memory_mib == 64 and world.attachment.told == []
        world.process.fails = False
        for _ in range(20):
            await asyncio.sleep(0)
        assert world.held_mib == 64, "what was taken for it is given back"
        world.resizer.stop()

    asyncio.run(test())


def test_vcpus(tmp_path: Path) -> None:
    async def test() -> None:
        world = World(tmp_path)
        world.resizer.set_vcpus(world.domain, 3)
        assert world.attachment.told == [("vcpus", 3, 4)]
        assert world.saved().spec == SPEC.with_vcpus(3) and world.saved().run.vcpus == 3
        for vcpus in (0, 5, -1):
            with pytest.raises(SpecInvalid, match="1 to 4"):
                world.resizer.set_vcpus(world.domain, vcpus)

    asyncio.run(test())


def test_a_redefined_domain_runs_as_it_was_made(tmp_path: Path) -> None:
    async def test() -> None:
        world = World(tmp_path)
        new = dataclasses.replace(SPEC, memory_mib=128, max_memory_mib=512, vcpus=2, max_vcpus=8)
        world.resizer.redefine(world.domain, new)
        record = world.saved()
        assert record.spec == new and (record.run.max_memory_mib, record.run.max_vcpus) == (256, 4)
        with pytest.raises(SpecInvalid, match="256"):
            await world.resizer.set_memory(world.domain, 400)
        for field, value in (("name", "other"), ("owner", "x"), ("uuid", UUID.replace("1", "2"))):
            with pytest.raises(SpecInvalid, match=field):
                world.resizer.redefine(world.domain, dataclasses.replace(new, **{field: value}))

    asyncio.run(test())


@pytest.mark.parametrize(("weight", "nice"), [(256, 0), (205, 1), (128, 3), (1, 19), (512, -3), (65535, -20)])
def test_nice_values(weight: int, nice: int) -> None:
    assert priority.nice_of(weight) == nice


def test_an_autogroup_gets_its_nice_value(tmp_path: Path) -> None:
    (tmp_path / "sys/kernel").mkdir(parents=True)
    (tmp_path / "sys/kernel/sched_autogroup_enabled").write_text("1\n")
    (tmp_path / "42").mkdir()
    group = tmp_path / "42/autogroup"
    group.write_text("/autogroup-9 nice 0\n")
    assert asyncio.run(priority.apply(42, 128, tmp_path))
    assert group.read_text() == "3"
    group.write_text("/autogroup-9 nice -3\n")
    group.chmod(0o400)
    assert asyncio.run(priority.apply(42, 512, tmp_path)) and group.read_text() == "/autogroup-9 nice -3\n"
    assert not asyncio.run(priority.apply(43, 512, tmp_path))
