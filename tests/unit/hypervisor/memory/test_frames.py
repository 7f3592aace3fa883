"""The frame table: ownership, shared frames, save and restore."""

from __future__ import annotations

import zlib

import pytest
from pv_rig import PAGES, Rig

from hypervisor.memory.frames import SEGDESC, WRITABLE, FrameTable


def test_a_new_table_owns_what_is_populated() -> None:
    table = FrameTable(20, 10, 6)
    assert table.pages() == 6
    assert [table.owned(i) for i in (-1, 0, 5, 6, 19, 20)] == [False, True, True, False, False, False]
    assert table.free_frames(3, table.ram) == [6, 7, 8]
    assert table.free_frames(30, table.ram) == [6, 7, 8, 9], "Xen's frames are never given out"
    assert table.free_frames(30, 8) == [6, 7] and table.free_frames(30, 3) == []
    assert table.free_blocks(30, table.ram, 2, 0) == [6, 8] and table.free_blocks(30, table.ram, 2, 1) == [7]
    assert table.free_blocks(30, table.ram, 16, 3) == table.free_blocks(30, table.ram, 4, 3) == []


@pytest.mark.parametrize(("writable", "kind"), [(True, WRITABLE), (False, SEGDESC)])
def test_a_shared_frame_keeps_its_type_until_it_is_taken_back(writable: bool, kind: int) -> None:
    table = FrameTable(20, 10, 10)
    table.share(15, writable=writable)
    assert table.owned(15) and table.kind[15] == kind and table.pages() == 10
    table.refs[15] += 1
    assert not table.unshare(15), "the guest maps it"
    table.refs[15] -= 1
    assert table.unshare(15) and not table.owned(15)


def test_save_and_restore_round_trip() -> None:
    rig = Rig().boot()
    rig.frames.executed[3] = 1
    rig.domain.reservation.give_back(rig.mfn(9))
    table = rig.frames
    copy = FrameTable.restore(table.save())
    assert (copy.size, copy.ram, copy.pinned) == (table.size, table.ram, table.pinned)
    for name in ("kind", "count", "refs", "executed", "holding"):
        assert bytes(getattr(copy, name)) == bytes(getattr(table, name)), name
    copy.count[0] += 1
    assert copy.count_np[0] == table.count_np[0] + 1, "views and arrays are one"
    assert copy.save() != table.save()


def test_a_saved_table_of_another_size_is_refused() -> None:
    state = FrameTable(20, 10, 10).save()
    state["refs"] = zlib.compress(bytes(4 * 19))
    with pytest.raises(ValueError, match="refs has 19 entries, not 20"):
        FrameTable.restore(state)


def test_physical_memory_names_only_its_own_frames() -> None:
    rig = Rig()
    memory = rig.memory
    assert memory.index(memory.mfn(5)) == 5 and memory.offset(memory.mpa(5) + 7) == 5 * 4096 + 7
    assert memory.index(memory.base_mfn - 1) == memory.index(memory.base_mfn + memory.frames) == -1
    assert memory.offset(memory.base_mpa - 1) == memory.offset(memory.base_mpa + memory.frames * 4096) == -1
    assert memory.frames > PAGES


def test_physical_memory_copies_and_clears_pages() -> None:
    rig = Rig()
    rig.put(5 * 4096, b"x" * 4096)
    rig.memory.copy_page(6, 5)
    rig.memory.clear_page(5)
    assert bytes(rig.memory.page(6)) == b"x" * 4096 and bytes(rig.memory.page(5)) == bytes(4096)
