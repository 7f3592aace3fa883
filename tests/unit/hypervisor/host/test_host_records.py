from __future__ import annotations

import json
from pathlib import Path

import pytest

from hypervisor.errors import HostFailure
from hypervisor.host.ledger import Claim
from hypervisor.host.records import DomainRecord, Phase, RecordStore, RunSizes, write_atomically
from hypervisor.toolstack.api import DomainSpec, DomainState, KernelBoot, ShutdownReason
from hypervisor.types import Mfn

UUID = "00000000-0000-4000-8000-000000000001"


def record(**fields: object) -> DomainRecord:
    spec = DomainSpec(UUID, "one", KernelBoot("/k", "/r", "quiet"), 64, metadata=(("a", "b"),), owner="me")
    return DomainRecord(spec, 3, **fields)  # type: ignore[arg-type]


def test_a_record_goes_to_disk_and_back(tmp_path: Path) -> None:
    store = RecordStore(tmp_path / "state")
    store.prepare(UUID)
    made = record(
        phase=Phase.MADE,
        state=DomainState.CRASHED,
        claim=Claim(1, UUID, Mfn(0x10000), 100, 64),
        reason=ShutdownReason.CRASH,
        detail="why",
        created_at=1.5,
        restarts=2,
        console={"typed": "x"},
        devices={"disk/xvda": {"front": {"ring": 8}, "restarts": 2}},
        run=RunSizes(1, 2, 48, 128),
    )
    store.save(made)
    assert list(store.load()) == [made]
    assert made.ended
    store.remove(UUID)
    assert list(store.load()) == []


def test_a_record_of_an_earlier_release_runs_what_its_spec_says() -> None:
    data = record().to_json()
    del data["run"], data["devices"]
    made = DomainRecord.from_json(data)
    assert made.run == RunSizes(1, 1, 64, 64) and made.devices == {}


def test_a_folder_without_record_is_a_create_cut_short(tmp_path: Path) -> None:
    store = RecordStore(tmp_path)
    folder = store.prepare(UUID)
    assert list(store.load()) == []
    assert not folder.exists()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 99}', '{"format": 1}', '{"format":1,"spec":{}}'])
def test_what_cannot_be_read_is_kept_and_not_adopted(tmp_path: Path, text: str) -> None:
    store = RecordStore(tmp_path)
    path = store.prepare(UUID) / "domain.json"
    path.write_text(text)
    assert list(store.load()) == []
    assert path.exists()


def test_a_record_in_anothers_folder_is_not_believed(tmp_path: Path) -> None:
    store = RecordStore(tmp_path)
    other = "00000000-0000-4000-8000-000000000002"
    (store.prepare(other) / "domain.json").write_text(json.dumps(record().to_json()))
    assert list(store.load()) == []


def test_domids_are_not_used_again_at_once(tmp_path: Path) -> None:
    store = RecordStore(tmp_path)
    (tmp_path / "next-domid").write_text("0")
    assert [store.next_domid(frozenset()) for _ in range(3)] == [1, 2, 3]
    assert RecordStore(tmp_path).next_domid(frozenset({4, 5})) == 6
    write_atomically(tmp_path / "next-domid", str(0x7FEF))
    assert store.next_domid(frozenset({1})) == 2
    (tmp_path / "next-domid").write_text("nonsense")
    assert store.next_domid(frozenset({8})) == 9


def test_new_hosts_begin_with_different_domids(tmp_path: Path) -> None:
    first = {RecordStore(tmp_path / str(number)).next_domid(frozenset({0})) for number in range(20)}
    assert len(first) > 10 and min(first) >= 1 and max(first) <= 0x7FEF


def test_a_failed_write_keeps_the_old_content(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomically(path, "old")
    (tmp_path / "file.new").mkdir()
    with pytest.raises(HostFailure, match="cannot be written"):
        write_atomically(path, "new")
    assert path.read_text() == "old"
