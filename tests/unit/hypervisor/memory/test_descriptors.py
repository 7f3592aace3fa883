"""Descriptors a guest may have, the GDT and LDT windows, and its view of the M2P."""

from __future__ import annotations

import pytest
from pv_rig import BASE, FIRST_FREE, PAGES, RO, ROOT, E, Rig, code_of

from hypervisor import abi
from hypervisor.engines import x86
from hypervisor.errors import HypervisorBug
from hypervisor.memory import layout
from hypervisor.memory.segdesc import check_descriptor, gate_selector_ok
from hypervisor.memory.xenarea import INVALID_M2P_ENTRY

A, B = FIRST_FREE, FIRST_FREE + 1
DPL = 3 << 45

DESCRIPTORS = [
    # given, stored (None: refused), what it is
    (0, 0, "nothing"),
    (0x0000_7FFF_FFFF_FFFF, 0x0000_7FFF_FFFF_FFFF, "not present, whatever else"),
    (0x00CF_9300_0000_FFFF, 0x00CF_F300_0000_FFFF, "data at DPL 0 becomes DPL 3"),
    (0x00CF_F300_0000_FFFF, 0x00CF_F300_0000_FFFF, "data at DPL 3"),
    (0x00AF_9B00_0000_FFFF, 0x00AF_FB00_0000_FFFF, "64-bit code"),
    (0x00CF_BB00_0000_FFFF, 0x00CF_FB00_0000_FFFF, "32-bit code at DPL 1"),
    (0xFFCF_F3FF_FFFF_FFFF, 0xFFCF_F3FF_FFFF_FFFF, "any base and limit"),
    (0x0000_8200_0000_0000, None, "an LDT"),
    (0x0000_8900_0000_0067, None, "a TSS"),
    (0x0000_8B00_0000_0067, None, "a busy TSS"),
    (0x0000_8E00_0000_0000, None, "an interrupt gate"),
    (0x0000_8F00_0000_0000, None, "a trap gate"),
    (0x0000_8500_0000_0000, None, "a task gate"),
    (0x0000_8000_0000_1234, 0x0000_8000_0000_1234, "type 0: a call gate's second half"),
    (0x1234_EC00_E033_5678, 0x1234_8C00_E033_5678, "a call gate's DPL moves to the selector"),
    (0x1234_8C00_E030_5678, None, "a call gate to a reserved selector that is none of Xen's flat ones"),
    (0x1234_EC01_E033_5678, None, "a call gate with reserved bits"),
    (0x1234_8C00_0010_5678, 0x1234_8C00_0013_5678, "a call gate to the guest's own code"),
]


@pytest.mark.parametrize(("given", "stored", "what"), DESCRIPTORS, ids=[row[2] for row in DESCRIPTORS])
def test_descriptors(given: int, stored: int | None, what: str) -> None:
    assert check_descriptor(given) == stored, what


@pytest.mark.parametrize(
    ("selector", "good"),
    [(0x10, True), (14 * 512 * 8 - 8, True), (0xE033, True), (0xE023, True), (0xE02B, False), (0xFFFC, True)],
)
def test_gate_selectors(selector: int, good: bool) -> None:
    assert gate_selector_ok(selector) is good


@pytest.fixture
def rig() -> Rig:
    return Rig().boot()


def gdt(rig: Rig, frame: int, entries: dict[int, int]) -> None:
    rig.fill(frame, entries)
    rig.make_readonly(frame)


def test_a_gdt_shows_in_the_window_with_xens_own_entries(rig: Rig) -> None:
    gdt(rig, A, {2: 0x00CF_9300_0000_FFFF})
    rig.domain.set_gdt(rig.domain.running, [rig.mfn(A)], 512)
    area = rig.domain.area
    assert area.descriptor(0, 0x10, 0) == 0x00CF_F300_0000_FFFF, "its privilege was raised in place"
    assert area.descriptor(0, abi.FLAT_RING3_CS64, 0) == 0x00AF_FB00_0000_FFFF
    assert area.descriptor(0, abi.FLAT_RING3_SS64, 0) & x86.DESC_P
    assert area.descriptor(0, 0x1000, 0) == 0, "pages behind the last frame read as absent"
    assert area.descriptor(0, 0x14, 0) == 0, "no LDT"
    assert code_of(rig.tables.update_l1, 4 * 512 + A, rig.pte(A)) == E.EBUSY, "not writable while it is the GDT"
    rig.check()
    rig.domain.set_gdt(rig.domain.running, [], 0)
    assert area.descriptor(0, 0x10, 0) == 0
    rig.tables.update_l1(4 * 512 + A, rig.pte(A))
    rig.check()


def test_a_gdt_with_a_system_descriptor_is_refused_and_the_old_one_stays(rig: Rig) -> None:
    gdt(rig, A, {2: 0x00CF_F300_0000_FFFF})
    gdt(rig, B, {1: 0x00CF_9300_0000_FFFF, 5: 0x0000_8200_0000_0000})
    vcpu = rig.domain.running
    rig.domain.set_gdt(vcpu, [rig.mfn(A)], 512)
    before = rig.snapshot()
    for frames in ([A, B], [B], [A, ROOT], [A, 20], [A, -1]):
        assert code_of(rig.domain.set_gdt, vcpu, [rig.mfn(f) for f in frames], 1024) == E.EINVAL
        assert rig.snapshot() == before
        assert rig.domain.area.descriptor(0, 0x10, 0) == 0x00CF_F300_0000_FFFF
    assert rig.word(B, 1) == 0x00CF_9300_0000_FFFF, "nothing is fixed in a page that is refused"


def test_an_ldt_by_virtual_address(rig: Rig) -> None:
    gdt(rig, A, {0: 0x00CF_F300_0000_FFFF})
    gdt(rig, B, {0: 0x00AF_FB00_0000_FFFF})
    vcpu = rig.domain.running
    rig.domain.set_ldt(vcpu, A * 4096, 513)
    area = rig.domain.area
    assert area.descriptor(0, 0x04, vcpu.ldt_entries) == 0x00CF_F300_0000_FFFF
    assert area.descriptor(0, 512 * 8 + 4, vcpu.ldt_entries) == 0x00AF_FB00_0000_FFFF
    assert area.descriptor(0, 513 * 8 + 4, vcpu.ldt_entries) == 0, "beyond its limit"
    assert rig.engine.ldt == (0xE048, area.ldt_va(0), 513 * 8 - 1)
    rig.check()
    before = rig.snapshot()
    rig.unmap(B + 3)
    assert code_of(rig.domain.set_ldt, vcpu, (B + 3) * 4096, 1) == E.EINVAL
    assert vcpu.ldt_entries == 513
    rig.domain.set_ldt(vcpu, 0, 0)
    assert area.descriptor(0, 0x04, vcpu.ldt_entries) == 0 and rig.engine.ldt[0] == 0
    assert rig.snapshot() != before
    rig.check()


def m2p_read(rig: Rig, mfn: int) -> tuple[int, int]:
    """(entry, leaf flags) as a guest reads the M2P, by walking its tables."""
    va = layout.M2P_VIRT_START + 8 * mfn
    table = ROOT
    for shift in (39, 30, 21, 12):
        entry = rig.word(table, (va >> shift) & 511)
        assert entry & x86.PTE_P, f"not mapped at {shift}"
        table = ((entry & x86.PTE_ADDR) >> 12) - BASE
        assert entry & x86.PTE_US
    return rig.word(table, mfn % 512), entry


@pytest.mark.parametrize("mfn", [BASE, BASE + 5, BASE + PAGES - 1])
def test_the_m2p_knows_the_own_frames(rig: Rig, mfn: int) -> None:
    value, entry = m2p_read(rig, mfn)
    assert value == mfn - BASE
    assert not entry & x86.PTE_RW
    rig.domain.area.set_m2p(mfn, 0x77)
    assert m2p_read(rig, mfn)[0] == 0x77 == rig.domain.area.m2p(mfn)


@pytest.mark.parametrize("mfn", [0, 1, BASE - 1, BASE + PAGES, BASE + 100_000, layout.MAX_MFN - 1])
def test_the_m2p_tells_nothing_of_other_frames(rig: Rig, mfn: int) -> None:
    value, entry = m2p_read(rig, mfn)
    assert value == INVALID_M2P_ENTRY
    assert not entry & x86.PTE_RW


def test_shared_frames_come_zeroed_and_run_out_loudly(rig: Rig) -> None:
    index = rig.domain.area.take_shared()
    assert rig.frames.owned(index) and rig.word(index, 0) == 0
    rig.tables.update_l1(4 * 512 + 300, rig.pte(index))
    rig.check()
    with pytest.raises(HypervisorBug, match="used up"):
        for _ in range(rig.memory.frames):
            rig.domain.area.take_shared()


def test_every_size_of_domain_has_room_for_xens_frames() -> None:
    for pages in (1, 63, 500, 513, 5000):
        rig = Rig(pages=pages)
        rig.domain.grants.grow(32)
        assert rig.domain.area.m2p(BASE + pages - 1) == pages - 1
        assert rig.pte(0, RO)
