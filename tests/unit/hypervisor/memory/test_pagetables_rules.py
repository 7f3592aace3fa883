"""Each rule of xen/arch/x86/mm.c as a row: a set-up, an operation, the errno and what is left behind."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from pv_rig import BASE, FIRST_FREE, NX, PAGES, RO, ROOT, ROOT_L1, ROOT_L2, ROOT_L3, RW, E, Rig, code_of

from hypervisor.engines import x86
from hypervisor.memory import layout
from hypervisor.memory.frames import L1, L2, L3, L4, NONE, SEGDESC, WRITABLE
from hypervisor.memory.pagetables import LAZY_NX
from hypervisor.memory.tally import Tally

A, B, C, D, EXTRA = range(FIRST_FREE, FIRST_FREE + 5)


@pytest.fixture
def rig() -> Rig:
    return Rig()


def chain(rig: Rig, top: int) -> int:
    """Frames A (L1) .. up to level `top`, each in the next; the top one's frame."""
    rig.fill(A, {3: rig.pte(EXTRA), 4: rig.pte(EXTRA, RO)})
    for level in range(L2, top + 1):
        rig.fill(A + level - 1, {7: rig.pte(A + level - 2)})
    return A + top - 1


@pytest.mark.parametrize("level", [L1, L2, L3, L4])
def test_pinning_validates_and_unpinning_gives_everything_back(rig: Rig, level: int) -> None:
    before = rig.snapshot()
    top = chain(rig, level)
    rig.tables.pin(rig.mfn(top), level)
    assert [rig.frames.kind[A + i] for i in range(level)] == list(range(L1, level + 1))
    assert rig.frames.kind[EXTRA] == WRITABLE
    assert rig.frames.count[EXTRA] == 1 and rig.frames.refs[EXTRA] == 3
    rig.check()
    rig.tables.unpin(rig.mfn(top))
    assert rig.snapshot() == before
    rig.check()


@pytest.mark.parametrize("level", [L1, L2, L3, L4])
@pytest.mark.parametrize("other", [L1, L2, L3, L4])
def test_a_frame_has_one_type_at_a_time(rig: Rig, level: int, other: int) -> None:
    rig.tables.pin(rig.mfn(A), level)
    before = rig.snapshot()
    assert code_of(rig.tables.pin, rig.mfn(A), other) == E.EINVAL  # the same level: pinned already
    assert rig.snapshot() == before
    rig.check()


@pytest.mark.parametrize(
    ("mfn", "why"),
    [
        (0, "frame 0"),
        (BASE - 1, "just below"),
        (BASE + PAGES, "Xen's shared_info is no RAM but is shared"),
        (BASE + PAGES + 1, "Xen's own"),
        (BASE + layout.total_frames(PAGES), "just behind"),
        (1 << 40, "beyond any machine"),
    ],
)
def test_only_own_frames_are_pinned(rig: Rig, mfn: int, why: str) -> None:
    before = rig.snapshot()
    assert code_of(rig.tables.pin, mfn, L1) == E.EINVAL, why
    assert code_of(rig.tables.unpin, mfn) == E.EINVAL, why
    assert rig.snapshot() == before


def test_a_frame_mapped_writable_becomes_no_table(rig: Rig) -> None:
    rig.tables.pin(rig.mfn(rig.fill(A, {0: rig.pte(B)})), L1)
    for level in (L1, L2, L3, L4):
        assert code_of(rig.tables.pin, rig.mfn(B), level) == E.EINVAL
    rig.check()


def test_a_table_that_maps_itself_writable_is_refused(rig: Rig) -> None:
    before = rig.snapshot()
    assert code_of(rig.tables.pin, rig.mfn(rig.fill(A, {0: rig.pte(A)})), L1) == E.EBUSY
    assert rig.snapshot() == before


def test_a_table_may_map_itself_read_only(rig: Rig) -> None:
    rig.tables.pin(rig.mfn(rig.fill(A, {0: rig.pte(A, RO)})), L1)
    rig.check()
    rig.tables.unpin(rig.mfn(A))
    rig.check()


LEAF_REFUSED = [
    (lambda r: r.pte(B, RW | x86.PTE_PSE), E.EINVAL, "PAT"),
    (lambda r: r.pte(B, RW | x86.PTE_PCD), E.EINVAL, "no cache"),
    (lambda r: r.pte(B, RW | x86.PTE_PWT), E.EINVAL, "write through"),
    (lambda r: r.pte(B, RW) | 1 << 62, E.EINVAL, "the bit that marks grant mappings"),
    (lambda r: 0 << 12 | RW, E.EPERM, "frame 0"),
    (lambda r: (layout.FIRST_MFN - 1) << 12 | RO, E.EPERM, "below all memory"),
    (lambda r: layout.MAX_MFN << 12 | RO, E.EPERM, "beyond all memory"),
    (lambda r: x86.PTE_ADDR | RW, E.EINVAL, "INVALID_MFN"),
    (lambda r: (BASE - 1) << 12 | RW, E.EBUSY, "a neighbour's, below"),
    (lambda r: (BASE - 1) << 12 | RO, E.EBUSY, "a neighbour's, read-only"),
    (lambda r: (BASE + layout.total_frames(PAGES)) << 12 | RO, E.EBUSY, "a neighbour's, behind"),
    (lambda r: r.pte(PAGES + 1, RO), E.EBUSY, "Xen's frame"),
    (lambda r: r.pte(ROOT), E.EBUSY, "an L4, writable"),
    (lambda r: r.pte(ROOT_L3), E.EBUSY, "an L3, writable"),
    (lambda r: r.pte(ROOT_L2), E.EBUSY, "an L2, writable"),
    (lambda r: r.pte(ROOT_L1), E.EBUSY, "an L1, writable"),
    (lambda r: r.pte(D), E.EBUSY, "a descriptor page, writable"),
]


@pytest.mark.parametrize(("entry", "code", "why"), LEAF_REFUSED, ids=[row[2] for row in LEAF_REFUSED])
@pytest.mark.parametrize("way", ["update", "validate"])
def test_refused_leaf_entries(entry: Callable[[Rig], int], code: int, why: str, way: str) -> None:
    rig = Rig().boot()
    rig.make_readonly(D, A)
    rig.tables.get_type(D, SEGDESC)
    rig.fill(A, {0: rig.pte(C), 511: rig.pte(C, RO)})
    if way == "update":
        rig.tables.pin(rig.mfn(A), L1)
        before = rig.snapshot()
        assert code_of(rig.tables.update, A, 1, entry(rig)) == code, why
        assert rig.word(A, 1) == 0
    else:
        before = rig.snapshot()
        rig.memory.words[A * 512 + 300] = entry(rig)
        assert code_of(rig.tables.pin, rig.mfn(A), L1) == code, why
    assert rig.snapshot() == before


LEAF_ALLOWED = [
    (lambda r: r.pte(B), "writable"),
    (lambda r: r.pte(B, RO), "read-only"),
    (lambda r: r.pte(B, RW | NX), "no execute"),
    (lambda r: r.pte(B, RW | x86.PTE_G), "global"),
    (lambda r: r.pte(B, RW) | 7 << 9 | 0x3FF << 52, "software bits"),
    (lambda r: r.pte(ROOT, RO), "a page table, read-only"),
    (lambda r: r.pte(PAGES), "shared_info"),
    (lambda r: 0, "nothing"),
    (lambda r: 0xDEAD_BEEF_F000 << 8 | 0x9E, "not present, with rubbish"),
]


@pytest.mark.parametrize(("entry", "why"), LEAF_ALLOWED, ids=[row[1] for row in LEAF_ALLOWED])
def test_allowed_leaf_entries(entry: Callable[[Rig], int], why: str) -> None:
    rig = Rig().boot()
    value = entry(rig)
    rig.tables.update(ROOT_L1, 300, value)
    assert rig.word(ROOT_L1, 300) == value, why
    rig.check()
    rig.tables.update(ROOT_L1, 300, 0)
    rig.check()


def test_a_kernel_mapping_gets_the_user_bit_and_a_mark() -> None:
    rig = Rig().boot()
    rig.tables.update(ROOT_L1, 300, rig.pte(B, x86.PTE_P))
    assert rig.word(ROOT_L1, 300) & x86.PTE_US and rig.word(ROOT_L1, 300) >> 52 & 1
    rig.check()


UPPER_REFUSED = [
    (lambda r: r.pte(B, RW | x86.PTE_PSE), "superpage"),
    (lambda r: r.pte(B, RW | x86.PTE_PCD), "no cache"),
    (lambda r: r.pte(B, RW | x86.PTE_PWT), "write through"),
    (lambda r: r.pte(B, RW | x86.PTE_G), "global"),
    (lambda r: r.pte(ROOT), "the root"),
    (lambda r: r.pte(C), "a frame mapped writable"),
    (lambda r: 0 << 12 | RW, "frame 0"),
    (lambda r: (BASE - 1) << 12 | RW, "a neighbour's"),
    (lambda r: r.pte(PAGES + 1), "Xen's frame"),
    (lambda r: r.pte(PAGES), "shared_info"),
    (lambda r: x86.PTE_ADDR | RW, "INVALID_MFN"),
]


@pytest.mark.parametrize(("entry", "why"), UPPER_REFUSED, ids=[row[1] for row in UPPER_REFUSED])
@pytest.mark.parametrize("table", [ROOT, ROOT_L3, ROOT_L2])
def test_refused_upper_entries(entry: Callable[[Rig], int], why: str, table: int) -> None:
    rig = Rig().boot()
    before = rig.snapshot()
    assert code_of(rig.tables.update, table, 9, entry(rig)) == E.EINVAL, why
    assert rig.word(table, 9) == 0
    assert rig.snapshot() == before


@pytest.mark.parametrize("table", [ROOT, ROOT_L3, ROOT_L2])
def test_an_upper_entry_takes_a_table_into_the_tree_and_out_again(table: int) -> None:
    rig = Rig().boot()
    rig.unmap(B)
    level = rig.frames.kind[table]
    before = rig.snapshot()
    flushes = rig.engine.flushes
    rig.tables.update(table, 9, rig.pte(B, x86.PTE_P | x86.PTE_RW))
    assert rig.word(table, 9) & x86.PTE_US, "a present upper entry carries the user bit"
    assert rig.frames.kind[B] == level - 1 and rig.frames.count[B] == 1
    rig.check()
    rig.tables.update(table, 9, 0)
    assert rig.snapshot() == before
    assert rig.engine.flushes > flushes, "translations through the table are dropped"


def test_an_upper_entry_may_not_hold_its_own_table() -> None:
    rig = Rig().boot()
    before = rig.snapshot()
    for table in (ROOT, ROOT_L3, ROOT_L2):
        assert code_of(rig.tables.update, table, 9, rig.pte(table)) == E.EINVAL
    assert rig.snapshot() == before


@pytest.mark.parametrize("slot", range(256, 272))
def test_xens_slots_of_the_root_stay_xens(slot: int) -> None:
    rig = Rig().boot()
    before = rig.word(ROOT, slot)
    assert before == rig.domain.area.slots.get(slot, 0)
    for value in (0, rig.pte(ROOT_L3)):
        assert code_of(rig.tables.update, ROOT, slot, value) == E.EINVAL
    assert rig.word(ROOT, slot) == before


def test_what_a_new_root_has_in_xens_slots_is_overwritten() -> None:
    rig = Rig()
    rig.tables.pin(rig.mfn(rig.fill(A, {s: 0xDEAD_B000 | RW for s in range(256, 272)})), L4)
    assert [rig.word(A, s) for s in range(256, 272)] == [rig.domain.area.slots.get(s, 0) for s in range(256, 272)]
    rig.check()


@pytest.mark.parametrize("level", [L2, L3, L4])
def test_a_table_that_fails_half_way_leaves_no_counts(rig: Rig, level: int) -> None:
    """Good entries before the bad one are given back, at every level."""
    top = chain(rig, level)
    rig.memory.words[top * 512 + 400] = rig.pte(PAGES + 1)
    before = rig.snapshot()
    assert code_of(rig.tables.pin, rig.mfn(top), level) == E.EINVAL
    assert rig.snapshot() == before
    rig.memory.words[top * 512 + 400] = 0
    rig.memory.words[A * 512 + 511] = (BASE - 1) << 12 | RW
    assert code_of(rig.tables.pin, rig.mfn(top), level) == E.EBUSY, "the leaf's own error comes through"
    assert rig.snapshot() == before


def test_replacing_an_entry_moves_the_count() -> None:
    rig = Rig().boot()
    rig.tables.update(ROOT_L1, A, rig.pte(B))
    assert rig.frames.count[A] == 0 and rig.frames.count[B] == 2
    rig.tables.update(ROOT_L1, A, rig.pte(B, RO))
    assert rig.frames.count[B] == 1 and rig.frames.refs[B] == 3
    rig.check()


def test_a_change_of_free_bits_needs_no_validation() -> None:
    rig = Rig().boot()
    before = rig.snapshot()
    for flags in (x86.PTE_D, 7 << 9, x86.PTE_G, 0x3FF << 52, 0):
        rig.tables.update(ROOT_L1, A, rig.pte(A) | flags)
        assert rig.word(ROOT_L1, A) == rig.pte(A) | flags
    assert rig.snapshot() == before
    rig.check()


def test_preserve_ad_keeps_what_the_processor_set() -> None:
    rig = Rig().boot()
    rig.tables.update(ROOT_L1, A, rig.pte(A) | x86.PTE_D)
    rig.tables.update(ROOT_L1, A, rig.pte(A, RO & ~x86.PTE_A), preserve_ad=True)
    assert rig.word(ROOT_L1, A) == rig.pte(A, RO | x86.PTE_D)


def test_an_update_of_a_plain_frame_is_a_write_and_of_descriptors_is_refused() -> None:
    rig = Rig().boot()
    rig.tables.update(A, 5, 0x1234)
    assert rig.word(A, 5) == 0x1234
    rig.make_readonly(B)
    rig.tables.get_type(B, SEGDESC)
    assert code_of(rig.tables.update, B, 0, 0x1234) == E.EINVAL
    assert rig.word(B, 0) == 0


def test_a_new_page_table_is_flushed_from_stale_writable_translations() -> None:
    rig = Rig().boot()
    rig.unmap(A)
    flushes = rig.engine.flushes
    rig.tables.pin(rig.mfn(A), L1)
    assert rig.engine.flushes == flushes + 1, "the guest may still write through its old translation"
    rig.unmap(B)
    rig.engine.flush_all()
    flushes = rig.engine.flushes
    rig.tables.pin(rig.mfn(B), L1)
    assert rig.engine.flushes == flushes, "flushed since: not again"


def test_a_pinned_table_survives_its_last_entry() -> None:
    rig = Rig().boot()
    rig.tables.pin(rig.mfn(ROOT_L1), L1)
    rig.tables.update(ROOT_L2, 0, 0)
    assert rig.frames.kind[ROOT_L1] == L1 and rig.frames.count[ROOT_L1] == 1
    rig.check()
    rig.tables.unpin(rig.mfn(ROOT_L1))
    assert rig.frames.kind[ROOT_L1] == NONE
    assert code_of(rig.tables.unpin, rig.mfn(ROOT_L1)) == E.EINVAL
    rig.check()


def test_a_loaded_root_survives_its_unpinning() -> None:
    rig = Rig().boot()
    rig.tables.unpin(rig.mfn(ROOT))
    assert rig.frames.kind[ROOT] == L4 and rig.frames.count[ROOT] == 1
    rig.check()


def test_recount_notices_each_kind_of_error() -> None:
    for spoil, word in (
        (lambda r: r.frames.count.__setitem__(A, 2), "count"),
        (lambda r: r.frames.refs.__setitem__(A, 9), "refs"),
        (lambda r: r.frames.kind.__setitem__(ROOT_L1, WRITABLE), "uses"),
        (lambda r: r.memory.words.__setitem__(ROOT_L1 * 512 + 99, (BASE - 1) << 12 | RO), "not the domain's"),
    ):
        rig = Rig().boot()
        rig.check()
        tally = Tally(rig.domain.tables)
        assert tally.agrees(rig.domain.holds()) and tally.agrees(rig.domain.holds())
        spoil(rig)
        assert not tally.agrees(rig.domain.holds()) and not Tally(rig.domain.tables).agrees(rig.domain.holds())
        assert any(word in line for line in rig.domain.recount()), word


def test_a_writable_executable_entry_waits_for_its_first_execution(rig: Rig) -> None:
    rig.tables.lazy_nx = True
    rig.fill(A, {3: rig.pte(EXTRA), 4: rig.pte(EXTRA, RO), 5: rig.pte(EXTRA) | NX})
    rig.tables.pin(rig.mfn(A), L1)
    words, at = rig.tables.words, A * 512
    assert [words[at + slot] & LAZY_NX for slot in (3, 4, 5)] == [LAZY_NX, 0, NX]
    rig.tables.update(A, 6, rig.pte(EXTRA))
    assert words[at + 6] & LAZY_NX == LAZY_NX
    assert not rig.tables.allow_execution(at + 4), "nothing was in the way"
    assert not rig.tables.allow_execution(at + 5), "the guest forbids it"
    assert not rig.tables.allow_execution(at + 7), "not present"
    assert not rig.tables.allow_execution(-1)
    assert not rig.frames.executed[EXTRA] or words[at + 4] & NX == 0
    assert rig.tables.allow_execution(at + 6)
    assert words[at + 6] & LAZY_NX == 0
    assert rig.frames.executed[EXTRA]
    assert words[at + 3] & LAZY_NX == LAZY_NX, "another mapping of the frame is not concerned"
    rig.check()


def test_without_lazy_nx_entries_are_stored_as_they_are(rig: Rig) -> None:
    rig.fill(A, {3: rig.pte(EXTRA)})
    rig.tables.pin(rig.mfn(A), L1)
    rig.tables.update(A, 4, rig.pte(EXTRA))
    assert [rig.tables.words[A * 512 + slot] & LAZY_NX for slot in (3, 4)] == [0, 0]
