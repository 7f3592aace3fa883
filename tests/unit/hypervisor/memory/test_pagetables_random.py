"""Whatever a guest does with its page tables: counts stay exact, and nothing foreign is ever reachable."""

from __future__ import annotations

import random

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from pv_rig import BASE, NX, RO, ROOT, RW, Rig, code_of

from hypervisor.domain import Domain
from hypervisor.engines import x86
from hypervisor.errors import XenError
from hypervisor.memory import layout
from hypervisor.memory.frames import HELD, L1, L4, SEGDESC, WRITABLE
from hypervisor.memory.tally import Tally

SMALL = 14  # few frames, so that random choices meet


def reachable(domain: Domain) -> list[str]:
    """What a hardware walk from each validated root reaches although it must not."""
    frames, words = domain.frames, domain.memory.words
    xen = set(range(domain.config.max_pages, frames.size))
    bad: list[str] = []
    seen: set[tuple[int, int, bool]] = set()

    def walk(index: int, level: int, xens: bool) -> None:
        if (index, level, xens) in seen:
            return
        seen.add((index, level, xens))
        for slot in range(512):
            entry = words[index * 512 + slot]
            if not entry & x86.PTE_P:
                continue
            of_xen = xens or (level == 4 and 256 <= slot <= 271)
            target = ((entry & x86.PTE_ADDR) >> 12) - domain.config.base_mfn
            where = f"L{level} {index:#x}[{slot}] = {entry:#x}"
            if not 0 <= target < frames.size:
                bad.append(f"{where}: outside the domain")
                continue
            if of_xen:
                if target not in xen:
                    bad.append(f"{where}: Xen's area leads out of Xen's frames")
                if level == 1 and entry & x86.PTE_RW and entry & x86.PTE_US:
                    bad.append(f"{where}: the guest can write Xen's area")
            elif not frames.refs[target]:
                bad.append(f"{where}: not the domain's frame")
            elif level == 1 and entry & x86.PTE_RW and frames.count[target] and frames.kind[target] != WRITABLE:
                bad.append(f"{where}: a writable mapping of type {frames.kind[target]}")
            if level > 1:
                if entry & x86.PTE_PSE:
                    bad.append(f"{where}: a superpage")
                else:
                    walk(target, level - 1, of_xen)

    for index in range(frames.size):
        if frames.kind[index] == L4 and frames.count[index]:
            walk(index, 4, False)
    return bad


def any_entry(rng: random.Random, rig: Rig) -> int:
    """An entry that may be anything: mostly the domain's frames and sane flags, often not."""
    size = layout.total_frames(rig.frames.ram)
    mfn = rng.choice(
        [
            BASE + rng.randrange(rig.frames.ram),
            BASE + rng.randrange(rig.frames.ram),
            BASE + rng.randrange(rig.frames.ram),
            BASE + rng.randrange(size),
            BASE - 1,
            BASE + size,
            rng.randrange(1 << 27),
            rng.randrange(1 << 40),
        ]
    )
    flags = rng.choice([RW, RW, RO, RO | NX, x86.PTE_P, x86.PTE_P | x86.PTE_RW, 0, rng.randrange(1 << 9)])
    return mfn << 12 | flags | (rng.getrandbits(12) << 52 if rng.random() < 0.2 else 0)


@pytest.mark.parametrize("seed", range(6))
def test_nothing_foreign_is_ever_reachable(seed: int) -> None:
    """Random entries through updates, and whole random tables through pins and base pointers."""
    rng = random.Random(seed)
    rig = Rig(pages=SMALL)
    done = refused = 0
    for step in range(1500):
        frame, level = rng.randrange(SMALL), rng.randrange(1, 5)
        action = rng.random()
        if action < 0.25 and not rig.frames.count[frame]:
            for _ in range(rng.randrange(1, 4)):
                rig.memory.words[frame * 512 + rng.choice([0, 1, 255, 256, 260, 300, 511])] = any_entry(rng, rig)
            code = 0
        elif action < 0.3:
            rig.memory.clear_page(frame) if not rig.frames.count[frame] else None
            code = 0
        elif action < 0.5:
            code = code_of(rig.tables.pin, rig.mfn(frame), level)
        elif action < 0.57:
            code = code_of(rig.tables.unpin, rig.mfn(frame))
        elif action < 0.62:
            code = code_of(rig.domain.new_baseptr, rig.mfn(frame))
        else:
            code = code_of(rig.tables.update, frame, rng.choice([0, 1, 2, 255, 256, 511]), any_entry(rng, rig))
        done, refused = done + (code == 0), refused + (code != 0)
        if step % 20 == 19:
            assert reachable(rig.domain) == []
            rig.check()
    assert done > 50 and refused > 50


class PageTableMachine(RuleBasedStateMachine):
    """Sequences of everything that changes types and counts; after each the counts are exact."""

    frames = st.integers(0, SMALL - 1)
    levels = st.integers(1, 4)
    flags = st.sampled_from([RW, RO, RO | NX, x86.PTE_P, 0, RW | x86.PTE_PSE])

    def __init__(self) -> None:
        super().__init__()
        self.rig = Rig(pages=SMALL)
        self.domain = self.rig.domain
        self.tally = Tally(self.domain.tables)

    @rule(frame=frames, level=levels)
    def pin(self, frame: int, level: int) -> None:
        before = self.rig.snapshot()
        if code_of(self.rig.tables.pin, self.rig.mfn(frame), level):
            assert self.rig.snapshot() == before

    @rule(frame=frames)
    def unpin(self, frame: int) -> None:
        code_of(self.rig.tables.unpin, self.rig.mfn(frame))

    @rule(frame=frames, slot=st.integers(0, 3), page=frames, flags=flags)
    def update(self, frame: int, slot: int, page: int, flags: int) -> None:
        if not self.rig.frames.refs[frame]:
            return
        before = self.rig.snapshot()
        if code_of(self.rig.tables.update, frame, slot, self.rig.pte(page, flags)):
            assert self.rig.snapshot() == before

    @rule(table=frames, entries=st.dictionaries(st.integers(0, 3), st.tuples(frames, flags), max_size=3))
    def write_plain(self, table: int, entries: dict[int, tuple[int, int]]) -> None:
        if not self.rig.frames.count[table]:
            self.rig.fill(table, {slot: self.rig.pte(*entry) for slot, entry in entries.items()})

    @rule(frame=frames)
    def new_baseptr(self, frame: int) -> None:
        code_of(self.domain.new_baseptr, self.rig.mfn(frame))

    @rule(frame=st.one_of(st.none(), frames))
    def new_user_baseptr(self, frame: int | None) -> None:
        code_of(self.domain.new_user_baseptr, 0 if frame is None else self.rig.mfn(frame))

    @rule(frames=st.lists(frames, max_size=2))
    def set_gdt(self, frames: list[int]) -> None:
        before = self.rig.snapshot()
        if code_of(self.domain.set_gdt, self.domain.running, [self.rig.mfn(f) for f in frames], 512 * len(frames)):
            assert self.rig.snapshot() == before

    @rule(frame=frames)
    def decrease(self, frame: int) -> None:
        before, refs = self.rig.snapshot(), self.rig.frames.refs[frame]
        held = self.rig.frames.holding[frame] == HELD
        if code_of(self.domain.reservation.give_back, self.rig.mfn(frame)):
            assert self.rig.snapshot() == before and not refs
        else:
            assert self.rig.frames.refs[frame] == refs - held
        self.domain.reservation.settle()

    @rule(order=st.sampled_from([0, 0, 1, 2]))
    def populate(self, order: int) -> None:
        before = self.rig.frames.refs_np.copy()
        first = self.domain.reservation.taker(order).take()
        if first is not None:
            assert not before[first : first + (1 << order)].any(), "only what nothing uses is handed out"

    @rule(pages=st.lists(frames, min_size=1, max_size=4), order=st.sampled_from([0, 1]))
    def exchange(self, pages: list[int], order: int) -> None:
        reservation = self.domain.reservation
        taker, before, pages_before = reservation.taker(order), self.rig.snapshot(), self.rig.frames.pages()
        pages = pages[: len(pages) >> order << order]
        if code_of(reservation.exchange, [self.rig.mfn(p) for p in pages], taker, len(pages) >> order):
            assert self.rig.snapshot() == before
        assert self.rig.frames.pages() == pages_before
        reservation.settle()

    @rule(frame=frames, offset=st.sampled_from([0, 64, 4096 - 64, 4095]))
    def vcpu_info(self, frame: int, offset: int) -> None:
        before = self.rig.snapshot()
        if code_of(self.domain.register_vcpu_info, self.domain.running, self.rig.mfn(frame), offset):
            assert self.rig.snapshot() == before

    @invariant()
    def counts_are_exact(self) -> None:
        assert self.domain.recount() == []
        if not self.domain.tables.linear.save():
            assert self.tally.agrees(self.domain.holds())
        frames = self.rig.frames
        for index in range(SMALL):
            if frames.count[index] and L1 <= frames.kind[index] <= SEGDESC:
                assert frames.refs[index], "a typed frame is owned"


PageTableMachine.TestCase.settings = settings(
    max_examples=120,
    stateful_step_count=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
TestPageTableSequences = PageTableMachine.TestCase


def test_the_walk_itself_notices_what_it_is_for() -> None:
    rig = Rig().boot()
    assert reachable(rig.domain) == []
    rig.memory.words[ROOT * 512 + 300] = (BASE - 5) << 12 | RW
    assert any("outside" in line for line in reachable(rig.domain))
    rig.memory.words[ROOT * 512 + 300] = 0
    with pytest.raises(XenError):
        rig.tables.update(ROOT, 300, (BASE - 5) << 12 | RW)
