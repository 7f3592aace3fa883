"""A driver that died between any two of its steps, and domains that others took away."""

from __future__ import annotations

import pytest
from xl_rig import Rig

from hypervisor.toolstack.api import DomainSpec, DomainState
from hypervisor.toolstack.drivers.xl.life import Life
from hypervisor.toolstack.drivers.xl.store import XenstoreClient
from hypervisor.toolstack.drivers.xl.sweep import sweep


class Died(BaseException):
    """The process ended here: nothing after it runs, not even what tidies up."""


def dies(*_: object, **__: object) -> None:
    raise Died


def swept(rig: Rig) -> None:
    sweep(rig.toolstack._host, rig.toolstack._life)


def died_in_create(rig: Rig, monkeypatch: pytest.MonkeyPatch, step: str) -> DomainSpec:
    spec = rig.spec()
    with monkeypatch.context() as patch:
        patch.setattr(Life, "undo", lambda *_: None)
        if step == "before":
            patch.setattr(Life, "_start", dies)
        elif step == "unmarked":
            patch.setattr(Life, "mark", dies)
        elif step == "half":
            patch.setattr(XenstoreClient, "set_perms", dies)
        else:
            records = rig.toolstack._host.records
            put = records.put
            patch.setattr(records, "put", lambda record: dies() if record.made else put(record))
        with pytest.raises(Died):
            rig.toolstack._life.create(spec)
    return spec


def test_a_maker_that_died_before_there_was_a_domain(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = died_in_create(rig, monkeypatch, "before")
    swept(rig)
    assert rig.toolstack._host.records.uuids() == []
    assert rig.toolstack.create(spec).state is DomainState.PAUSED


def test_what_has_no_marker_is_told_and_left_alone(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    spec = died_in_create(rig, monkeypatch, "unmarked")
    swept(rig)
    assert not rig.machine.find(spec.uuid).gone
    info = rig.toolstack.get_domain(spec.uuid)
    assert info.owner == "" and "xl destroy" in info.detail
    assert spec.uuid in caplog.text and "left alone" in caplog.text


def test_what_is_half_marked_is_ours_and_destroyed(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    died_in_create(rig, monkeypatch, "half")
    swept(rig)
    assert rig.machine.domains == {} and rig.toolstack._host.records.uuids() == []


def test_what_is_marked_is_taken_as_made(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = died_in_create(rig, monkeypatch, "marked")
    swept(rig)
    info = rig.toolstack.get_domain(spec.uuid)
    assert (info.owner, info.state, info.detail) == ("unit", DomainState.PAUSED, "")
    rig.toolstack.destroy(spec.uuid)


@pytest.mark.parametrize("step", ["build", "mark"])
def test_a_start_anew_that_was_interrupted(rig: Rig, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    spec = rig.spec()
    rig.toolstack._life.create(spec)  # without watching: nothing sweeps by itself
    with monkeypatch.context() as patch, pytest.raises(Died):
        if step == "build":
            patch.setattr(Life, "_start", dies)
        else:
            patch.setattr(XenstoreClient, "set_perms", dies)
        rig.toolstack.reset(spec.uuid)
    swept(rig)
    info = rig.toolstack.get_domain(spec.uuid)
    assert (info.owner, info.state) == ("unit", DomainState.RUNNING)
    assert len(rig.machine.domains) == 1 and not rig.toolstack._host.record(spec.uuid).again


def test_one_taken_away_by_others_is_told(rig: Rig) -> None:
    heard = rig.listen()
    info, kept = rig.toolstack.create(rig.spec()), rig.toolstack.create(rig.spec())
    with rig.machine.changed:
        rig.machine.do_destroy(str(info.domid))
    rig.until(lambda: ("destroyed", info.uuid) in [(event.kind, event.uuid) for event in heard], "its end to be told")
    assert rig.toolstack._host.records.uuids() == [kept.uuid]


def test_nothing_is_concluded_from_a_host_that_cannot_be_read(rig: Rig) -> None:
    info = rig.toolstack._life.create(rig.spec())
    rig.machine.faults["list"] = lambda _: "garbage\n"
    with pytest.raises(Exception, match="not understood"):
        swept(rig)
    assert rig.toolstack._host.records.uuids() == [info.uuid]


def test_one_that_is_being_acted_on_is_left_out(rig: Rig) -> None:
    info = rig.toolstack._life.create(rig.spec())
    with rig.machine.changed:
        rig.machine.do_destroy(str(info.domid))
    with rig.toolstack._host.records.lock(info.uuid):
        swept(rig)
        assert rig.toolstack._host.records.uuids() == [info.uuid]
    swept(rig)
    assert rig.toolstack._host.records.uuids() == []
