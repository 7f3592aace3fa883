"""GNTTABOP_copy: all forms, their limits, sub-page and transitive grants, what a batch keeps in use."""

from __future__ import annotations

import pytest
from grant_rig import DOMID, HOST, PERMIT, READING, READONLY, RO, WRITING, FakePeer, GrantRig, copy_item
from pv_rig import PAGE, ROOT_L1

from hypervisor import abi
from hypervisor.grants.peer import HOST_READ

SOURCE, DEST = abi.GNTCOPY_source_gref, abi.GNTCOPY_dest_gref
SELF = abi.DOMID_SELF
SUB = PERMIT | abi.GTF_sub_page
A, B = 20, 21


@pytest.mark.parametrize("grants", [0, SOURCE, DEST, SOURCE | DEST])
@pytest.mark.parametrize("domid", [DOMID, SELF])
def test_each_form(any_rig: GrantRig, grants: int, domid: int) -> None:
    rig = any_rig
    rig.grant(8, A, PERMIT | READONLY)
    rig.grant(9, B)
    rig.put(A * PAGE + 100, b"granted bytes")
    source = (8, domid, 100) if grants & SOURCE else (rig.mfn(A), SELF, 100)
    target = (9, domid, 4083) if grants & DEST else (rig.mfn(B), SELF, 4083)
    before = rig.snapshot()
    assert rig.copy(source, target, 13, grants) == 0
    assert rig.get(B * PAGE + 4083, 13) == b"granted bytes"
    assert rig.flags(8) == rig.flags(9) == 0 and len(rig.grants.own) == 0 and rig.snapshot() == before
    rig.check()


def test_a_whole_page_and_nothing(rig: GrantRig) -> None:
    data = bytes(range(256)) * 16
    rig.put(A * PAGE, data)
    assert rig.copy((rig.mfn(A), SELF, 0), (rig.mfn(B), SELF, 0), PAGE) == 0
    assert rig.get(B * PAGE, PAGE) == data
    assert rig.copy((rig.mfn(A), SELF, PAGE), (rig.mfn(B), SELF, PAGE), 0) == 0
    assert rig.copy((rig.mfn(A), SELF, 0), (rig.mfn(A), SELF, 1), 100) == 0
    assert rig.get(A * PAGE, 101) == data[:1] + data[:100], "an overlapping copy is of what was there before"


REFUSED = [
    ("source beyond the page", (A, SELF, 4000), (B, SELF, 0), 97, 0, abi.GNTST_bad_copy_arg),
    ("destination beyond the page", (A, SELF, 0), (B, SELF, 4000), 97, 0, abi.GNTST_bad_copy_arg),
    ("offset beyond the page", (A, SELF, 5000), (B, SELF, 0), 0, 0, abi.GNTST_bad_copy_arg),
    ("the longest of all", (A, SELF, 65535), (B, SELF, 65535), 65535, 0, abi.GNTST_bad_copy_arg),
    ("a frame of its own by number", (A, DOMID, 0), (B, SELF, 0), 1, 0, abi.GNTST_permission_denied),
    ("a frame of another by number", (A, SELF, 0), (B, 0, 0), 1, 0, abi.GNTST_permission_denied),
    ("no such domain", (8, 5, 0), (B, SELF, 0), 1, SOURCE, abi.GNTST_bad_domain),
    ("no such destination domain", (A, SELF, 0), (9, 5, 0), 1, DEST, abi.GNTST_bad_domain),
    ("domain 0's grants", (8, 0, 0), (B, SELF, 0), 1, SOURCE, abi.GNTST_general_error),
    ("no such grant", (512, SELF, 0), (B, SELF, 0), 1, SOURCE, abi.GNTST_bad_gntref),
    ("an invalid grant", (30, SELF, 0), (B, SELF, 0), 1, SOURCE, abi.GNTST_general_error),
    ("a read-only grant as destination", (A, SELF, 0), (8, SELF, 0), 1, DEST, abi.GNTST_general_error),
    ("no frame as source", (0x999, SELF, 0), (B, SELF, 0), 1, 0, abi.GNTST_bad_page),
    ("no frame as destination", (A, SELF, 0), (0x999, SELF, 0), 1, 0, abi.GNTST_bad_page),
    ("a page table as destination", (A, SELF, 0), (ROOT_L1, SELF, 0), 1, 0, abi.GNTST_general_error),
    ("a granted page table", (A, SELF, 0), (10, SELF, 0), 1, DEST, abi.GNTST_general_error),
    ("a granted frame of nobody's", (11, SELF, 0), (B, SELF, 0), 1, SOURCE, abi.GNTST_bad_page),
]


@pytest.mark.parametrize(
    ("source", "target", "size", "grants", "want"), [r[1:] for r in REFUSED], ids=[r[0] for r in REFUSED]
)
def test_refused(
    any_rig: GrantRig, source: tuple[int, int, int], target: tuple[int, int, int], size: int, grants: int, want: int
) -> None:
    rig = any_rig
    rig.grant(8, A, PERMIT | READONLY)
    rig.grant(9, B)
    rig.grant(10, ROOT_L1)
    rig.grant_mfn(11, 0x123)
    before, content = rig.snapshot(), rig.get(B * PAGE, PAGE)
    number = source[0] if grants & SOURCE else rig.mfn(source[0])
    other = target[0] if grants & DEST else rig.mfn(target[0])
    if number == 512 and rig.grants.table.version == 2:
        number = 256
    assert rig.copy((number, *source[1:]), (other, *target[1:]), size, grants) == want
    assert rig.snapshot() == before and rig.get(B * PAGE, PAGE) == content
    assert len(rig.grants.own) == 0 and all(rig.flags(ref) == 0 for ref in range(8, 12))
    rig.check()


def test_a_page_table_may_be_read(rig: GrantRig) -> None:
    assert rig.copy((rig.mfn(ROOT_L1), SELF, 0), (rig.mfn(B), SELF, 0), 8) == 0
    assert rig.get(B * PAGE, 8) == rig.get(ROOT_L1 * PAGE, 8)


def test_a_batch_reports_each_item_and_keeps_nothing(rig: GrantRig) -> None:
    rig.grant(8, A)
    rig.grant(9, B)
    rig.put(A * PAGE, bytes(range(100)))
    items = [copy_item((8, SELF, n), (9, SELF, 50 - n), 1, SOURCE | DEST) for n in range(20)]
    items[7] = copy_item((8, SELF, 4096), (9, SELF, 0), 1, SOURCE | DEST)
    items[8] = copy_item((rig.mfn(A), SELF, 3), (rig.mfn(B), SELF, 60), 1, 0)
    items[9] = copy_item((rig.mfn(A), DOMID, 3), (9, SELF, 61), 1, DEST)
    at = 30 * PAGE
    assert rig.call(abi.GNTTABOP_copy, b"".join(items), 20, at) == 0
    statuses = [int.from_bytes(rig.get(at + n * 40 + 36, 2), "little", signed=True) for n in range(20)]
    want = [0] * 20
    want[7], want[9] = abi.GNTST_bad_copy_arg, abi.GNTST_permission_denied
    assert statuses == want
    assert rig.get(B * PAGE + 50 - 19, 10) == bytes(range(19, 9, -1)) and rig.get(B * PAGE + 60, 1) == b"\x03"
    assert rig.flags(8) == rig.flags(9) == 0
    rig.check()


def test_a_grant_that_was_for_one_domain_does_not_open_frames_by_number(rig: GrantRig) -> None:
    """The domain of the item before must not serve for a frame number."""
    rig.grant(8, A)
    items = copy_item((8, DOMID, 0), (rig.mfn(B), SELF, 0), 1, SOURCE) + copy_item(
        (rig.mfn(A), DOMID, 0), (rig.mfn(B), SELF, 0), 1, 0
    )
    assert rig.call(abi.GNTTABOP_copy, items, 2) == 0
    assert rig.status(36) == 0 and rig.status(76) == abi.GNTST_permission_denied


def test_a_fault_in_the_middle_gives_back_what_is_in_use(rig: GrantRig) -> None:
    rig.grant(8, A)
    rig.unmap_va(33 * PAGE)
    before = rig.snapshot()
    at = 33 * PAGE - 60
    rig.put(at, copy_item((8, SELF, 0), (rig.mfn(B), SELF, 0), 1, SOURCE))
    assert rig.call(abi.GNTTABOP_copy, b"", 2, at) == -14
    assert rig.snapshot() == before and rig.flags(8) == 0
    rig.check()


# -- version 2


@pytest.mark.parametrize(
    ("offset", "size", "want"),
    [
        (1000, 24, 0), (1023, 1, 0), (1010, 0, 0), (999, 10, abi.GNTST_general_error),
        (1000, 25, abi.GNTST_general_error), (1024, 1, abi.GNTST_general_error), (4096, 1, abi.GNTST_bad_copy_arg),
    ],
)  # fmt: skip
@pytest.mark.parametrize("end", [SOURCE, DEST])
def test_a_part_of_a_page(rig2: GrantRig, offset: int, size: int, want: int, end: int) -> None:
    rig2.grant(8, A, SUB, start=1000, length=24)
    whole, part = (rig2.mfn(B), SELF, 0), (8, SELF, offset)
    assert rig2.copy(*((part, whole) if end == SOURCE else (whole, part)), size, end) == want
    assert rig2.flags(8) == 0
    rig2.check()


def test_a_part_of_a_page_cannot_be_mapped(rig2: GrantRig) -> None:
    rig2.grant(8, A, SUB, start=0, length=PAGE)
    assert rig2.map(8)[0] == abi.GNTST_general_error
    assert rig2.map(8, HOST | RO)[0] == abi.GNTST_general_error


def test_version_1_ignores_the_part_but_does_not_map_it(rig: GrantRig) -> None:
    rig.grant(8, A, SUB)
    assert rig.map(8)[0] == abi.GNTST_general_error
    assert rig.copy((8, SELF, 0), (rig.mfn(B), SELF, 0), PAGE, SOURCE) == 0


@pytest.fixture
def peer(rig2: GrantRig) -> FakePeer:
    other = FakePeer(5)
    rig2.grants.find_peer = lambda domid: other if domid == 5 else None
    return other


TRANSITIVE = abi.GTF_transitive


def test_a_transitive_grant(rig2: GrantRig, peer: FakePeer) -> None:
    peer.offer(3, 1, 16, 32)
    peer.page(peer.BASE + 1)[16:20] = b"peer"
    rig2.grant_mfn(8, 3, TRANSITIVE, start=5)
    assert rig2.copy((8, DOMID, 16), (rig2.mfn(B), SELF, 0), 4, SOURCE) == 0
    assert rig2.get(B * PAGE, 4) == b"peer"
    assert peer.log == [(3, DOMID, True, False)], "asked for as the domain that passes it on, and not further"
    assert rig2.copy((8, DOMID, 15), (rig2.mfn(B), SELF, 0), 4, SOURCE) == abi.GNTST_general_error
    assert rig2.copy((rig2.mfn(B), SELF, 0), (8, DOMID, 40), 4, DEST) == 0
    assert peer.page(peer.BASE + 1)[40:44] == b"peer"
    assert rig2.map(8)[0] == abi.GNTST_general_error
    assert peer.clean and rig2.flags(8) == 0 and len(rig2.grants.own) == 0
    rig2.check()


@pytest.mark.parametrize(("target", "ref"), [(DOMID, 9), (6, 3), (5, 4), (0, 3)])
def test_a_transitive_grant_of_nothing(rig2: GrantRig, peer: FakePeer, target: int, ref: int) -> None:
    rig2.grant(9, A)
    rig2.grant_mfn(8, ref, TRANSITIVE, start=target)
    want = abi.GNTST_bad_gntref if target == 5 else abi.GNTST_general_error
    assert rig2.copy((8, DOMID, 0), (rig2.mfn(B), SELF, 0), 4, SOURCE) == want
    assert peer.clean and rig2.flags(8) == 0 and len(rig2.grants.own) == 0


def test_transitive_grants_do_not_chain(rig2: GrantRig, peer: FakePeer) -> None:
    rig2.grant_mfn(8, 3, TRANSITIVE, start=5)
    peer.offer(3, 1)
    with pytest.raises(Exception, match="transitive itself"):
        rig2.grants.own.pin_copy(8, DOMID, readonly=True, transitive=False)
    assert rig2.flags(8) == 0


def test_a_transitive_grant_changed_while_in_use(rig2: GrantRig, peer: FakePeer) -> None:
    peer.offer(3, 1)
    peer.offer(4, 2)
    own = rig2.grants.own
    rig2.grant_mfn(8, 3, TRANSITIVE, start=5)
    window = own.pin_copy(8, DOMID, readonly=True, transitive=True)
    rig2.grant_mfn(8, 4, TRANSITIVE, start=5)
    assert rig2.copy((8, DOMID, 0), (rig2.mfn(B), SELF, 0), 4, SOURCE) == abi.GNTST_eagain
    rig2.grant(8, A)
    assert rig2.copy((8, DOMID, 0), (rig2.mfn(B), SELF, 0), 4, SOURCE) == abi.GNTST_bad_domain
    assert rig2.map(8)[0] == abi.GNTST_general_error, "and it is still a part of a page"
    assert own.pin_of(8) == HOST_READ and rig2.flags(8) == READING
    own.unpin_copy(8, readonly=True)
    window.owner.drop(window.mfn, writable=False)
    assert peer.clean and rig2.flags(8) == 0


def test_a_copy_from_and_to_another_domain(rig2: GrantRig, peer: FakePeer) -> None:
    peer.offer(3, 1)
    rig2.put(A * PAGE, b"to the peer")
    assert rig2.copy((rig2.mfn(A), SELF, 0), (3, 5, 9), 11, DEST) == 0
    assert rig2.copy((3, 5, 9), (rig2.mfn(B), SELF, 0), 11, SOURCE) == 0
    assert rig2.get(B * PAGE, 11) == b"to the peer" and peer.clean
    assert [entry[2:] for entry in peer.log] == [(False, True), (True, True)]


def test_use_by_copy_and_by_mapping_add_up(rig: GrantRig) -> None:
    rig.grant(8, A)
    handle = rig.map(8)[1]
    assert rig.copy((8, SELF, 0), (rig.mfn(B), SELF, 0), 4, SOURCE) == 0
    assert rig.flags(8) == READING | WRITING
    assert rig.unmap(handle) == 0 and rig.flags(8) == 0
    rig.check()
