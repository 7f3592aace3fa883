"""Copies to and from guest addresses: only what the guest itself could reach."""

from __future__ import annotations

import struct

import pytest
from pv_rig import FIRST_FREE, NX, PAGES, RO, ROOT_L1, ROOT_L2, RW, E, Rig, code_of

from hypervisor.engines import x86
from hypervisor.memory.guest import MAX_COPY
from hypervisor.memory.layout import M2P_VIRT_START

A, B = FIRST_FREE, FIRST_FREE + 1
VA = A * 4096


@pytest.fixture
def rig() -> Rig:
    return Rig().boot()


UNREACHABLE = [
    (0x0000_7FFF_FFFF_F000, "no table"),
    (0x0000_8000_0000_0000, "not canonical"),
    (0xFFFF_7FFF_FFFF_FFF8, "not canonical, below Xen"),
    (M2P_VIRT_START, "the M2P, though the guest can read it"),
    (0xFFFF_8200_0000_0000, "the per-domain area"),
    (0xFFFF_87FF_FFFF_FFF8, "the end of Xen's area"),
    (0xFFFF_8800_0000_0000, "behind Xen's area, no table"),
    (0xFFFF_FFFF_FFFF_FFF8, "the last word"),
    (PAGES * 4096, "behind the last page"),
]


@pytest.mark.parametrize(("va", "why"), UNREACHABLE, ids=[row[1] for row in UNREACHABLE])
def test_unreachable_addresses(rig: Rig, va: int, why: str) -> None:
    assert code_of(rig.guest.read, va, 8) == E.EFAULT, why
    assert code_of(rig.guest.read_u64, va) == E.EFAULT
    assert code_of(rig.guest.write, va, b"12345678") == E.EFAULT
    assert rig.guest.translate(va) == -1
    assert rig.guest.read(va, 0) == b"", "nothing is read for size 0"
    rig.guest.write(va, b"")


def test_read_write_round_trip_at_every_edge(rig: Rig) -> None:
    for va in (VA, VA + 1, VA + 4088, VA + 4089, VA + 4095):
        data = bytes(range(1, 24))
        rig.guest.write(va, data)
        assert rig.guest.read(va, len(data)) == data
        assert rig.get(va, len(data)) == data
        rig.guest.write_u64(va, 0x1122_3344_5566_7788)
        assert rig.guest.read_u64(va) == 0x1122_3344_5566_7788
        rig.guest.write_u32(va, 0x1_FFFF_FFFF)
        assert rig.guest.read_u32(va) == 0xFFFF_FFFF
    rig.put(VA, struct.pack("<HI", 1, 2))
    assert rig.guest.unpack(struct.Struct("<HI"), VA) == (1, 2)


def test_nothing_is_written_through_a_read_only_mapping(rig: Rig) -> None:
    rig.make_readonly(A)
    before = rig.get(VA, 4096)
    assert code_of(rig.guest.write, VA, b"x") == E.EFAULT
    assert rig.guest.translate(VA) == VA and rig.guest.translate(VA, write=True) == -1
    assert rig.get(VA, 4096) == before


@pytest.mark.parametrize("table", ["L2", "L3", "L4"])
def test_a_read_only_upper_level_takes_the_write_right(rig: Rig, table: str) -> None:
    index = {"L2": 3, "L3": 2, "L4": 1}[table]
    rig.tables.update(index, 0, rig.word(index, 0) & ~x86.PTE_RW)
    assert rig.guest.translate(VA) == VA
    assert code_of(rig.guest.write, VA, b"x") == E.EFAULT


def test_a_write_into_the_next_page_stops_at_it(rig: Rig) -> None:
    rig.unmap(B)
    assert code_of(rig.guest.write, VA + 4090, b"0123456789") == E.EFAULT
    assert rig.get(VA + 4090, 6) == b"012345", "what lay before is written, as in Xen"
    assert code_of(rig.guest.read, VA + 4090, 10) == E.EFAULT


def test_a_copy_is_bounded(rig: Rig) -> None:
    assert code_of(rig.guest.read, 0, MAX_COPY + 1) == E.EFAULT
    assert len(rig.guest.read(0, 3 * 4096)) == 3 * 4096


def test_a_copy_may_not_wrap_around(rig: Rig) -> None:
    last = rig.fill(A, {511: rig.pte(B)})
    assert last == A
    assert code_of(rig.guest.read, (1 << 64) - 4, 8) == E.EFAULT


def test_xens_descriptor_window_is_not_the_guests(rig: Rig) -> None:
    """It lies in the guest's tables, without the user bit."""
    walk = rig.word(1, 260)
    assert walk & x86.PTE_P and not walk & x86.PTE_US
    assert rig.guest.translate(rig.domain.area.gdt_va(0)) == -1


def test_l1_slot_finds_the_entry_whatever_it_holds(rig: Rig) -> None:
    assert rig.guest.l1_slot(VA) == ROOT_L1 * 512 + A
    rig.unmap(A)
    assert rig.guest.l1_slot(VA) == ROOT_L1 * 512 + A
    assert rig.guest.l1_slot(1 << 39) == -1
    rig.tables.update(ROOT_L2, 0, 0)
    assert rig.guest.l1_slot(VA) == -1


def test_writing_to_executed_code_tells_the_engine(rig: Rig) -> None:
    rig.tables.update_l1(ROOT_L1 * 512 + A, rig.pte(A, RW))
    rig.engine.written.clear()
    rig.guest.write(VA, b"code")
    assert rig.engine.written == [A]
    rig.guest.write(B * 4096, b"data")
    assert rig.engine.written == [A]


def test_each_access_sees_the_tables_as_they_are(rig: Rig) -> None:
    rig.guest.write(VA, b"old")
    rig.tables.update_l1(ROOT_L1 * 512 + A, rig.pte(B, RO | NX))
    assert rig.guest.read(VA, 3) == bytes(3)
    rig.unmap(A)
    assert code_of(rig.guest.read, VA, 3) == E.EFAULT
