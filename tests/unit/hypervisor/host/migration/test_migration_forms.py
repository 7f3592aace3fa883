"""What goes over, and what is remembered: back from bytes as it was; nonsense is refused with one line."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from hypervisor.errors import (
    MigrationFailed,
    MigrationNotTransparent,
    MigrationRefused,
    SpecInvalid,
    WrongState,
    from_json,
)
from hypervisor.host.device_memory import DeviceMemory
from hypervisor.host.migration import offer as offers
from hypervisor.host.migration.belongings import MAX_BYTES, Belongings
from hypervisor.host.migration.move import Move, MoveStore, secret_of
from hypervisor.host.migration.offer import Detail
from hypervisor.host.records import DomainRecord, RunSizes
from hypervisor.memory import layout
from hypervisor.toolstack.api import (
    DomainSpec,
    KernelBoot,
    MigrationOffer,
    MigrationPhase,
    MigrationRole,
    MigrationStatus,
)
from hypervisor.toolstack.devices import DiskSpec, NicSpec

UUID = "00000000-0000-4000-8000-000000000007"
IDENT = "00000000-0000-4000-8000-0000000000aa"
SPEC = DomainSpec(
    uuid=UUID,
    name="web",
    boot=KernelBoot(kernel="/k"),
    memory_mib=8,
    owner="o",
    disks=(DiskSpec("xvda", "/srv/a.img"),),
    nics=(NicSpec(0, "52:54:00:00:00:01", "default"),),
)
RUN = RunSizes(1, 1, 8, 8)


def belongings() -> Belongings:
    record = DomainRecord(SPEC, 7, run=RUN, console={"typed": "ls\xff"}, created_at=1.5, started_at=2.5, restarts=3)
    memory = DeviceMemory(front={"queues": []}, counted={"reads": 1}, carried={"lost": True})
    return Belongings.of(record, {"nodes": [], "connection": {}}, b"boot\xff\n", {"disk/xvda": memory.to_json()})


def test_belongings_go_over_as_they_are() -> None:
    assert Belongings.unpack(belongings().pack()) == belongings()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("version", 2),
        ("version", None),
        ("spec", None),
        ("spec", {"uuid": "nobody"}),
        ("run", {"vcpus": 1}),
        ("run", {"vcpus": 0, "max_vcpus": 1, "memory_mib": 8, "max_memory_mib": 8}),
        ("run", {"vcpus": "1", "max_vcpus": 1, "memory_mib": 8, "max_memory_mib": 8}),
        ("domid", True),
        ("domid", -1),
        ("restarts", "many"),
        ("cpu_time_ns", 1 << 63),
        ("created_at", "long ago"),
        ("printed", "\u20ac"),
        ("printed", 5),
        ("console", {"typed": "x" * 70000}),
        ("store", []),
        ("devices", {"disk/xvdb": {}}),
        ("devices", {"disk/xvda": {"unknown": 1}}),
        ("devices", {"disk/xvda": {"front": 1}}),
        ("devices", {"disk/xvda": {"counted": {"a": "b"}}}),
        ("devices", {"disk/xvda": {"front": {"a": "x" * (1 << 18)}}}),
        ("more", 1),
    ],
)
def test_belongings_that_make_no_sense(name: str, value: Any) -> None:
    data = json.loads(belongings().pack())
    data[name] = value
    with pytest.raises(MigrationFailed, match="makes no sense") as caught:
        Belongings.unpack(json.dumps(data).encode())
    assert "\n" not in caught.value.message


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"null", b"[" * 100_000, b" " * (MAX_BYTES + 1), b"\xff"])
def test_bytes_that_are_no_belongings(data: bytes) -> None:
    with pytest.raises(MigrationFailed):
        Belongings.unpack(data)


def detail() -> Detail:
    frames = layout.total_frames(8 * 256)
    return Detail(0x200000, frames, 2100, RUN, {"bits": 64}, False, {"disk/xvda": 4096}, [])


def offer(**changes: Any) -> MigrationOffer:
    made = MigrationOffer("embedded", "build", SPEC, 7, 9, 1, True, detail().to_json())
    return dataclasses.replace(made, **changes)


def test_a_detail_goes_over_as_it_is() -> None:
    assert Detail.from_json(json.loads(json.dumps(detail().to_json()))) == detail()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("base_mfn", -1),
        ("base_mfn", "0"),
        ("frames", 5),
        ("committed", 0),
        ("committed", 1 << 40),
        ("run", {"vcpus": 2, "max_vcpus": 1, "memory_mib": 8, "max_memory_mib": 8}),
        ("run", {"vcpus": 1, "max_vcpus": 1, "memory_mib": 9, "max_memory_mib": 8}),
        ("run", None),
        ("facts", None),
        ("linear_page_tables", 1),
        ("disks", {"disk/xvda": True}),
        ("disks", None),
        ("unknown", 1),
    ],
)
def test_a_detail_that_makes_no_sense(name: str, value: Any) -> None:
    data = copy.deepcopy(detail().to_json())
    data[name] = value
    with pytest.raises(SpecInvalid, match="detail makes no sense"):
        Detail.from_json(data)


def test_what_a_target_refuses() -> None:
    offers.check_driver(offer())
    offers.check_live(offer(), "build", frozenset({6, 8}))
    with pytest.raises(MigrationRefused):
        offers.check_driver(offer(driver="fake"))
    for changes, taken in (({"build": "older"}, set()), ({}, {7}), ({"domid": 0}, set()), ({"domid": 0x7FF0}, set())):
        with pytest.raises(MigrationNotTransparent):
            offers.check_live(offer(**changes), "build", frozenset(taken))
    offers.check_disks(detail(), {"disk/xvda": 4096, "nic/0": 0}, frozenset())
    offers.check_disks(detail(), {}, frozenset({"disk/xvda"}))
    for sizes in ({"disk/xvda": 8192}, {}):
        with pytest.raises(MigrationRefused, match="disk xvda has 4096 bytes on the source"):
            offers.check_disks(detail(), sizes, frozenset())


def move(**changes: Any) -> Move:
    made = Move(IDENT, UUID, MigrationRole.SOURCE, MigrationPhase.COPYING, secret_of("t"), began=5.0, memory_mib=8)
    for name, value in changes.items():
        setattr(made, name, value)
    return made


def test_a_half_survives_its_host_process(tmp_path: Path) -> None:
    store = MoveStore(tmp_path)
    store.load()
    first = move(downtime={"pause": 1.5}, error={"code": "x"}, ticket={"port": 1})
    store.save(first)
    again = MoveStore(tmp_path)
    again.load()
    assert again.find(IDENT) == first and again.all() == [first]
    assert first.secret != "t" and again.find("other") is None
    again.forget(IDENT)
    again.forget(IDENT)
    third = MoveStore(tmp_path)
    third.load()
    assert third.all() == []


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 2}', '{"format": 1}', '{"format": 1, "ident": "x"}'])
def test_a_record_that_cannot_be_read_is_left_alone(tmp_path: Path, text: str) -> None:
    store = MoveStore(tmp_path)
    store.load()
    path = tmp_path / "migrations" / f"{IDENT}.json"
    path.write_text(text)
    store.load()
    assert store.all() == [] and path.read_text() == text


def test_what_is_told_of_a_half() -> None:
    status = move(phase=MigrationPhase.MOVED, ending=True).status()
    assert status.phase is MigrationPhase.SWITCHING, "the copy is still being ended"
    assert MigrationStatus.from_json(status.to_json()) == status
    ended = move()
    ended.end(MigrationPhase.KEPT, WrongState("it ended"))
    told = ended.status()
    assert (told.phase, told.memory_mib, told.detail) == (MigrationPhase.KEPT, 0, "")
    assert from_json(told.error or {}).code == "domain.wrong_state"
