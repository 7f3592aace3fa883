"""Memory that begins as a copy of a template's: shared until written, moved where others must see it."""

from __future__ import annotations

import fcntl
import mmap
import os
import random
from collections.abc import Iterator

import numpy as np
import pytest

from hypervisor.host import cow
from hypervisor.host.cow import CowMemory
from hypervisor.memory import layout
from hypervisor.memory.physical import DomainMemory
from hypervisor.types import PAGE_SIZE

PAGES = 64


def page(number: int) -> bytes:
    return bytes([number & 0xFF, 0xA5]) * (PAGE_SIZE // 2)


@pytest.fixture
def template() -> Iterator[int]:
    """Pages 0, 8, 16 ... are zeros."""
    fd = os.memfd_create("template", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, PAGES * PAGE_SIZE)
    for number in range(PAGES):
        if number % 8:
            os.pwrite(fd, page(number), number * PAGE_SIZE)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE)
    yield fd
    os.close(fd)


class Clone:
    def __init__(self, template: int) -> None:
        frames = layout.total_frames(PAGES)
        self.own = os.memfd_create("own", os.MFD_CLOEXEC)
        os.ftruncate(self.own, frames * PAGE_SIZE)
        self.memory = DomainMemory(mmap.mmap(self.own, 0), 0x20000, PAGES)
        self.cow = CowMemory(self.memory, self.own, template, PAGES)

    def seen_by_others(self, index: int) -> bytes:
        return os.pread(self.own, PAGE_SIZE, index * PAGE_SIZE)

    def resident(self) -> int:
        """Pages in its own memfd."""
        return os.fstat(self.own).st_blocks * 512 // PAGE_SIZE


@pytest.fixture
def clone(template: int) -> Iterator[Clone]:
    made = Clone(template)
    yield made
    os.close(made.own)


def test_it_begins_as_the_template_and_costs_nothing(clone: Clone, template: int) -> None:
    assert all(bytes(clone.memory.page(n)) == os.pread(template, PAGE_SIZE, n * PAGE_SIZE) for n in range(PAGES))
    assert clone.resident() == 0 and len(clone.cow) == PAGES


def test_what_one_clone_writes_no_other_sees(clone: Clone, template: int) -> None:
    other = Clone(template)
    clone.memory.page(3)[:5] = b"hello"
    assert bytes(other.memory.page(3)) == page(3) == os.pread(template, PAGE_SIZE, 3 * PAGE_SIZE)
    assert clone.seen_by_others(3) == bytes(PAGE_SIZE), "a private copy is nobody else's"
    os.close(other.own)


def test_a_moved_frame_is_seen_by_others_both_ways(clone: Clone) -> None:
    clone.memory.page(3)[:5] = b"hello"
    address, view = clone.memory.address, clone.memory.page(3)
    clone.cow.share(3)
    clone.cow.share(3)
    assert clone.seen_by_others(3)[:5] == b"hello" and clone.seen_by_others(3)[6:] == page(3)[6:]
    os.pwrite(clone.own, b"world", 3 * PAGE_SIZE)
    assert bytes(view[:5]) == b"world" and clone.memory.address == address
    view[:5] = b"again"
    assert clone.seen_by_others(3)[:5] == b"again"
    assert bytes(clone.memory.page(2)) == page(2) and clone.resident() == 1


def test_xens_frames_are_its_own_from_the_beginning(clone: Clone) -> None:
    clone.cow.share(PAGES)
    clone.memory.page(PAGES)[:3] = b"abc"
    assert clone.seen_by_others(PAGES)[:3] == b"abc"


def test_settled_memory_is_all_in_the_memfd(clone: Clone) -> None:
    clone.memory.page(9)[:] = b"x" * PAGE_SIZE
    clone.cow.share(20)
    before = [bytes(clone.memory.page(n)) for n in range(PAGES)]
    clone.cow.settle()
    assert [clone.seen_by_others(n) for n in range(PAGES)] == before
    assert len(clone.cow) == 0 and clone.resident() == PAGES - PAGES // 8, "pages of zeros stay holes"
    assert [bytes(clone.memory.page(n)) for n in range(PAGES)] == before
    clone.memory.page(30)[:4] = b"late"
    assert clone.seen_by_others(30)[:4] == b"late"


def test_which_are_private(clone: Clone) -> None:
    clone.cow.share(5)
    indexes = np.array([4, 5, 6, PAGES, PAGES + 7])
    assert clone.cow.among(indexes).tolist() == [True, False, True, False, False]
    assert clone.cow.among(indexes[:0]).tolist() == []


def test_the_memory_shares_punches_and_settles(clone: Clone) -> None:
    memory = clone.memory
    memory.share(3)
    memory.settle()
    assert clone.seen_by_others(3) == bytes(PAGE_SIZE), "nothing is private of it"
    memory.private = clone.cow
    memory.share(3)
    assert clone.seen_by_others(3) == page(3)
    memory.punch(3, 2)
    assert bytes(memory.page(3)) == bytes(memory.page(4)) == bytes(PAGE_SIZE)
    memory.settle()
    assert memory.private is None and clone.seen_by_others(5) == page(5) and clone.seen_by_others(4) == bytes(PAGE_SIZE)


def test_frames_given_back_read_as_zeros(clone: Clone) -> None:
    clone.memory.page(12)[:] = b"y" * PAGE_SIZE
    clone.cow.share(11)
    clone.cow.punch(10, 4)
    # What had moved is the memfd's: `DomainMemory.punch` gives that back.
    assert [bytes(clone.memory.page(n)) == bytes(PAGE_SIZE) for n in range(9, 15)] == [
        False, True, False, True, True, False
    ]  # fmt: skip
    assert clone.seen_by_others(12) == bytes(PAGE_SIZE)


def test_many_moved_frames_settle_all(clone: Clone, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cow, "MAX_MOVED", 3)
    for number in (1, 3, 5, 7):
        clone.cow.share(number)
    assert len(clone.cow) == 0 and clone.seen_by_others(60) == page(60)


def test_random_moves_lose_nothing(clone: Clone) -> None:
    dice = random.Random(4)
    model = [bytearray(clone.memory.page(n)) for n in range(PAGES)]
    for step in range(600):
        index = dice.randrange(PAGES)
        kind = dice.randrange(4)
        if kind == 0:
            clone.cow.share(index)
        elif kind == 1 and not clone.cow.among(np.array([index]))[0]:
            os.pwrite(clone.own, b"%06d" % step, index * PAGE_SIZE + 64)
            model[index][64:70] = b"%06d" % step
        else:
            at = dice.randrange(PAGE_SIZE - 8)
            clone.memory.page(index)[at : at + 6] = b"%06d" % step
            model[index][at : at + 6] = b"%06d" % step
    assert [bytearray(clone.memory.page(n)) for n in range(PAGES)] == model
    clone.cow.settle()
    assert [bytearray(clone.seen_by_others(n)) for n in range(PAGES)] == model
