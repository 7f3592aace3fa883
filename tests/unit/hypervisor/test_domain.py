"""The domain's own operations: page-table roots, references, what a configuration is."""

from __future__ import annotations

import dataclasses
import json

import pytest
from pv_rig import FIRST_FREE, ROOT, E, Rig, code_of

from hypervisor import abi
from hypervisor.domain import MachineConfig
from hypervisor.memory.frames import L4
from hypervisor.memory.xenarea import INVALID_M2P_ENTRY

A, B = FIRST_FREE, FIRST_FREE + 1


@pytest.fixture
def rig() -> Rig:
    return Rig().boot()


def test_a_configuration_round_trips_through_json() -> None:
    config = MachineConfig("uuid", "name", 3, 0x20000, 64, 128, 1, 2, 2_000_000)
    assert MachineConfig.from_json(json.loads(json.dumps(config.to_json()))) == config
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.domid = 4  # type: ignore[misc]


def test_a_new_domain_has_its_events_masked_and_its_frames_in_the_m2p() -> None:
    rig = Rig(pages=40, max_pages=64)
    at = rig.state.vcpu_info + abi.VCPU_INFO_EVTCHN_UPCALL_MASK
    assert rig.memory.bytes[at] == 1 and at >> 12 == rig.domain.area.shared_info
    assert [rig.domain.area.m2p(rig.mfn(i)) for i in (0, 39, 40, 63)] == [0, 39, INVALID_M2P_ENTRY, INVALID_M2P_ENTRY]
    assert rig.frames.pages() == 40
    rig.check()


def root(rig: Rig, frame: int) -> int:
    """A second root with the first one's lower half, not pinned."""
    rig.unmap(frame)
    rig.fill(frame, {0: rig.word(ROOT, 0)})
    return rig.mfn(frame)


def test_switching_roots_holds_exactly_the_ones_in_use(rig: Rig) -> None:
    first, second = rig.mfn(ROOT), root(rig, A)
    rig.tables.unpin(first)
    rig.domain.new_baseptr(second)
    assert rig.state.kernel_cr3 == rig.regs.cr3 == rig.mpa(A)
    assert rig.frames.kind[A] == L4 and rig.frames.count[ROOT] == 0, "nothing holds the first any more"
    rig.check()
    rig.domain.new_baseptr(second)
    assert rig.frames.count[A] == 1, "the same root again is the same use"
    rig.check()


def test_a_root_that_does_not_validate_changes_nothing(rig: Rig) -> None:
    rig.unmap(A)
    rig.fill(A, {0: rig.word(ROOT, 0), 1: rig.pte(B)})
    before = rig.snapshot()
    for mfn in (rig.mfn(A), rig.mfn(B), 0):
        assert code_of(rig.domain.new_baseptr, mfn) == E.EINVAL
        assert mfn == 0 or code_of(rig.domain.new_user_baseptr, mfn) == E.EINVAL
    assert rig.snapshot() == before
    assert rig.state.kernel_cr3 == rig.regs.cr3 == rig.mpa(ROOT) and rig.state.user_cr3 == 0


def test_user_roots_come_and_go(rig: Rig) -> None:
    for mfn in (root(rig, A), root(rig, B), 0, rig.mfn(ROOT), 0):
        rig.domain.new_user_baseptr(mfn)
        assert rig.state.user_cr3 == mfn << 12
        rig.check()
    assert rig.frames.count[A] == rig.frames.count[B] == 0


def test_an_unknown_vcpu(rig: Rig) -> None:
    assert code_of(rig.domain.vcpu, 1) == code_of(rig.domain.vcpu, -1) == E.ENOENT
    assert rig.domain.vcpu(0) is rig.domain.running
