"""Memory, page tables and information by hypercall: arguments, result, what is left behind."""

from __future__ import annotations

import struct

import pytest
from pv_rig import BASE, FIRST_FREE, NX, PAGES, RO, ROOT, ROOT_L1, RW, E, Rig, call, put

from hypervisor import abi
from hypervisor.engines import x86
from hypervisor.memory.frames import L1, L4

ARG, OUT = FIRST_FREE * 4096, (FIRST_FREE + 1) * 4096
TABLE, DATA, SPARE = FIRST_FREE + 2, FIRST_FREE + 3, FIRST_FREE + 4


@pytest.fixture
def rig() -> Rig:
    return Rig(max_pages=PAGES + 8).boot()


# -- memory


def test_memory_questions(rig: Rig) -> None:
    put(rig, "<I4xQ", 1, OUT)
    assert call(rig, abi.HYPERVISOR_memory_op, abi.XENMEM_memory_map, ARG) == 0
    assert struct.unpack("<QQI", rig.get(OUT, 20)) == (0, (PAGES + 8) * 4096, 1)
    assert call(rig, abi.HYPERVISOR_memory_op, abi.XENMEM_machphys_mapping, OUT) == 0
    assert struct.unpack("<2Q", rig.get(OUT, 16)) == (0xFFFF_8000_0000_0000, 0xFFFF_8040_0000_0000)
    assert call(rig, abi.HYPERVISOR_memory_op, abi.XENMEM_machine_memory_map, ARG) == -E.EPERM
    assert call(rig, abi.HYPERVISOR_memory_op, 62, ARG) == -E.ENOSYS
    for command in (
        abi.XENMEM_exchange, abi.XENMEM_maximum_ram_page, abi.XENMEM_current_reservation, abi.XENMEM_maximum_gpfn
    ):  # fmt: skip
        assert call(rig, abi.HYPERVISOR_memory_op, command | 1 << 6, ARG) == -E.EINVAL, "nothing to go on with"


@pytest.mark.parametrize(("dom", "result"), [(0, -E.EPERM), (5, -E.ESRCH), (abi.DOMID_IO, -E.ESRCH), (7, PAGES + 8)])
def test_whose_maximum(rig: Rig, dom: int, result: int) -> None:
    put(rig, "<H", dom)
    assert call(rig, abi.HYPERVISOR_memory_op, abi.XENMEM_maximum_reservation, ARG) == result


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


SELF, IO, XEN = abi.DOMID_SELF, abi.DOMID_IO, abi.DOMID_XEN


@pytest.mark.parametrize(
    ("foreign", "update", "operation"),
    [
        (SELF, 0, 0), (5, -E.ESRCH, -E.ESRCH), (0, -E.EPERM, -E.EPERM), (XEN, -E.EPERM, -E.EPERM), (IO, 0, -E.EPERM),
        (7, -E.ESRCH, -E.ESRCH),  # oneself has no number here
        (abi.DOMID_COW, -E.ESRCH, -E.ESRCH), (abi.DOMID_IDLE, -E.ESRCH, -E.ESRCH),
        (6 << 16 | SELF, -E.ESRCH, None), (8 << 16 | SELF, 0, None), (8 << 16 | 7, -E.ESRCH, None),
        (1 << 16 | SELF, -E.EPERM, None), (8 << 16 | IO, 0, None),
    ],
)  # fmt: skip
def test_foreign_domains_are_out_of_reach(rig: Rig, foreign: int, update: int, operation: int | None) -> None:
    put(rig, "<2Q", rig.mpa(DATA), 1)
    assert call(rig, abi.HYPERVISOR_mmu_update, ARG, 1, 0, foreign) == update
    assert call(rig, abi.HYPERVISOR_mmu_update, ARG, 0, 0, foreign) == (0 if update != -E.ESRCH else update)
    if operation is None:
        return
    assert mmuext(rig, abi.MMUEXT_TLB_FLUSH_LOCAL, foreign=foreign) == operation
    entry = rig.pte(DATA, RW | NX)
    assert call(rig, abi.HYPERVISOR_update_va_mapping_otherdomain, DATA * 4096, entry, 0, foreign) == operation


@pytest.mark.parametrize(
    ("frame", "slot", "value", "result"),
    [
        (ROOT_L1, DATA, (BASE + SPARE) << 12 | RW, -E.EBUSY),  # its own frame is no I/O memory
        (ROOT_L1, DATA, (BASE + DATA) << 12 | RO, -E.EBUSY),
        (ROOT_L1, DATA, (BASE + DATA) << 12 | RW | NX | 1 << 55, 0),  # maps nothing new
        (ROOT_L1, DATA, 0, 0),
        (ROOT_L1, DATA, (BASE - 1) << 12 | RW, -E.EBUSY),  # a neighbour's
        (ROOT_L1, DATA, x86.PTE_ADDR | RW, -E.EINVAL),  # INVALID_MFN
        (ROOT_L1, DATA, 5 << 12 | RW, -E.EPERM),  # I/O memory, but not the domain's
        (ROOT_L1, DATA, (BASE + DATA) << 12 | RW | x86.PTE_PSE, -E.EINVAL),
        (ROOT, 0, (BASE + 2) << 12 | RW, -E.EINVAL),
        (ROOT, 5, 0, -E.EINVAL),
        (DATA, 5, 0x1234, 0),
    ],
)
def test_with_io_memory_as_the_owner(rig: Rig, frame: int, slot: int, value: int, result: int) -> None:
    put(rig, "<2Q", rig.mpa(frame, 8 * slot), value)
    before = rig.snapshot(), rig.word(frame, slot)
    assert call(rig, abi.HYPERVISOR_mmu_update, ARG, 1, 0, IO) == result
    assert result == 0 or before == (rig.snapshot(), rig.word(frame, slot))
    rig.check()


@pytest.mark.parametrize(("command", "result"), [(abi.MMU_MACHPHYS_UPDATE, -E.EINVAL), (5, -E.ENOSYS), (4, -E.ENOSYS)])
def test_other_updates_with_io_memory_as_the_owner(rig: Rig, command: int, result: int) -> None:
    put(rig, "<2Q", rig.mpa(DATA) | command, 1)
    assert call(rig, abi.HYPERVISOR_mmu_update, ARG, 1, 0, IO) == result


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
    rig.engine.runs_32_bit = True
    assert call(rig, abi.HYPERVISOR_xen_version, abi.XENVER_capabilities, OUT) == 0
    assert rig.get(OUT, 40).rstrip(b"\0") == b"xen-3.0-x86_64 xen-3.0-x86_32p "
    put(rig, "<2I", 0, 0xEEEE)
    assert call(rig, abi.HYPERVISOR_xen_version, abi.XENVER_get_features, ARG) == 0 and rig.u32(ARG + 4) & 1 << 5
    put(rig, "<2I", 1000, 0)
    assert call(rig, abi.HYPERVISOR_xen_version, abi.XENVER_get_features, ARG) == -E.EINVAL
    assert call(rig, abi.HYPERVISOR_xen_version, 77) == -E.ENOSYS


def test_a_pinned_table_of_the_lowest_level(rig: Rig) -> None:
    rig.unmap(TABLE)
    assert mmuext(rig, abi.MMUEXT_PIN_L1_TABLE, rig.mfn(TABLE)) == 0 and rig.frames.kind[TABLE] == L1
    assert mmuext(rig, abi.MMUEXT_PIN_L4_TABLE, rig.mfn(TABLE)) == -E.EINVAL and rig.frames.kind[TABLE] != L4
