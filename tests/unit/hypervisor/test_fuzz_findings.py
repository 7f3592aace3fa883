"""What the fuzzers of tests/fuzz found, each done by hand (docs/fuzzing.md)."""

from __future__ import annotations

import harness
import pytest
from pv_rig import E, Rig, code_of

from hypervisor import abi
from hypervisor.domain import MachineConfig
from hypervisor.grants.peer import GrantError, Window
from hypervisor.machine import Machine

GRANTED_MFN = 0x40002
AT, OTHER = 0x9000, 0xA000


class Granter:
    """Another domain that grants one frame; notes how often the TLB had been flushed when it got it back."""

    domid = 8

    def __init__(self, rig: Rig) -> None:
        self._rig = rig
        self.got_back: list[int] = []

    def pin(self, _ref: int, _mapper: int, _increment: int, *, readonly: bool) -> int:
        return GRANTED_MFN

    def unpin(self, _ref: int, _increment: int, *, readonly: bool) -> None: ...

    def pin_copy(self, _ref: int, _mapper: int, *, readonly: bool, transitive: bool) -> Window:
        raise GrantError(abi.GNTST_general_error)

    def unpin_copy(self, _ref: int, *, readonly: bool) -> None: ...

    def hold(self, _mfn: int, *, writable: bool) -> None: ...

    def drop(self, _mfn: int, *, writable: bool) -> None:
        self.got_back.append(self._rig.engine.flushes)

    def page(self, _mfn: int) -> memoryview:
        raise AssertionError("no page is asked for")


@pytest.mark.parametrize("host", [AT, OTHER], ids=["its own place", "another page"])
def test_a_failing_unmap_and_replace_flushes_before_the_granter_gets_its_frame_back(host: int) -> None:
    """The entry of the new address is gone also when the call fails; a stale one in the TLB could write the frame."""
    rig = Rig().boot()
    granter = Granter(rig)
    rig.domain.grants.find_peer = lambda domid: granter if domid == granter.domid else None
    handle, _ = rig.domain.grants.mapper.map(AT, abi.GNTMAP_host_map, 0, granter.domid)
    before = rig.engine.flushes
    with pytest.raises(GrantError):
        rig.domain.grants.mapper.unmap(handle, host, 0, AT)
    assert len(granter.got_back) == 1
    assert granter.got_back[0] > before


def test_a_foreign_entry_that_is_overwritten_is_flushed_before_the_granter_gets_its_frame_back() -> None:
    rig = Rig().boot()
    granter = Granter(rig)
    rig.domain.grants.find_peer = lambda domid: granter if domid == granter.domid else None
    rig.domain.grants.mapper.map(AT, abi.GNTMAP_host_map, 0, granter.domid)
    before = rig.engine.flushes
    rig.unmap(AT >> 12)
    assert granter.got_back and granter.got_back[0] > before


def test_vcpu_info_in_the_shared_info_page_is_refused_and_takes_no_count() -> None:
    """It could be registered there again and again, and took one more count each time."""
    rig = Rig().boot()
    mfn = rig.mfn(rig.domain.area.shared_info)
    for offset in (64, 128, 64):
        assert code_of(rig.domain.register_vcpu_info, rig.domain.vcpus[0], mfn, offset) == E.EINVAL
    rig.check()


def test_status_frames_are_flushed_when_they_go() -> None:
    """The guest had unmapped one without a flush, and wrote a frame that was not its own any more."""
    rig = Rig().boot()
    grants = rig.domain.grants
    grants.set_version(2)
    rig.tables.update_l1(4 * 512 + 9, rig.pte(grants.table.status_frames[0]))
    rig.unmap(9)
    before = rig.engine.flushes
    grants.set_version(1)
    assert rig.engine.flushes > before
    rig.check()


def test_an_exception_that_leaves_the_run_loop_takes_the_alarm_along() -> None:
    """Its calls went to an engine that was not there any more, which was a crash of the process."""
    config = MachineConfig("uuid", "name", 9, 0x20000, 64, 64, tsc_khz=2_000_000)
    machine = Machine(config, harness.make_memory(64), notify_host=lambda _port: None)

    def interrupt() -> None:
        raise KeyboardInterrupt

    machine.post(interrupt)
    with pytest.raises(KeyboardInterrupt):
        machine.run()
    assert not machine._alarm._timer
