"""The table itself: its size, its versions, its state; and handles."""

from __future__ import annotations

import json
import struct

import pytest
from grant_rig import DOMID, HOST, PERMIT, READING, READONLY, RO, WRITING, GrantRig
from pv_rig import PAGE, code_of

from hypervisor import abi
from hypervisor.abi import errno
from hypervisor.grants.maptrack import HANDLES_PER_FRAME, Mapping, Maptrack
from hypervisor.grants.peer import GrantError
from hypervisor.grants.table import MAX_FRAMES, Entry, status_frames_for


def test_status_frames_for_a_table() -> None:
    assert [status_frames_for(n) for n in (1, 8, 9, 64)] == [1, 1, 2, 8]


@pytest.mark.parametrize(("version", "per_frame"), [(1, 512), (2, 256)])
def test_size(version: int, per_frame: int) -> None:
    table = GrantRig().start(version).grants.table
    assert table.entries == per_frame
    table.grow(3)
    table.grow(1)
    assert table.entries == 3 * per_frame and len(table.frames) == 3
    assert code_of(table.grow, MAX_FRAMES + 1) == errno.EINVAL
    table.grow(MAX_FRAMES)
    assert len(table.status_frames) == (8 if version == 2 else 0)


def test_the_last_entry_of_a_full_table(any_rig: GrantRig) -> None:
    any_rig.grants.grow(MAX_FRAMES)
    ref = any_rig.grants.table.entries - 1
    any_rig.grant(ref, 20)
    handle = any_rig.map(ref)[1]
    assert any_rig.flags(ref) == READING | WRITING
    assert any_rig.map(ref + 1)[0] == abi.GNTST_bad_gntref
    assert any_rig.unmap(handle) == 0 and any_rig.flags(ref) == 0


def test_a_version_keeps_the_tools_entries_and_no_others(rig: GrantRig) -> None:
    rig.grant(0, 20, PERMIT, domid=0)
    rig.grant(1, 21, PERMIT | READONLY | READING, domid=0)
    rig.grant(2, 22, abi.GTF_accept_transfer)
    rig.grant(8, 23)
    rig.grants.set_version(2)
    table = rig.grants.table
    assert table.version == 2 and table.entry(0) == Entry(PERMIT, 0, rig.mfn(20))
    assert table.entry(1) == Entry(PERMIT | READONLY, 0, rig.mfn(21)) and rig.flags(1) == READING
    assert table.entry(8) == Entry(0, 0, 0)
    rig.grant(9, 23)
    rig.grants.set_version(1)
    assert table.entry(0) == Entry(PERMIT, 0, rig.mfn(20))
    assert table.entry(1) == Entry(PERMIT | READONLY | READING, 0, rig.mfn(21))
    assert table.entry(2) == Entry(0, 0, 0) and table.entry(9) == Entry(0, 0, 0)
    assert table.status_frames == []
    rig.check()


def test_versions_that_are_refused(rig: GrantRig) -> None:
    grants = rig.grants
    for version in (0, 3, 0xFFFF_FFFF):
        assert code_of(grants.set_version, version) == errno.EINVAL
    rig.grant(8, 20)
    handle = rig.map(8)[1]
    assert code_of(grants.set_version, 2) == errno.EBUSY and grants.table.version == 1
    assert code_of(grants.set_version, 1) == 0, "the version it has is no change"
    rig.unmap(handle)
    assert code_of(grants.set_version, 2) == 0
    rig.grant_mfn(3, 1 << 32)
    assert code_of(grants.set_version, 1) == errno.ERANGE
    rig.grant_mfn(3, 5, abi.GTF_transitive)
    assert code_of(grants.set_version, 1) == errno.ERANGE
    rig.grant_mfn(3, 5, abi.GTF_accept_transfer)
    assert code_of(grants.set_version, 1) == 0
    rig.check()


def test_a_reserved_grant_may_be_in_use(rig: GrantRig) -> None:
    rig.grant(1, 20)
    handle = rig.map(1)[1]
    rig.grants.set_version(2)
    assert rig.flags(1) == READING | WRITING
    rig.grants.set_version(1)
    assert rig.flags(1) == READING | WRITING
    assert rig.unmap(handle) == 0 and rig.flags(1) == 0
    rig.check()


@pytest.mark.parametrize("mapped", range(8))
def test_a_mapped_status_frame_keeps_version_2(rig2: GrantRig, mapped: int) -> None:
    """XSA-255."""
    table = rig2.grants.table
    table.grow(MAX_FRAMES)
    frame = table.status_frames[mapped]
    rig2.map_plain(50 * PAGE, frame)
    rig2.check()
    before = list(table.status_frames)
    rig2.grant(1, 20)
    assert code_of(rig2.grants.set_version, 1) == errno.EBUSY
    assert table.version == 2 and table.status_frames == before and table.entry(1).flags == PERMIT
    rig2.check()
    rig2.unmap_va(50 * PAGE)
    rig2.grants.set_version(1)
    assert not rig2.frames.owned(frame)
    rig2.check()
    rig2.put(frame * PAGE, b"\xff" * PAGE)
    for _ in range(300):
        rig2.grants.set_version(2)
        rig2.grants.set_version(1)
    rig2.grants.set_version(2)
    assert set(table.status_frames) == set(before), "frames are used again, not taken anew"
    assert rig2.get(frame * PAGE, PAGE) == bytes(PAGE), "and empty"
    rig2.check()


def test_swap(any_rig: GrantRig) -> None:
    rig = any_rig
    rig.grant(8, 20)
    rig.grant(9, 21, PERMIT | READONLY)
    rig.grants.swap(8, 9)
    assert rig.grants.table.entry(8) == Entry(PERMIT | READONLY, DOMID, rig.mfn(21))
    assert rig.grants.table.entry(9) == Entry(PERMIT, DOMID, rig.mfn(20))
    handle = rig.map(9)[1]
    for pair in ((8, 9), (9, 8)):
        with pytest.raises(GrantError) as info:
            rig.grants.swap(*pair)
        assert info.value.status == abi.GNTST_eagain
    rig.grants.swap(9, 9)
    for pair in ((8, 512), (0xFFFF_FFFF, 8)):
        with pytest.raises(GrantError) as info:
            rig.grants.swap(*pair)
        assert info.value.status == abi.GNTST_bad_gntref
    rig.unmap(handle)


def test_only_its_own_two_bits_are_written(rig: GrantRig) -> None:
    at = rig.grants.table.frames[0] * PAGE + 8 * 8
    rig.put(at, struct.pack("<HHI", 0xFE01 & ~abi.GTF_sub_page, DOMID, rig.mfn(20)))
    before = rig.get(at - 8, 24)
    handle = rig.map(8)[1]
    assert bytes(a ^ b for a, b in zip(rig.get(at - 8, 24), before, strict=True)) == bytes(8) + b"\x18" + bytes(15)
    rig.unmap(handle)
    assert rig.get(at - 8, 24) == before


def test_round_trip(any_rig: GrantRig) -> None:
    rig = any_rig
    rig.grants.grow(3)
    for ref in (8, 600):
        rig.grant(ref, 20)
    first = rig.map(8)[1]
    second = rig.map(600, HOST | RO, 51 * PAGE)[1]
    state = json.loads(json.dumps(rig.grants.save()))
    later = GrantRig().start(rig.grants.table.version)
    later.memory.bytes[:] = rig.memory.bytes
    for name in ("kind_np", "count_np", "refs_np"):
        getattr(later.frames, name)[:] = getattr(rig.frames, name)
    later.grants.restore(state)
    assert later.grants.save() == state
    later.check()
    assert later.unmap(first) == 0 and later.unmap(second, 51 * PAGE) == 0
    assert later.flags(8) == later.flags(600) == 0
    later.check()


@pytest.mark.parametrize(
    ("part", "key", "value"),
    [
        ("table", "version", 3), ("table", "frames", []), ("table", "frames", [1] * 65), ("table", "frames", [5]),
        ("table", "status_frames", [70]), ("table", "spare", [3]), ("maptrack", "limit", 5),
        ("maptrack", "limit", -256), ("maptrack", "mappings", [[256, 7, 8, 2, 1]]),
    ],
)  # fmt: skip
def test_a_state_that_contradicts_itself(rig: GrantRig, part: str, key: str, value: object) -> None:
    rig.grant(8, 20)
    rig.map(8)
    state = rig.grants.save()
    state[part][key] = value
    with pytest.raises(ValueError, match=r"grant|maptrack"):
        rig.grants.restore(state)


@pytest.mark.parametrize("entry", [[8, 0, 7, 1, 0, 4096, 0, None, 0], [5000, 1, 7, 1, 0, 4096, 0, None, 0]])
def test_active_entries_that_cannot_be(rig: GrantRig, entry: list[int | None]) -> None:
    with pytest.raises(ValueError, match="active grant"):
        rig.grants.own.restore([entry])


# -- handles


def test_handles_are_bounded_and_used_again_late() -> None:
    track = Maptrack(max_frames=2)
    handles = [track.take() for _ in range(2 * HANDLES_PER_FRAME)]
    assert sorted(handles) == list(range(2 * HANDLES_PER_FRAME))
    with pytest.raises(GrantError) as info:
        track.take()
    assert info.value.status == abi.GNTST_no_space
    track.set(7, Mapping(1, 2, 3, 4))
    track.give_back(7)
    track.give_back(3)
    assert [track.take(), track.take()] == [7, 3]
    with pytest.raises(GrantError) as info:
        track.get(7)
    assert info.value.status == abi.GNTST_bad_handle


def test_maptrack_round_trip() -> None:
    track = Maptrack()
    for handle in [track.take() for _ in range(300)]:
        track.set(handle, Mapping(5, handle, HOST, 9))
    track.give_back(17)
    later = Maptrack()
    later.restore(json.loads(json.dumps(track.save())))
    assert later.items() == track.items() and len(later) == 299
    assert later.take() not in dict(track.items())


def test_a_failed_mapping_gives_its_handle_back(rig: GrantRig) -> None:
    for _ in range(3 * HANDLES_PER_FRAME):
        assert rig.map(30)[0] == abi.GNTST_general_error
    rig.grant(8, 20)
    assert rig.map(8)[1] < HANDLES_PER_FRAME
