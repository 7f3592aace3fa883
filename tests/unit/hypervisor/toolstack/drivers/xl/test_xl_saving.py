"""Save and restore on the pretend Xen host: what fails half way, and who dies in between."""

from __future__ import annotations

import os

import pytest
from fake_xen import Complaint
from xl_rig import Rig

from hypervisor.errors import HostFailure, OperationTimeout, StreamInvalid, ToolstackError
from hypervisor.toolstack.api import DomainState
from hypervisor.toolstack.drivers.xl.life import Life
from hypervisor.toolstack.drivers.xl.store import XenstoreClient
from hypervisor.toolstack.drivers.xl.sweep import sweep
from hypervisor.toolstack.stream import envelope, libxc


class Died(BaseException):
    """The process ended here: nothing after it runs."""


def dies(*_: object, **__: object) -> None:
    raise Died


def running(rig: Rig, words: str = "") -> str:
    uuid = rig.toolstack.create(rig.spec(words, metadata=(("colour", "blue"),))).uuid
    rig.toolstack.unpause(uuid)
    return uuid


def runs_on(rig: Rig, uuid: str) -> None:
    """Nothing happened: it runs, its record is as it was, and nothing lies about."""
    assert rig.toolstack.get_domain(uuid).state is DomainState.RUNNING
    assert rig.toolstack.get_spec(uuid).metadata == (("colour", "blue"),)
    assert list(rig.folder.glob("*.save*")) == [] and list((rig.folder / "state").glob("*.pipe")) == []


WHOLE = envelope.opening({}) + libxc.header_bytes() + bytes(8) + envelope.closing()


def xl_writes(rig: Rig, data: bytes, failing: str = "") -> None:
    """``xl save`` writes `data` for a domain, and says that all was well unless it fails."""

    def save(args: list[str]) -> str:
        with open(args[2], "wb") as file:
            file.write(data)
        with rig.machine.changed:
            rig.machine.domain(args[1]).flags = "p" if args[0] == "-p" and not failing else "r"
        if failing:
            raise Complaint(failing)
        return ""

    rig.machine.faults["save"] = save


def fails_to_save(rig: Rig, error: type[ToolstackError], keep: bool) -> None:
    uuid = running(rig)
    with pytest.raises(error) as caught:
        rig.toolstack.save(uuid, str(rig.folder / "a.save"), keep_running=keep)
    assert "\n" not in caught.value.message
    runs_on(rig, uuid)
    assert "destroy" not in [call[0] for call in rig.machine.calls]


@pytest.mark.parametrize("keep", [True, False])
def test_a_stream_that_is_not_whole_costs_no_domain(rig: Rig, keep: bool) -> None:
    for data in (b"", WHOLE[:-1], b"x" + WHOLE, WHOLE[:40]):
        xl_writes(rig, data)
        fails_to_save(rig, StreamInvalid, keep)


@pytest.mark.parametrize("what", ["header", "fsync", "link"])
def test_a_file_that_cannot_be_written_costs_no_domain(rig: Rig, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    def full(*_: object) -> bytes:
        raise OSError(28, os.strerror(28))

    xl_writes(rig, WHOLE + bytes(1 << 20))
    with monkeypatch.context() as patch:
        if what == "header":
            patch.setattr(envelope, "header", full)
        elif what == "link":
            patch.setattr("hypervisor.toolstack.drivers.xl.saving.os.link", full)
        else:
            patch.setattr("hypervisor.toolstack.drivers.xl.saving._sync", full)
        fails_to_save(rig, HostFailure, keep=False)


def test_what_xl_says_of_a_save_is_judged(rig: Rig) -> None:
    xl_writes(rig, WHOLE, "xc: error: Failed to read shadow\nFailed to save domain, resuming domain")
    fails_to_save(rig, ToolstackError, keep=False)


def test_a_request_that_the_guest_has_not_seen_is_taken_back(rig: Rig) -> None:
    uuid = running(rig, "deaf")
    domid = rig.machine.find(uuid).domid
    with pytest.raises(OperationTimeout):
        rig.toolstack.save(uuid, str(rig.folder / "a.save"), timeout=0.1)
    runs_on(rig, uuid)
    with rig.machine.store() as store:
        assert store.read(f"/local/domain/{domid}/control/shutdown") == ""


def test_the_spec_comes_back_and_the_marker_is_the_new_owners(rig: Rig) -> None:
    uuid, path = running(rig), str(rig.folder / "a.image")
    rig.toolstack.set_memory(uuid, 8)
    spec = rig.toolstack.get_spec(uuid)
    rig.toolstack.save(uuid, path)
    assert rig.toolstack._host.records.uuids() == []
    info = rig.toolstack.restore(path, owner="new", name="other")
    assert (info.name, info.owner, info.memory_mib, info.metadata) == ("other", "new", 8, (("colour", "blue"),))
    assert rig.toolstack.get_spec(uuid).max_memory_mib == spec.max_memory_mib
    with rig.machine.store() as store:
        node = f"/local/domain/{info.domid}/reeve/owner"
        assert (store.read(node), store.perms(node)) == ("new", "n0")


def saved(rig: Rig) -> tuple[str, str]:
    uuid, path = running(rig), str(rig.folder / "a.image")
    rig.toolstack.save(uuid, path)
    return uuid, path


def test_a_restore_that_fails_leaves_nothing(rig: Rig) -> None:
    uuid, path = saved(rig)

    def half(args: list[str]) -> str:
        with rig.machine.changed:
            rig.machine.do_create(*args[:3])
        raise Complaint("xc: error: Failed to set vcpu0's basic info (16)\nlibxl: error: restoring domain: rc=-3")

    rig.machine.faults["restore"] = half
    with pytest.raises(ToolstackError, match="basic info"):
        rig.toolstack.restore(path, owner="unit")
    assert rig.toolstack.list_domains() == [] and rig.toolstack._host.records.uuids() == []
    del rig.machine.faults["restore"]
    assert rig.toolstack.restore(path, owner="unit").uuid == uuid


@pytest.mark.parametrize(("step", "left"), [("before", False), ("unmarked", True), ("half", False)])
def test_a_restore_whose_maker_died(rig: Rig, monkeypatch: pytest.MonkeyPatch, step: str, left: bool) -> None:
    """Only what is provably ours is destroyed: it has a marker. The image is there still."""
    uuid, path = saved(rig)
    with monkeypatch.context() as patch, pytest.raises(Died):
        patch.setattr(Life, "undo", lambda *_: None)
        if step == "before":
            patch.setattr(rig.toolstack._host.records, "config", dies)
        elif step == "unmarked":
            patch.setattr(Life, "mark", dies)
        else:
            patch.setattr(XenstoreClient, "set_perms", dies)
        rig.toolstack.restore(path, owner="unit")
    sweep(rig.toolstack._host, rig.toolstack._life)
    assert [info.uuid for info in rig.toolstack.list_domains()] == ([uuid] if left else [])
    if left:
        assert "xl destroy" in rig.toolstack.get_domain(uuid).detail
    else:
        assert rig.toolstack.restore(path, owner="unit").uuid == uuid
