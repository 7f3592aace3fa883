"""Save and restore: a domain becomes a file and a domain again, on drivers with `Capability.SAVE`."""

from __future__ import annotations

import dataclasses
import os
import stat
import uuid
from pathlib import Path

import pytest
from kit import OWNER, POWEROFF, SUSPENDS, WAITS, Bench, assert_readable

from hypervisor.errors import (
    DomainExists,
    DomainNotFound,
    ImageInUse,
    InsufficientMemory,
    NameInUse,
    OperationTimeout,
    SpecInvalid,
    StreamInvalid,
    ToolstackError,
    WrongState,
)
from hypervisor.toolstack.api import Capability, DomainInfo, DomainState, OnEvent
from hypervisor.toolstack.devices import DiskSpec

NOBODY = "00000000-0000-4000-8000-000000000000"


@pytest.fixture
def guest(bench: Bench) -> DomainInfo:
    bench.needs(Capability.SAVE)
    return bench.booted(SUSPENDS, metadata=(("colour", "blue"),))


def test_save_and_restore(bench: Bench, guest: DomainInfo) -> None:
    path, toolstack = bench.save_path(), bench.toolstack
    spec = toolstack.get_spec(guest.uuid)
    saved = toolstack.save(guest.uuid, path)
    assert (saved.uuid, saved.name, saved.path) == (guest.uuid, guest.name, path)
    assert saved.bytes == os.path.getsize(path) > 0 and saved.total_s >= 0
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    assert toolstack.list_domains() == []
    info = toolstack.restore(path, owner="another")
    assert (info.uuid, info.name, info.state, info.owner) == (guest.uuid, guest.name, DomainState.PAUSED, "another")
    assert info.memory_mib == bench.kit.memory_mib
    assert toolstack.get_spec(guest.uuid) == dataclasses.replace(spec, owner="another")
    toolstack.unpause(info.uuid)
    bench.answers(info.uuid)


def test_a_saved_image_is_restored_again_and_again(bench: Bench, guest: DomainInfo) -> None:
    path, toolstack = bench.save_path(), bench.toolstack
    toolstack.save(guest.uuid, path)
    for _ in range(2):
        toolstack.restore(path, owner=OWNER)
        toolstack.unpause(guest.uuid)
        bench.answers(guest.uuid)
        toolstack.destroy(guest.uuid)


def test_a_checkpoint_leaves_the_guest_running(bench: Bench, guest: DomainInfo) -> None:
    path, toolstack = bench.save_path(), bench.toolstack
    saved = toolstack.save(guest.uuid, path, keep_running=True)
    assert saved.downtime_ms > 0
    now = toolstack.get_domain(guest.uuid)
    assert (now.state, now.domid) == (DomainState.RUNNING, guest.domid)
    bench.answers(guest.uuid)
    other = str(uuid.uuid4())
    info = toolstack.restore(path, owner=OWNER, name="other", uuid=other)
    assert (info.uuid, info.name) == (other, "other")
    toolstack.unpause(other)
    bench.answers(other)
    bench.answers(guest.uuid)


def test_what_is_in_use_is_not_restored(bench: Bench, guest: DomainInfo) -> None:
    path, toolstack = bench.save_path(), bench.toolstack
    toolstack.save(guest.uuid, path, keep_running=True)
    for error, fields in ((DomainExists, {"name": "x"}), (NameInUse, {"uuid": str(uuid.uuid4())})):
        with pytest.raises(error) as caught:
            toolstack.restore(path, owner=OWNER, **fields)
        assert_readable(caught.value)
    assert [info.uuid for info in toolstack.list_domains()] == [guest.uuid]


def test_disks_come_back_and_are_claimed(bench: Bench) -> None:
    bench.needs(Capability.SAVE)
    bench.needs(Capability.DISK)
    disk = DiskSpec("xvda", bench.image())
    guest = bench.booted(SUSPENDS, disks=(disk,))
    path, toolstack = bench.save_path(), bench.toolstack
    toolstack.save(guest.uuid, path)
    holder = toolstack.create(bench.spec(WAITS, disks=(disk,)))
    with pytest.raises(ImageInUse):
        toolstack.restore(path, owner=OWNER)
    toolstack.destroy(holder.uuid)
    toolstack.restore(path, owner=OWNER)
    assert [device.id for device in toolstack.list_devices(guest.uuid)] == ["xvda"]


def fill(bench: Bench) -> DomainInfo:
    """A domain that leaves no room for another: as large as the host's overhead lets it be."""
    for mib in range(bench.toolstack.host_info().memory_free_mib, 0, -1):
        try:
            return bench.toolstack.create(bench.spec(WAITS, memory_mib=mib))
        except InsufficientMemory:
            continue
    raise AssertionError("no domain of any size fits")


def test_no_room_to_restore(bench: Bench, guest: DomainInfo) -> None:
    path, toolstack = bench.save_path(), bench.toolstack
    toolstack.save(guest.uuid, path)
    filler = fill(bench)
    with pytest.raises(InsufficientMemory):
        toolstack.restore(path, owner=OWNER)
    toolstack.destroy(filler.uuid)
    assert toolstack.restore(path, owner=OWNER).state is DomainState.PAUSED


def test_a_guest_that_does_not_suspend_runs_on(bench: Bench) -> None:
    bench.needs(Capability.SAVE)
    guest = bench.booted(WAITS)
    path = bench.save_path()
    with pytest.raises(OperationTimeout) as caught:
        bench.toolstack.save(guest.uuid, path, timeout=0.3)
    assert_readable(caught.value)
    assert bench.toolstack.get_domain(guest.uuid).state is DomainState.RUNNING
    there = os.listdir(os.path.dirname(path))
    assert [name for name in there if not name.endswith(".save") or name in path] == [], "nothing half written"


def test_paths_that_are_not_usable(bench: Bench, guest: DomainInfo, tmp_path: Path) -> None:
    taken = bench.save_path()
    Path(taken).write_bytes(b"mine")
    for path in ("relative", "", taken):
        with pytest.raises(SpecInvalid) as caught:
            bench.toolstack.save(guest.uuid, path)
        assert_readable(caught.value)
    assert Path(taken).read_bytes() == b"mine"
    with pytest.raises(ToolstackError) as refused:
        bench.toolstack.save(guest.uuid, bench.save_path() + "/no/folder")
    assert_readable(refused.value)
    bench.answers(guest.uuid)
    for path in ("relative", str(tmp_path / "nothing")):
        with pytest.raises(SpecInvalid):
            bench.toolstack.restore(path, owner=OWNER)


def test_files_that_are_no_image(bench: Bench, guest: DomainInfo) -> None:
    path, toolstack = bench.save_path(), bench.toolstack
    toolstack.save(guest.uuid, path)
    whole = Path(path).read_bytes()
    damaged = Path(bench.save_path())
    for data in (b"", b"\0" * 4096, whole[: len(whole) // 2], whole[:-1], b"x" + whole):
        damaged.write_bytes(data)
        with pytest.raises(StreamInvalid) as caught:
            toolstack.restore(str(damaged), owner=OWNER)
        assert_readable(caught.value)
        assert toolstack.list_domains() == []
    toolstack.restore(path, owner=OWNER)


def test_states_that_cannot_be_saved(bench: Bench, guest: DomainInfo) -> None:
    toolstack = bench.toolstack
    toolstack.pause(guest.uuid)
    with pytest.raises(WrongState):
        toolstack.save(guest.uuid, bench.save_path())
    ended = bench.start(POWEROFF, on_poweroff=OnEvent.PRESERVE)
    toolstack.wait(ended.uuid, frozenset({DomainState.SHUTDOWN}), bench.kit.boot_timeout)
    with pytest.raises(WrongState):
        toolstack.save(ended.uuid, bench.save_path())
    with pytest.raises(DomainNotFound):
        toolstack.save(NOBODY, bench.save_path())


def test_a_restored_domain_can_be_saved_and_reset(bench: Bench, guest: DomainInfo) -> None:
    toolstack = bench.toolstack
    first, second = bench.save_path(), bench.save_path()
    toolstack.save(guest.uuid, first)
    toolstack.restore(first, owner=OWNER)
    toolstack.unpause(guest.uuid)
    bench.answers(guest.uuid)
    toolstack.save(guest.uuid, second)
    toolstack.restore(second, owner=OWNER)
    toolstack.unpause(guest.uuid)
    bench.answers(guest.uuid)
    toolstack.reset(guest.uuid)
    bench.until(lambda: toolstack.get_domain(guest.uuid).state is DomainState.RUNNING, "a fresh start")
