"""Memory that stands still for a reader while its owner writes on, and is whole again afterwards."""

from __future__ import annotations

import mmap
import os
import random
from collections.abc import Iterator

import numpy as np
import pytest

from hypervisor.errors import HypervisorBug
from hypervisor.host import cow, frozen
from hypervisor.host.frozen import FrozenMemory, open_pagemap
from hypervisor.memory import layout
from hypervisor.memory.physical import DomainMemory
from hypervisor.types import PAGE_SIZE

PAGES = 64


def page(number: int) -> bytes:
    return bytes([number & 0xFF, 0x5A]) * (PAGE_SIZE // 2)


class Rig:
    """Pages 0, 8, 16 ... were never written."""

    def __init__(self) -> None:
        self.own = os.memfd_create("own", os.MFD_CLOEXEC)
        os.ftruncate(self.own, layout.total_frames(PAGES) * PAGE_SIZE)
        self.memory = DomainMemory(mmap.mmap(self.own, 0), 0x20000, PAGES)
        for number in range(PAGES):
            if number % 8:
                self.memory.page(number)[:] = page(number)
        self.pagemap = open_pagemap()

    def freeze(self, *kept: int) -> FrozenMemory:
        return FrozenMemory(self.memory, self.own, kept, self.pagemap)

    def seen(self) -> list[bytes]:
        """By the owner."""
        return [bytes(self.memory.page(number)) for number in range(PAGES)]

    def in_memfd(self) -> list[bytes]:
        return [os.pread(self.own, PAGE_SIZE, number * PAGE_SIZE) for number in range(PAGES)]

    def resident(self) -> int:
        return os.fstat(self.own).st_blocks * 512 // PAGE_SIZE


@pytest.fixture
def rig() -> Iterator[Rig]:
    made = Rig()
    if made.pagemap < 0:
        pytest.skip("no /proc/self/pagemap here")
    yield made
    os.close(made.own)
    os.close(made.pagemap)


def read(memory: FrozenMemory) -> list[bytes]:
    return [row.tobytes() for row in memory.read(np.arange(PAGES))]


def thaw(memory: FrozenMemory) -> None:
    memory.stop()
    while memory.thaw():
        pass


def test_the_reader_sees_what_was(rig: Rig) -> None:
    before = rig.seen()
    memory = rig.freeze(5)
    address = rig.memory.address
    for number in (3, 5, 8, 63):
        rig.memory.page(number)[:4] = b"new!"
    assert read(memory) == before
    assert rig.in_memfd()[5][:4] == b"new!", "what others map they see at once"
    assert [rig.in_memfd()[n] for n in (3, 8, 63)] == [before[n] for n in (3, 8, 63)]
    after = rig.seen()
    thaw(memory)
    assert rig.memory.private is None and rig.memory.address == address
    assert rig.seen() == rig.in_memfd() == after
    rig.memory.page(20)[:4] = b"late"
    assert rig.in_memfd()[20][:4] == b"late"


def test_thawing_copies_what_was_written_alone(rig: Rig) -> None:
    before = rig.resident()
    memory = rig.freeze()
    rig.memory.page(3)[:4] = b"new!"
    thaw(memory)
    assert rig.resident() == before == PAGES - PAGES // 8


def test_a_frame_that_is_shared_meanwhile(rig: Rig) -> None:
    before = rig.seen()
    memory = rig.freeze()
    rig.memory.page(9)[:4] = b"mine"
    for number in (9, 10):
        rig.memory.share(number)
        rig.memory.share(number)
    assert rig.in_memfd()[9][:4] == b"mine" and rig.in_memfd()[10] == before[10]
    os.pwrite(rig.own, b"driver", 10 * PAGE_SIZE)
    assert bytes(rig.memory.page(10)[:6]) == b"driver"
    assert read(memory) == before
    thaw(memory)
    assert rig.seen() == rig.in_memfd()


def test_frames_that_are_given_back_meanwhile(rig: Rig) -> None:
    before = rig.seen()
    memory = rig.freeze(12)
    rig.memory.punch(10, 4)
    assert rig.seen()[10:14] == [bytes(PAGE_SIZE)] * 4 and rig.seen()[9] == before[9]
    assert read(memory) == before
    resident = rig.resident()
    thaw(memory)
    assert rig.resident() <= resident - 3, "they cost nothing afterwards"
    assert rig.seen() == rig.in_memfd() and rig.seen()[10] == bytes(PAGE_SIZE)


def test_who_needs_the_memory_as_a_whole_ends_the_reading(rig: Rig) -> None:
    memory = rig.freeze()
    rig.memory.page(9)[:4] = b"mine"
    rig.memory.settle()
    assert rig.memory.private is None and rig.in_memfd() == rig.seen()
    with pytest.raises(OSError, match="as a whole"):
        memory.read(np.arange(3))
    assert not memory.thaw()


def test_many_shared_frames_end_it_too(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cow, "MAX_MOVED", 3)
    memory = rig.freeze()
    for number in (1, 3, 5, 7):
        rig.memory.page(number)[:4] = b"mine"
        rig.memory.share(number)
    assert rig.in_memfd() == rig.seen()
    with pytest.raises(OSError, match="as a whole"):
        memory.read(np.arange(3))
    thaw(memory)
    assert rig.memory.private is None


def test_one_at_a_time_and_not_while_it_is_read(rig: Rig) -> None:
    memory = rig.freeze()
    with pytest.raises(HypervisorBug):
        rig.freeze()
    with pytest.raises(HypervisorBug):
        memory.thaw()
    thaw(memory)
    thaw(rig.freeze())


def test_a_mapping_that_is_refused_leaves_all_as_it_was(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    before, real = rig.seen(), FrozenMemory._map_own

    def refuse(memory: FrozenMemory, first: int, count: int) -> None:
        if first == 7:
            raise OSError(12, "no more areas")
        real(memory, first, count)

    monkeypatch.setattr(FrozenMemory, "_map_own", refuse)
    with pytest.raises(OSError, match="no more"):
        rig.freeze(3, 7)
    assert rig.memory.private is None and rig.seen() == before
    rig.memory.page(9)[:4] = b"here"
    assert rig.in_memfd()[9][:4] == b"here"


@pytest.mark.parametrize("seed", range(4))
def test_random_work_loses_nothing(rig: Rig, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    monkeypatch.setattr(frozen, "STEP", 7)
    dice = random.Random(seed)
    model = [bytearray(data) for data in rig.seen()]
    memory, before = rig.freeze(1, 2), rig.seen()
    reading = True
    for step in range(2000):
        index, word = dice.randrange(PAGES), b"%06d" % step
        kind = dice.randrange(40)
        if kind == 0:
            rig.memory.share(index)
        elif kind == 1 and memory._moved[index]:
            os.pwrite(rig.own, word, index * PAGE_SIZE + 64)
            model[index][64:70] = word
        elif kind == 2:
            rig.memory.punch(index, 1)
            model[index][:] = bytes(PAGE_SIZE)
        elif kind == 3 and reading:
            assert read(memory) == before
            if dice.randrange(4) == 0:
                memory.stop()
                reading = False
        elif kind == 3 and not memory.thaw():
            memory, before, reading = rig.freeze(*dice.sample(range(PAGES), 3)), rig.seen(), True
        elif kind > 3:
            at = dice.randrange(PAGE_SIZE - 8)
            rig.memory.page(index)[at : at + 6] = word
            model[index][at : at + 6] = word
    assert [bytearray(data) for data in rig.seen()] == model
    thaw(memory)
    assert rig.seen() == rig.in_memfd() == [bytes(data) for data in model]
