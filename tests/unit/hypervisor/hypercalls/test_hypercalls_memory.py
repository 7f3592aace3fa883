"""Memory, page tables and information by hypercall: arguments, result, what is left behind."""

from __future__ import annotations

import struct

import pytest
from pv_rig import BASE, FIRST_FREE, NX, PAGES, RO, ROOT, ROOT_L1, RW, E, Rig, call, put

from hypervisor import abi
from hypervisor.engines import x86
from hypervisor.hypercalls.memory import MAX_EXTENTS, START_EXTENT_SHIFT
from hypervisor.hypercalls.registry import Continuation
from hypervisor.memory.frames import L1, L4
from hypervisor.memory.xenarea import INVALID_M2P_ENTRY

ARG, OUT = FIRST_FREE * 4096, (FIRST_FREE + 1) * 4096
TABLE, DATA, SPARE = FIRST_FREE + 2, FIRST_FREE + 3, FIRST_FREE + 4


@pytest.fixture
def rig() -> Rig:
    return Rig(max_pages=PAGES + 8).boot()


# -- memory


def reservation(rig: Rig, *mfns: int, order: int = 0, dom: int = abi.DOMID_SELF, count: int | None = None) -> int:
    put(rig, f"<{len(mfns)}Q", *mfns, at=OUT)
    return put(rig, "<QQIIHxxxxxx", OUT, len(mfns) if count is None else count, order, 0, dom)


def test_decrease_and_populate_exchange_frames_with_the_pool(rig: Rig) -> None:
    pages = rig.frames.pages()
    rig.unmap(DATA, SPARE)
    rig.put(DATA * 4096, b"secret")
    reservation(rig, rig.mfn(DATA), rig.mfn(SPARE))
    flushes = rig.engine.flushes
    assert call(rig, abi.HYPERVISOR_memory_op, abi.XENMEM_decrease_reservation, ARG) == 2
    assert rig.frames.pages() == pages - 2 and not rig.frames.owned(DATA)
    assert rig.domain.area.m2p(rig.mfn(DATA)) == INVALID_M2P_ENTRY and rig.get(DATA * 4096, 6) == bytes(6)
    assert rig.engine.flushes > flushes, "no translation of a frame that was given back may stay"
    rig.check()
    reservation(rig, 77, 78)
    assert call(rig, abi.HYPERVISOR_memory_op, abi.XENMEM_populate_physmap, ARG) == 2
    mfns = struct.unpack("<2Q", rig.get(OUT, 16))
    assert mfns == (rig.mfn(DATA), rig.mfn(SPARE))
    assert [rig.domain.area.m2p(m) for m in mfns] == [77, 78]
    rig.check()


def test_populate_ends_where_the_domains_maximum_is(rig: Rig) -> None:
    reservation(rig, *range(12))
    assert call(rig, abi.HYPERVISOR_memory_op, abi.XENMEM_populate_physmap, ARG) == 8
    assert rig.frames.pages() == PAGES + 8
    assert (
        call(rig, abi.HYPERVISOR_memory_op, abi.XENMEM_current_reservation, put(rig, "<H", abi.DOMID_SELF)) == PAGES + 8
    )
    rig.check()


@pytest.mark.parametrize(
    ("mfn", "why"),
    [
        (BASE + ROOT_L1, "a page table"), (BASE + DATA, "still mapped"), (BASE - 1, "a neighbour's"), (0, "frame 0"),
        (BASE + PAGES + 8, "shared_info"), (BASE + PAGES + 9, "Xen's own"), (BASE + PAGES, "not the domain's now"),
    ],
)  # fmt: skip
def test_what_cannot_be_given_back(rig: Rig, mfn: int, why: str) -> None:
    before = rig.snapshot()
    reservation(rig, mfn)
    assert call(rig, abi.HYPERVISOR_memory_op, abi.XENMEM_decrease_reservation, ARG) == 0, why
    assert rig.snapshot() == before


def test_reservations_that_make_no_sense(rig: Rig) -> None:
    op = abi.XENMEM_decrease_reservation
    for kwargs, result in (
        ({"order": 9}, -E.EINVAL),
        ({"dom": 5}, -E.ESRCH),
        ({"count": MAX_EXTENTS + 1}, 0),
        ({"count": (1 << 64) - 1}, 0),
    ):
        reservation(rig, rig.mfn(DATA), **kwargs)
        assert call(rig, abi.HYPERVISOR_memory_op, op, ARG) == result, kwargs
    assert call(rig, abi.HYPERVISOR_memory_op, op, 1 << 40) == 0
    reservation(rig, rig.mfn(DATA))
    assert call(rig, abi.HYPERVISOR_memory_op, op | 5 << START_EXTENT_SHIFT, ARG) == 5, "begins behind the end"


def test_a_long_reservation_says_where_it_stopped(rig: Rig) -> None:
    """A guest that ballooned out 1030 of its pages, in two goes."""
    rig = Rig(pages=PAGES, max_pages=2000).boot()
    base = 16 * 4096
    put(rig, "<QQIIHxxxxxx", base, 1030, 0, 0, abi.DOMID_SELF)
    rig.put(base, struct.pack("<1030Q", *range(PAGES, PAGES + 1030)))
    rig.domain.preempt = True
    with pytest.raises(Continuation) as caught:
        call(rig, abi.HYPERVISOR_memory_op, abi.XENMEM_populate_physmap, ARG)
    command, argument = caught.value.arguments
    assert (command >> START_EXTENT_SHIFT, argument) == (512, ARG) and rig.frames.pages() == PAGES + 512
    rig.domain.preempt = False
    assert call(rig, abi.HYPERVISOR_memory_op, command, ARG) == 1030
    assert rig.frames.pages() == PAGES + 1030
    assert len(set(struct.unpack("<1030Q", rig.get(base, 8240)))) == 1030
    rig.check()


def test_memory_questions(rig: Rig) -> None:
    put(rig, "<I4xQ", 1, OUT)
    assert call(rig, abi.HYPERVISOR_memory_op, abi.XENMEM_memory_map, ARG) == 0
    assert struct.unpack("<QQI", rig.get(OUT, 20)) == (0, (PAGES + 8) * 4096, 1)
    assert call(rig, abi.HYPERVISOR_memory_op, abi.XENMEM_machphys_mapping, OUT) == 0
    assert struct.unpack("<2Q", rig.get(OUT, 16)) == (0xFFFF_8000_0000_0000, 0xFFFF_8040_0000_0000)
    assert call(rig, abi.HYPERVISOR_memory_op, abi.XENMEM_machine_memory_map, ARG) == -E.EPERM
    assert call(rig, abi.HYPERVISOR_memory_op, 62, ARG) == -E.ENOSYS


# -- page tables by hypercall


def mmuext(rig: Rig, command: int, first: int = 0, second: int = 0, foreign: int = abi.DOMID_SELF) -> int:
    put(rig, "<I4xQQ", command, first, second)
    return call(rig, abi.HYPERVISOR_mmuext_op, ARG, 1, 0, foreign)


def test_base_pointers_and_pins(rig: Rig) -> None:
    rig.unmap(TABLE)
    rig.fill(TABLE, {0: rig.word(ROOT, 0)})
    mfn = rig.mfn(TABLE)
    assert mmuext(rig, abi.MMUEXT_NEW_BASEPTR, mfn) == 0 and rig.regs.cr3 == rig.mpa(TABLE)
    rig.check()
    assert mmuext(rig, abi.MMUEXT_NEW_USER_BASEPTR, mfn) == 0 and rig.state.user_cr3 == rig.mpa(TABLE)
    assert mmuext(rig, abi.MMUEXT_PIN_L4_TABLE, mfn) == 0 and mmuext(rig, abi.MMUEXT_PIN_L4_TABLE, mfn) == -E.EINVAL
    rig.check()
    assert mmuext(rig, abi.MMUEXT_NEW_BASEPTR, rig.mfn(ROOT)) == 0
    assert mmuext(rig, abi.MMUEXT_NEW_USER_BASEPTR, 0) == 0 and mmuext(rig, abi.MMUEXT_UNPIN_TABLE, mfn) == 0
    assert rig.frames.count[TABLE] == 0
    for bad in (rig.mfn(DATA), 0, BASE - 1):
        assert mmuext(rig, abi.MMUEXT_NEW_BASEPTR, bad) == -E.EINVAL and rig.regs.cr3 == rig.mpa(ROOT)
    rig.check()


def test_flushes(rig: Rig) -> None:
    flushes = rig.engine.flushes
    for command in (abi.MMUEXT_TLB_FLUSH_LOCAL, abi.MMUEXT_TLB_FLUSH_MULTI, abi.MMUEXT_TLB_FLUSH_ALL):
        assert mmuext(rig, command) == 0
    assert rig.engine.flushes == flushes + 3
    for command in (abi.MMUEXT_INVLPG_LOCAL, abi.MMUEXT_INVLPG_MULTI, abi.MMUEXT_INVLPG_ALL):
        assert mmuext(rig, command, 0x5123) == 0
    assert rig.engine.pages_flushed == [0x5000] * 3
    assert mmuext(rig, abi.MMUEXT_FLUSH_CACHE) == -E.EACCES
    assert mmuext(rig, 99) == -E.ENOSYS and mmuext(rig, abi.MMUEXT_MARK_SUPER) == -E.EOPNOTSUPP


def test_page_contents(rig: Rig) -> None:
    rig.put(DATA * 4096, b"content")
    assert mmuext(rig, abi.MMUEXT_COPY_PAGE, rig.mfn(SPARE), rig.mfn(DATA)) == 0
    assert rig.get(SPARE * 4096, 7) == b"content"
    assert mmuext(rig, abi.MMUEXT_CLEAR_PAGE, rig.mfn(DATA)) == 0 and rig.get(DATA * 4096, 7) == bytes(7)
    before = rig.snapshot()
    for target, source in ((rig.mfn(ROOT), rig.mfn(SPARE)), (0, rig.mfn(SPARE)), (rig.mfn(DATA), BASE - 1)):
        assert mmuext(rig, abi.MMUEXT_COPY_PAGE, target, source) == -E.EINVAL
    assert rig.snapshot() == before


def test_foreign_domains_are_out_of_reach(rig: Rig) -> None:
    put(rig, "<2Q", rig.mpa(DATA), 1)
    for foreign, result in (
        (5, -E.ESRCH),
        (abi.DOMID_XEN, -E.EPERM),
        (6 << 16 | abi.DOMID_SELF, -E.ESRCH),
        (8 << 16 | 7, 0),
    ):
        assert call(rig, abi.HYPERVISOR_mmu_update, ARG, 1, 0, foreign) == result, hex(foreign)
    assert mmuext(rig, abi.MMUEXT_TLB_FLUSH_LOCAL, foreign=5) == -E.ESRCH
    assert call(rig, abi.HYPERVISOR_update_va_mapping_otherdomain, DATA * 4096, rig.pte(DATA), 0, 5) == -E.ESRCH
    assert call(rig, abi.HYPERVISOR_update_va_mapping_otherdomain, DATA * 4096, rig.pte(DATA), 0, 7) == 0


def test_mmu_updates_by_command(rig: Rig) -> None:
    at = (rig.mfn(ROOT_L1) << 12) + 8 * DATA
    for ptr, value, result in (
        (at | abi.MMU_PT_UPDATE_PRESERVE_AD, rig.pte(DATA, RO | NX), 0),
        (rig.mpa(DATA) | abi.MMU_MACHPHYS_UPDATE, 0x99, 0),
        ((BASE - 1) << 12 | abi.MMU_MACHPHYS_UPDATE, 0x99, -E.EINVAL),
        (at | 5, 0, -E.ENOSYS),
        ((BASE - 1) << 12, 0, -E.EINVAL),
    ):
        put(rig, "<2Q", ptr, value)
        assert call(rig, abi.HYPERVISOR_mmu_update, ARG, 1, 0, abi.DOMID_SELF) == result, hex(ptr)
    assert rig.domain.area.m2p(rig.mfn(DATA)) == 0x99
    rig.check()


def test_update_va_mapping(rig: Rig) -> None:
    va = DATA * 4096
    assert call(rig, abi.HYPERVISOR_update_va_mapping, va, rig.pte(SPARE, RW | NX), abi.UVMF_INVLPG) == 0
    assert rig.guest.translate(va) == SPARE * 4096 and rig.engine.pages_flushed == [va]
    flushes = rig.engine.flushes
    assert call(rig, abi.HYPERVISOR_update_va_mapping, va, rig.pte(DATA, RW | NX), abi.UVMF_TLB_FLUSH) == 0
    assert rig.engine.flushes == flushes + 1
    for bad_va in (1 << 39, 0xFFFF_8000_0000_0000, 0x9000_0000_0000_0000 & x86.MASK64 | 1 << 39):
        assert call(rig, abi.HYPERVISOR_update_va_mapping, bad_va, rig.pte(DATA), 0) == -E.EINVAL
    assert call(rig, abi.HYPERVISOR_update_va_mapping, va, rig.pte(ROOT), 0) == -E.EBUSY
    rig.check()


# -- information


def test_xen_version(rig: Rig) -> None:
    assert call(rig, abi.HYPERVISOR_xen_version, abi.XENVER_version) == 4 << 16 | 17
    assert call(rig, abi.HYPERVISOR_xen_version, abi.XENVER_pagesize) == 4096
    for command, size, start in (
        (abi.XENVER_extraversion, 16, b"."), (abi.XENVER_capabilities, 1024, b"xen-3.0-x86_64 "),
        (abi.XENVER_compile_info, 144, b""), (abi.XENVER_changeset, 64, b""), (abi.XENVER_commandline, 1024, b""),
        (abi.XENVER_platform_parameters, 8, struct.pack("<Q", 0xFFFF_8000_0000_0000)),
        (abi.XENVER_guest_handle, 16, bytes(15)),
    ):  # fmt: skip
        rig.put(OUT, b"\xee" * 2048)
        assert call(rig, abi.HYPERVISOR_xen_version, command, OUT) == 0
        assert rig.get(OUT, size).startswith(start) and rig.get(OUT + size, 8) == b"\xee" * 8, command
    put(rig, "<2I", 0, 0xEEEE)
    assert call(rig, abi.HYPERVISOR_xen_version, abi.XENVER_get_features, ARG) == 0 and rig.u32(ARG + 4) & 1 << 5
    put(rig, "<2I", 1000, 0)
    assert call(rig, abi.HYPERVISOR_xen_version, abi.XENVER_get_features, ARG) == -E.EINVAL
    assert call(rig, abi.HYPERVISOR_xen_version, 77) == -E.ENOSYS


def test_a_pinned_table_of_the_lowest_level(rig: Rig) -> None:
    rig.unmap(TABLE)
    assert mmuext(rig, abi.MMUEXT_PIN_L1_TABLE, rig.mfn(TABLE)) == 0 and rig.frames.kind[TABLE] == L1
    assert mmuext(rig, abi.MMUEXT_PIN_L4_TABLE, rig.mfn(TABLE)) == -E.EINVAL and rig.frames.kind[TABLE] != L4
