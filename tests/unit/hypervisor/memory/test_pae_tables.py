"""PAE page tables, the compatibility M2P, and a 32-bit kernel's view of its memory."""

from __future__ import annotations

import random

import pytest
from pv_rig import BASE, FIRST_FREE, NX, PAGES, E, code_of
from pv_rig32 import KRO, KRW, ROOT3, ROOT_L1, ROOT_L2, Rig32

from hypervisor import abi
from hypervisor.engines import x86
from hypervisor.errors import Unsupported, XenError
from hypervisor.memory.frames import L1, L2, L2_XEN, L3, L4, NONE, WRITABLE
from hypervisor.memory.guest32 import MAX_SCRATCH, SCRATCH
from hypervisor.memory.segdesc32 import check_descriptor, fix_selector
from hypervisor.memory.xenarea32 import FIRST_XEN_L2_SLOT, M2P_ENTRIES, XenArea32

A, B, C, D, EXTRA = range(FIRST_FREE, FIRST_FREE + 5)
USER = KRW | x86.PTE_US


@pytest.fixture
def rig() -> Rig32:
    return Rig32()


def tree(rig: Rig32) -> None:
    """An L1 in A, an L2 in B, a last L2 in C, the L3 in D."""
    rig.fill(A, {3: rig.pte(EXTRA, KRW), 4: rig.pte(EXTRA, KRO | x86.PTE_US)})
    rig.fill(B, {7: rig.pte(A, KRW)})
    rig.fill(C, {9: rig.pte(A, KRW)})
    rig.fill(D, {1: rig.pte(B, 1), 3: rig.pte(C, 1), 4: 0xDEAD, 511: rig.pte(EXTRA, KRW)})


def test_a_root_is_validated_and_given_back(rig: Rig32) -> None:
    tree(rig)
    before = rig.snapshot()
    rig.tables.pin(rig.mfn(D), L3)
    assert [rig.frames.kind[i] for i in (A, B, C, D)] == [L1, L2, L2_XEN, L3]
    assert rig.word(D, 4) == rig.word(D, 511) == 0, "entries that the processor would see are gone"
    assert rig.word(D, 1) == rig.pte(B, 7) and rig.word(D, 3) == rig.pte(C, 7)
    assert rig.word(A, 3) == rig.pte(EXTRA, KRW), "user bits mean what they say: none is added"
    assert [rig.word(C, slot) != 0 for slot in (FIRST_XEN_L2_SLOT - 1, FIRST_XEN_L2_SLOT, 511)] == [False, True, True]
    rig.check()
    rig.tables.unpin(rig.mfn(D))
    assert rig.snapshot() == before
    assert rig.word(C, FIRST_XEN_L2_SLOT) == 0 and rig.word(D, 3) == rig.pte(C, 1)


@pytest.mark.parametrize(
    ("slot", "entry", "why"),
    [
        (3, 0, "no last entry"),
        (3, "B|2", "an L2 that another entry uses already"),
        (0, "A|1", "an L1 where an L2 belongs"),
        (0, "B|0x81", "a superpage"),
        (0, "B|NX", "not executable"),
        (0, "foreign", "a frame of nobody's"),
    ],
)
def test_roots_that_are_refused(rig: Rig32, slot: int, entry: int | str, why: str) -> None:
    tree(rig)
    value = {
        "B|2": rig.pte(B, 3),
        "A|1": rig.pte(A, 1),
        "B|0x81": rig.pte(B, 0x81),
        "B|NX": rig.pte(B, 1) | NX,
        "foreign": 0x12345001,
        0: 0,
    }[entry]
    if slot == 0:
        rig.tables.pin(rig.mfn(A), L1)
    rig.memory.words[D * 512 + slot] = value
    before = rig.snapshot()
    assert code_of(rig.tables.pin, rig.mfn(D), L3) == E.EINVAL, why
    assert rig.snapshot() == before
    rig.check()


def test_a_last_l2_has_one_user(rig: Rig32) -> None:
    tree(rig)
    rig.tables.pin(rig.mfn(D), L3)
    rig.fill(EXTRA + 1, {3: rig.pte(C, 1)})
    assert code_of(rig.tables.pin, rig.mfn(EXTRA + 1), L3) == E.EINVAL
    rig.fill(EXTRA + 1, {0: rig.pte(C, 1), 3: rig.pte(EXTRA + 2, 1)})
    assert code_of(rig.tables.pin, rig.mfn(EXTRA + 1), L3) == E.EINVAL, "not in another slot either"
    assert code_of(rig.tables.pin, rig.mfn(C), L2) == E.EINVAL, "it cannot be pinned"
    rig.check()


def test_a_pinned_l2_is_no_last_l2(rig: Rig32) -> None:
    tree(rig)
    rig.tables.pin(rig.mfn(C), L2)
    assert code_of(rig.tables.pin, rig.mfn(D), L3) == E.EINVAL
    rig.check()


def test_there_are_no_l4_tables(rig: Rig32) -> None:
    before = rig.snapshot()
    rig.tables.pin(rig.mfn(EXTRA), L4)  # as in Xen: nothing happens
    assert rig.snapshot() == before and rig.frames.kind[EXTRA] == NONE
    assert code_of(rig.tables.get_type, EXTRA, L4) == E.EINVAL


def test_updates_of_upper_tables(rig: Rig32) -> None:
    tree(rig)
    rig.tables.pin(rig.mfn(D), L3)
    tables = rig.tables
    assert code_of(tables.update, C, FIRST_XEN_L2_SLOT, 0) == E.EPERM
    assert code_of(tables.update, C, 511, rig.pte(A, KRW)) == E.EPERM
    assert code_of(tables.update, D, 3, 0) == E.EINVAL
    assert code_of(tables.update, D, 4, rig.pte(B, 1)) == E.EINVAL
    tables.update(C, 9, 0)
    tables.update(C, 10, rig.pte(A, KRW))
    tables.update(D, 0, rig.pte(B, 1))
    assert rig.word(D, 0) == rig.pte(B, 7)
    tables.update(D, 0, rig.pte(B, 1) | 0x20)
    tables.update(D, 1, 0)
    assert code_of(tables.update, D, 2, rig.pte(B, 1) | NX) == E.EINVAL
    rig.check()


def test_leaf_entries_keep_their_user_bit(rig: Rig32) -> None:
    rig.boot()
    at = ROOT_L1 * 512 + 20
    rig.tables.update_l1(at, rig.pte(20, USER))
    assert rig.memory.words[at] == rig.pte(20, USER)
    rig.tables.update_l1(at, rig.pte(20, KRW))
    assert rig.memory.words[at] == rig.pte(20, KRW)
    assert code_of(rig.tables.update_l1, at, rig.pte(ROOT_L2, KRW)) == E.EBUSY
    assert code_of(rig.tables.update_l1, at, rig.pte(20, KRW) | 0x80) == E.EINVAL
    rig.check()


def test_random_updates_keep_exact_counts(rig: Rig32) -> None:
    tree(rig)
    rig.tables.pin(rig.mfn(D), L3)
    dice = random.Random(32)
    flags = (0, 1, KRW, KRO, USER, 1 | NX, KRW | 0x80)
    done = 0
    for _ in range(3000):
        target = dice.choice((A, A, B, C, D, EXTRA))
        slot = dice.choice((0, 1, 2, 3, 4, 9, FIRST_XEN_L2_SLOT - 1, FIRST_XEN_L2_SLOT, 511))
        entry = rig.pte(dice.randrange(FIRST_FREE, PAGES), dice.choice(flags))
        done += not code_of(rig.tables.update, target, slot, entry if dice.random() < 0.8 else 0)
        if dice.random() < 0.02:
            frame = rig.mfn(dice.randrange(FIRST_FREE, PAGES))
            code_of(dice.choice((rig.tables.unpin, lambda mfn: rig.tables.pin(mfn, dice.choice((L1, L2, L3))))), frame)
        if rig.frames.kind[D] == L3 and rig.frames.count[D] and dice.random() < 0.02:
            walk(rig, D)
    assert done > 300
    rig.check()


def walk(rig: Rig32, root: int) -> None:
    """What the processor reaches from L3 `root`: the domain's own frames, and none writable that is a table."""
    rig.area.set_guest_root(0, rig.mfn(root))
    todo = [(rig.area.root(0), 4, True)]
    leaves = 0
    while todo:
        table, level, writable = todo.pop()
        index = rig.memory.index(table >> 12)
        assert index >= 0, "a table that is not the domain's nor Xen's for it"
        for slot in range(512):
            entry = rig.word(index, slot)
            if not entry & x86.PTE_P or (level == 4 and slot != 0):  # no 32-bit address goes through another L4 slot
                continue
            target, allows = entry & x86.PTE_ADDR, writable and bool(entry & x86.PTE_RW)
            if level > 1:
                todo.append((target, level - 1, allows))
                continue
            leaves += 1
            frame = rig.memory.index(target >> 12)
            assert frame >= 0
            if allows and frame < rig.frames.ram:
                assert rig.frames.kind[frame] == WRITABLE and rig.frames.count[frame]
            elif allows:
                assert rig.frames.owned(frame), "Xen's own frames are never writable, but for those it shares"
    assert leaves >= 84 * 512, "the M2P is always there"
    rig.area.set_guest_root(0, 0)


# -- the machine-to-physical table and roots


def test_the_guest_sees_its_own_slice_of_the_m2p(rig: Rig32) -> None:
    rig.boot()

    def seen(mfn: int) -> int:
        va = abi.COMPAT_HYPERVISOR_VIRT_START + 4 * mfn
        table, base = rig.area.root(0), rig.memory.base_mpa
        for shift in (39, 30, 21, 12):
            entry = rig.memory.words[(table - base + ((va >> shift) & 511) * 8) >> 3]
            assert entry & x86.PTE_P
            if shift < 30:
                assert not entry & x86.PTE_US, "user programs do not see it"
            table = entry & x86.PTE_ADDR
        assert not entry & x86.PTE_RW
        return int(rig.memory.dwords[(table - base + (va & 0xFFF)) >> 2])

    assert [seen(BASE + pfn) for pfn in (0, 5, PAGES - 1)] == [0, 5, PAGES - 1]
    assert [seen(mfn) for mfn in (0, BASE - 1, BASE + PAGES, M2P_ENTRIES - 1)] == [x86.MASK32] * 4
    rig.area.set_m2p(BASE + 5, 77)
    assert seen(BASE + 5) == rig.area.m2p(BASE + 5) == 77


def test_frames_beyond_the_m2p_are_refused(rig: Rig32) -> None:
    rig.memory.base_mfn = M2P_ENTRIES - 10
    with pytest.raises(Unsupported, match="168 GiB"):
        XenArea32(rig.memory, rig.frames)


def test_switching_roots(rig: Rig32) -> None:
    rig.boot()
    tree(rig)
    rig.tables.update_l1(ROOT_L1 * 512 + D, 0)
    for table in (A, B, C, EXTRA):
        rig.tables.update_l1(ROOT_L1 * 512 + table, 0)
    rig.domain.new_baseptr(rig.mfn(D))
    assert rig.area.guest_root(0) == rig.mfn(D) and rig.regs.cr3 == rig.area.root(0)
    rig.check()
    assert code_of(rig.domain.new_baseptr, rig.mfn(B)) == E.EINVAL
    assert code_of(rig.domain.new_user_baseptr, rig.mfn(ROOT3)) == E.EINVAL
    rig.domain.new_baseptr(rig.mfn(ROOT3))
    assert rig.frames.kind[D] == NONE or not rig.frames.count[D]
    rig.check()


# -- copies


def test_the_kernel_copies_without_the_user_bit(rig: Rig32) -> None:
    rig.boot()
    rig.guest.write(0x14FFE, b"across")
    assert rig.guest.read(0x14FFE, 6) == b"across"
    assert rig.guest.translate(ROOT_L1 * 4096, write=True) == -1
    for va in (abi.COMPAT_HYPERVISOR_VIRT_START, 1 << 32, 0xFFFF_8000_0000_0000, PAGES << 12):
        assert code_of(rig.guest.read, va, 4) == E.EFAULT
    assert rig.guest.l1_slot(abi.COMPAT_HYPERVISOR_VIRT_START) == -1


def test_the_scratch_area_is_bounded_and_forgotten(rig: Rig32) -> None:
    guest = rig.domain.guest
    assert hasattr(guest, "translating")
    with guest.translating():
        first = guest.put(b"abc")
        second = guest.put(bytes(8))
        assert first >= SCRATCH and second % 16 == 0
        guest.write(second, b"12345678")
        assert guest.read(first, 3) == b"abc" and guest.read_u64(second) == int.from_bytes(b"12345678", "little")
        with pytest.raises(XenError):
            guest.read(second, 9)
        assert code_of(guest.put, bytes(MAX_SCRATCH)) == E.EFAULT
    assert code_of(guest.read, first, 1) == E.EFAULT


# -- descriptors

CODE64, CODE32, DATA0 = 0x00AF_9A00_0000_FFFF, 0x00CF_9A00_0000_FFFF, 0x00CF_9200_0000_FFFF


@pytest.mark.parametrize(
    ("given", "stored"),
    [
        (CODE64, None),
        (CODE32, CODE32 | 1 << 45),
        (DATA0, DATA0 | 1 << 45),
        (DATA0 | 3 << 45, DATA0 | 3 << 45),
        (0x00CF_920F_0000_57FF & ~x86.DESC_P, 0x00CF_920F_0000_57FF & ~x86.DESC_P),
        (0x00CF_B200_0000_5800, 0x00CF_B200_0000_FFFF),
        (0x0000_8C00_E019_0000, 0x0000_8C00_E019_0000),
        (0x0000_EC00_0008_1234, 0x0000_8C00_000B_1234),
        (0x0000_EC00_FFF8_1234, None),
        (0x0000_8900_0000_0067, None),
    ],
)
def test_check_descriptor(given: int, stored: int | None) -> None:
    """64-bit code is refused, ring 0 becomes ring 1, a flat segment reaches the M2P's end, a call gate faults."""
    assert check_descriptor(given) == stored


def test_selectors_get_ring_1_at_least() -> None:
    assert [fix_selector(value) for value in (0, 8, 9, 10, 11, 0xE018)] == [1, 9, 9, 10, 11, 0xE019]
