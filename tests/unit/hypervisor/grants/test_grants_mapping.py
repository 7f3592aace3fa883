"""map_grant_ref, unmap_grant_ref and unmap_and_replace: statuses, entries, flags and reference counts."""

from __future__ import annotations

import pytest
from grant_rig import APP, DEVICE, DOMID, HOST, PERMIT, PTE, READING, READONLY, RO, WRITING, FakePeer, GrantRig
from pv_rig import PAGE, ROOT, ROOT_L1

from hypervisor import abi
from hypervisor.engines import x86
from hypervisor.errors import XenError
from hypervisor.grants.peer import DEVICE_READ, DEVICE_WRITE, HOST_READ, HOST_WRITE
from hypervisor.memory.frames import L1, WRITABLE

VA = 50 * PAGE


def counts(rig: GrantRig, index: int) -> tuple[int, int]:
    return rig.frames.refs[index], rig.frames.count[index]


@pytest.mark.parametrize(
    ("flags", "pin", "seen", "refs", "types"),
    [
        (HOST, HOST_WRITE, READING | WRITING, 1, 1),
        (HOST | RO, HOST_READ, READING, 1, 0),
        (DEVICE, DEVICE_WRITE, READING | WRITING, 1, 1),
        (DEVICE | RO, DEVICE_READ, READING, 1, 0),
        (HOST | DEVICE, HOST_WRITE + DEVICE_WRITE, READING | WRITING, 2, 2),
        (HOST | DEVICE | RO, HOST_READ + DEVICE_READ, READING, 2, 0),
    ],
)
def test_a_mapping_counts_and_its_end_gives_all_back(
    any_rig: GrantRig, flags: int, pin: int, seen: int, refs: int, types: int
) -> None:
    rig = any_rig
    rig.unmap_va(VA)
    ref = rig.grant(9, 20)
    before, snapshot = counts(rig, 20), rig.snapshot()
    status, handle, bus = rig.map(ref, flags)
    assert (status, bus) == (0, rig.mpa(20))
    assert rig.grants.own.pin_of(ref) == pin and rig.flags(ref) == seen
    assert counts(rig, 20) == (before[0] + refs, before[1] + types)
    rig.check()
    assert rig.unmap(handle, VA if flags & HOST else 0, bus if flags & DEVICE else 0) == 0
    assert rig.flags(ref) == 0 and rig.grants.own.pin_of(ref) == 0
    assert rig.snapshot() == snapshot and rig.entry(VA) == 0
    assert len(rig.grants.mapper.maptrack) == 0
    rig.check()


def test_the_entry_is_what_xen_makes(rig: GrantRig) -> None:
    ref = rig.grant(8, 20)
    kernel = x86.PTE_P | x86.PTE_A | x86.PTE_D | x86.PTE_NX | x86.PTE_US | 1 << 52
    assert rig.map(ref, HOST)[0] == 0
    assert rig.entry(VA) == rig.mpa(20) | kernel | x86.PTE_RW
    assert rig.map(ref, HOST | RO | 5 << 16, VA + PAGE)[0] == 0
    assert rig.entry(VA + PAGE) == rig.mpa(20) | kernel | 5 << 9
    assert rig.map(ref, HOST | APP, VA + 2 * PAGE)[0] == 0
    assert rig.entry(VA + 2 * PAGE) == rig.mpa(20) | kernel & ~(1 << 52) | x86.PTE_RW
    rig.check()


def test_a_mapping_replaces_what_was_mapped_there(rig: GrantRig) -> None:
    ref = rig.grant(8, 20)
    refs = rig.frames.refs[50]
    assert rig.map(ref)[0] == 0
    assert rig.frames.refs[50] == refs - 1
    rig.check()


@pytest.mark.parametrize("off", [0, 7])
def test_by_the_machine_address_of_the_entry(rig: GrantRig, off: int) -> None:
    ref = rig.grant(8, 20)
    at = rig.mpa(ROOT_L1, 50 * 8) + off
    before = rig.snapshot()
    status, handle, _ = rig.map(ref, HOST | PTE, at)
    if off:
        assert status == abi.GNTST_general_error and rig.snapshot() == before and rig.flags(ref) == 0
        return
    assert status == 0 and rig.entry(VA) >> 12 & 0xFFFFF == rig.mfn(20)
    assert rig.replace(handle, VA + PAGE, at) == abi.GNTST_general_error
    assert rig.unmap(handle, at) == 0 and rig.entry(VA) == 0
    rig.check()


BAD = [
    ("no such grant", {"ref": 512}, abi.GNTST_bad_gntref),
    ("a grant number beyond all", {"ref": 0xFFFF_FFFF}, abi.GNTST_bad_gntref),
    ("an invalid grant", {"ref": 11}, abi.GNTST_general_error),
    ("a grant for somebody else", {"ref": 10}, abi.GNTST_general_error),
    ("a read-only grant, for writing", {"ref": 12}, abi.GNTST_general_error),
    ("a frame of nobody's", {"ref": 13}, abi.GNTST_bad_page),
    ("a page table, for writing", {"ref": 14}, abi.GNTST_general_error),
    ("a frame accepted for transfer", {"ref": 15}, abi.GNTST_general_error),
    ("neither host nor device", {"ref": 9, "flags": RO}, abi.GNTST_bad_gntref),
    ("no such domain", {"ref": 9, "domid": 5}, abi.GNTST_bad_domain),
    ("DOMID_SELF names none", {"ref": 9, "domid": abi.DOMID_SELF}, abi.GNTST_bad_domain),
    ("domain 0 grants nothing", {"ref": 9, "domid": 0}, abi.GNTST_general_error),
    ("domain 0 has one frame", {"ref": 512, "domid": 0}, abi.GNTST_bad_gntref),
    ("a linear address without a table", {"ref": 9, "host": 1 << 40}, abi.GNTST_general_error),
    ("Xen's own linear addresses", {"ref": 9, "host": 0xFFFF_8000_0000_0000}, abi.GNTST_general_error),
    ("the per-domain area", {"ref": 9, "host": 0xFFFF_8200_0000_0000}, abi.GNTST_general_error),
    ("a non-canonical address", {"ref": 9, "host": 1 << 47}, abi.GNTST_general_error),
    ("an entry of an L4", {"ref": 9, "flags": HOST | PTE, "host": (0x20000 + ROOT) << 12}, abi.GNTST_general_error),
    ("an entry of plain memory", {"ref": 9, "flags": HOST | PTE, "host": 0x20014 << 12}, abi.GNTST_general_error),
    ("an entry of no frame", {"ref": 9, "flags": HOST | PTE, "host": 1 << 50}, abi.GNTST_general_error),
]


@pytest.mark.parametrize(("arguments", "want"), [b[1:] for b in BAD], ids=[b[0] for b in BAD])
@pytest.mark.parametrize("device", [0, DEVICE])
def test_a_refused_mapping_leaves_no_trace(rig: GrantRig, arguments: dict[str, int], want: int, device: int) -> None:
    rig.grant(9, 20)
    rig.grant(10, 20, domid=8)
    rig.grant(12, 20, PERMIT | READONLY)
    rig.grant_mfn(13, 0x123)
    rig.grant(14, ROOT_L1)
    rig.grant(15, 20, abi.GTF_accept_transfer)
    before = rig.snapshot()
    given = dict(arguments)
    if given.get("flags", HOST) & HOST:
        given["flags"] = given.get("flags", HOST) | device
    assert rig.map(**given) == (want, 0xAAAA, 0xBBBB)
    assert rig.snapshot() == before and len(rig.grants.own) == 0 and len(rig.grants.mapper.maptrack) == 0
    assert all(rig.flags(ref) == 0 for ref in range(9, 15))
    rig.check()


def test_a_read_only_grant_of_a_page_table_may_be_mapped_read_only(rig: GrantRig) -> None:
    ref = rig.grant(8, ROOT_L1, PERMIT | READONLY)
    status, handle, _ = rig.map(ref, HOST | RO)
    assert status == 0
    assert rig.unmap(handle) == 0
    rig.check()


def test_a_writable_mapping_keeps_the_frame_from_becoming_a_table(rig: GrantRig) -> None:
    rig.unmap_va(20 * PAGE)
    _, handle, bus = rig.map(rig.grant(8, 20), HOST | DEVICE)
    rig.memory.clear_page(20)
    for _ in range(2):
        with pytest.raises(XenError):
            rig.tables.pin(rig.mfn(20), L1)
        rig.unmap(handle, VA, 0)
    assert rig.unmap(handle, 0, bus) == 0
    rig.tables.pin(rig.mfn(20), L1)
    rig.check()


def test_the_second_mapping_of_a_grant_uses_what_it_was_when_the_first_was_made(rig: GrantRig) -> None:
    """A hostile granter changes the entry meanwhile: only whether it may be written is looked at again."""
    ref = rig.grant(8, 20)
    first = rig.map(ref, HOST | RO)
    rig.grant(ref, 21, PERMIT | READONLY | READING, domid=8)
    second = rig.map(ref, HOST | RO, VA + PAGE)
    assert second[0] == 0 and second[2] == rig.mpa(20)
    assert rig.map(ref, HOST, VA + 2 * PAGE)[0] == abi.GNTST_general_error
    rig.grant(ref, 21, READING, domid=8)
    third = rig.map(ref, HOST, VA + 2 * PAGE)
    assert third[0] == 0 and third[2] == rig.mpa(20) and rig.flags(ref) == READING | WRITING
    assert rig.unmap(third[1], VA + 2 * PAGE) == 0 and rig.flags(ref) == READING
    assert rig.unmap(first[1]) == 0 and rig.flags(ref) == READING
    assert rig.unmap(second[1], VA + PAGE) == 0 and rig.flags(ref) == 0
    rig.check()


def test_a_grant_is_mapped_so_often_and_not_oftener(rig: GrantRig) -> None:
    ref = rig.grant(8, 20)
    handles = [rig.map(ref, DEVICE | RO)[:2] for _ in range(129)]
    assert [status for status, _ in handles] == [0] * 128 + [abi.GNTST_general_error]
    assert rig.map(ref, DEVICE)[0] == 0, "each kind of use has its own counter"
    rig.check_after_release()


def test_bad_unmaps(rig: GrantRig) -> None:
    ref = rig.grant(8, 20)
    _, handle, bus = rig.map(ref, HOST | DEVICE)
    for bad in (handle + 1, 256, 0xFFFF_FFFF):
        assert rig.unmap(bad) == abi.GNTST_bad_handle
    assert rig.unmap(handle, VA + PAGE) == abi.GNTST_general_error, "another page is mapped there"
    assert rig.unmap(handle, 1 << 40) == abi.GNTST_general_error
    assert rig.unmap(handle, 0, bus + PAGE) == abi.GNTST_bad_dev_addr
    assert rig.unmap(handle, 0, 0) == 0, "nothing asked for, nothing done"
    assert rig.grants.own.pin_of(ref) == HOST_WRITE + DEVICE_WRITE
    assert rig.unmap(handle, VA) == 0
    assert rig.unmap(handle, VA) == 0, "the host part is gone; as in Xen that is no error"
    assert rig.unmap(handle, 0, bus) == 0
    assert rig.unmap(handle, 0, bus) == abi.GNTST_bad_handle
    rig.check()


def test_the_entry_must_allow_what_the_mapping_did(rig: GrantRig) -> None:
    """XSA-234: the guest put a read-only entry for the same frame where a writable mapping was."""
    ref = rig.grant(8, 20)
    handle = rig.map(ref)[1]
    rig.map_plain(VA, 20, x86.PTE_P | x86.PTE_US)
    assert rig.unmap(handle) == abi.GNTST_general_error
    rig.check()
    rig.map_plain(VA, 20)
    assert rig.unmap(handle) == 0
    rig.check()


@pytest.mark.parametrize("flags", [HOST, HOST | RO, HOST | DEVICE])
def test_an_overwritten_mapping_gives_its_frame_back_but_stays_in_use(rig: GrantRig, flags: int) -> None:
    ref = rig.grant(8, 20)
    handle = rig.map(ref, flags)[1]
    rig.set_entry(VA, 0)
    rig.check()
    assert rig.flags(ref) & READING and rig.unmap(handle) == abi.GNTST_general_error
    rig.check_after_release()
    assert rig.flags(ref) == 0


def test_a_frame_given_back_under_a_stale_use_is_not_mapped_again(rig: GrantRig) -> None:
    rig.unmap_va(20 * PAGE)
    ref = rig.grant(8, 20)
    rig.map(ref, HOST | RO)
    rig.set_entry(VA, 0)
    rig.frames.refs[20] = 0  # as decrease_reservation does with the last reference
    assert rig.map(ref, HOST | RO)[0] == abi.GNTST_general_error
    assert rig.grants.own.pin_of(ref) == HOST_READ


def test_the_table_of_a_mapping_may_go(rig: GrantRig) -> None:
    """An L1 with a grant's entry is unhooked: the entry's own references go with it."""
    rig.unmap_va(30 * PAGE)
    rig.fill(30, {})
    rig.tables.pin(rig.mfn(30), L1)
    handle = rig.map(rig.grant(8, 20), HOST | PTE, rig.mpa(30, 16))[1]
    rig.check()
    rig.tables.unpin(rig.mfn(30))
    rig.check()
    assert rig.unmap(handle, rig.mpa(30, 16)) == abi.GNTST_general_error
    rig.check_after_release()


def test_unmap_and_replace_moves_the_other_entry(rig: GrantRig) -> None:
    handle = rig.map(rig.grant(8, 20))[1]
    other = rig.entry(VA + PAGE)
    assert rig.replace(handle, VA + PAGE) == 0
    assert rig.entry(VA) == other and rig.entry(VA + PAGE) == 0
    rig.check()


def test_unmap_and_replace_that_fails_loses_the_other_entry(rig: GrantRig) -> None:
    """As in Xen: the stolen entry is given back to nobody."""
    handle = rig.map(rig.grant(8, 20))[1]
    assert rig.replace(handle, VA) == abi.GNTST_general_error
    assert rig.entry(VA) == 0
    rig.check()
    assert rig.replace(handle, 1 << 40) == abi.GNTST_general_error
    rig.map_plain(VA, 20)
    assert rig.unmap(handle) == 0
    rig.check()


def test_the_grant_table_itself_may_be_granted(rig: GrantRig) -> None:
    ref = rig.grant(8, rig.grants.table.frames[0])
    status, handle, _ = rig.map(ref)
    assert status == 0 and rig.frames.kind[rig.grants.table.frames[0]] == WRITABLE
    assert rig.unmap(handle) == 0
    rig.check()


# -- grants of another domain


@pytest.fixture
def peer(rig: GrantRig) -> FakePeer:
    other = FakePeer(5)
    rig.grants.find_peer = lambda domid: other if domid == 5 else None
    return other


@pytest.mark.parametrize("flags", [HOST, HOST | RO, HOST | DEVICE])
def test_a_frame_of_another_domain(rig: GrantRig, peer: FakePeer, flags: int) -> None:
    rig.unmap_va(VA)
    before = rig.snapshot()
    status, handle, bus = rig.map(peer.offer(3, 1), flags, domid=5)
    assert status == 0 and bus == (peer.BASE + 1) << 12 and rig.entry(VA) >> 12 & 0xFFFFF == peer.BASE + 1
    rig.check()
    with pytest.raises(XenError):
        rig.set_entry(VA + PAGE, rig.entry(VA) & ~(1 << 52))
    assert rig.guest.translate(VA) == -1
    assert rig.unmap(handle, VA, bus) == 0
    assert peer.clean and rig.snapshot() == before
    rig.check()


@pytest.mark.parametrize("way", ["overwrite", "table", "replace", "executable", "end"])
def test_a_foreign_mapping_that_goes_in_another_way(rig: GrantRig, peer: FakePeer, way: str) -> None:
    rig.unmap_va(30 * PAGE)
    rig.fill(30, {})
    rig.tables.pin(rig.mfn(30), L1)
    rig.tables.update_l1(30 * 512, rig.pte(21, x86.PTE_P))
    handle = rig.map(peer.offer(3, 1), HOST | PTE, rig.mpa(30, 16), domid=5)[1]
    flushes = rig.engine.flushes
    if way == "overwrite":
        rig.tables.update_l1(30 * 512 + 2, 0)
    elif way == "table":
        rig.tables.unpin(rig.mfn(30))
    elif way == "replace":
        own = rig.map(rig.grant(8, 20), HOST | PTE, rig.mpa(30, 16))[1]
        assert rig.unmap(own, rig.mpa(30, 16)) == 0
    elif way == "executable":
        rig.tables.update_l1(30 * 512 + 2, rig.word(30, 2) & ~(x86.PTE_NX | 1 << 52))
        rig.check()
        rig.tables.update_l1(30 * 512 + 2, 0)
    if way != "end":
        assert rig.engine.flushes > flushes, "no translation outlives the use of the frame"
        assert not any(peer.holds.values()) and peer.pins == HOST_WRITE
        assert rig.unmap(handle, rig.mpa(30, 16)) == abi.GNTST_general_error
        rig.check()
    assert rig.grants.release() == 1
    assert peer.clean


def test_a_foreign_mapping_is_not_saved(rig: GrantRig, peer: FakePeer) -> None:
    handle = rig.map(peer.offer(3, 1), domid=5)[1]
    with pytest.raises(ValueError, match="other domains"):
        rig.grants.save()
    rig.unmap(handle)
    assert rig.grants.save()["maptrack"]["mappings"] == []


def test_what_another_domain_refuses(rig: GrantRig, peer: FakePeer) -> None:
    assert rig.map(4, domid=5)[0] == abi.GNTST_bad_gntref
    assert peer.clean and DOMID != 5
