"""The three rules that keep translated code true, with an engine that records what it is told to forget."""

from __future__ import annotations

import pytest
from pv_rig import FIRST_FREE, NX, RO, ROOT_L1, ROOT_L2, RW, Rig

from hypervisor.memory.frames import L1

A, B = FIRST_FREE, FIRST_FREE + 1


@pytest.fixture
def rig() -> Rig:
    made = Rig().boot()
    made.engine.written.clear()
    return made


def map_at(rig: Rig, slot: int, frame: int, flags: int) -> None:
    rig.tables.update_l1(ROOT_L1 * 512 + slot, rig.pte(frame, flags) if flags else 0)


def test_a_first_executable_mapping_forgets_nothing(rig: Rig) -> None:
    map_at(rig, 300, A, RO)
    assert rig.engine.written == [] and rig.frames.executed[A]


def test_mapping_changed_contents_executable_again_forgets_them(rig: Rig) -> None:
    map_at(rig, 300, A, RO)
    map_at(rig, 300, A, 0)
    map_at(rig, 300, A, RO)
    assert rig.engine.written == [], "unchanged"
    rig.put(A * 4096, b"another module")
    map_at(rig, 301, A, RO)
    assert rig.engine.written == [A]


def test_taking_the_no_execute_bit_away_counts_as_mapping(rig: Rig) -> None:
    map_at(rig, 300, A, RO)
    map_at(rig, 301, A, RO | NX)
    rig.put(A * 4096, b"changed")
    map_at(rig, 301, A, RO)
    assert rig.engine.written == [A]


def test_removing_a_writable_alias_forgets_the_code(rig: Rig) -> None:
    map_at(rig, 300, A, RO)
    map_at(rig, 301, A, RW | NX)
    map_at(rig, 301, A, 0)
    assert rig.engine.written == [A]
    map_at(rig, 302, B, RW | NX)
    map_at(rig, 302, B, 0)
    assert rig.engine.written == [A], "a frame that was never executable is of no concern"


def test_a_table_that_goes_away_takes_its_writable_aliases_with_it(rig: Rig) -> None:
    map_at(rig, 300, A, RO)
    rig.unmap(20)
    rig.fill(20, {0: rig.pte(A, RW | NX), 1: rig.pte(B, RW | NX)})
    rig.tables.pin(rig.mfn(20), L1)
    rig.tables.unpin(rig.mfn(20))
    assert rig.engine.written == [A]


def test_a_whole_table_that_maps_code_is_looked_at(rig: Rig) -> None:
    map_at(rig, 300, A, RO)
    rig.unmap(20)
    rig.put(A * 4096, b"changed")
    rig.fill(20, {0: rig.pte(A, RO), 1: rig.pte(B, RO)})
    rig.tables.update(ROOT_L2, 9, rig.pte(20))
    assert rig.engine.written == [A]
    assert rig.frames.executed[B]


def test_the_hosts_writes_forget_the_code(rig: Rig) -> None:
    map_at(rig, 300, A, RO)
    rig.tables.code.host_wrote(A)
    rig.tables.code.host_wrote(B)
    assert rig.engine.written == [A]
    rig.tables.update(A, 0, 0x1234)
    rig.tables.update(B, 0, 0x1234)
    assert rig.engine.written == [A, A], "mmu_update of a plain frame writes it too"


def test_after_a_change_the_next_mapping_is_taken_for_changed(rig: Rig) -> None:
    map_at(rig, 300, A, RO)
    rig.tables.code.changed(A)
    rig.engine.written.clear()
    map_at(rig, 301, A, RO)
    assert rig.engine.written == [A], "its digest is unknown"
