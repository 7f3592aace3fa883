"""Cold resize, confirm, revert: nothing is lost, whatever the guest does."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from agent_rig import Rig, make_rig

from agent.resizing import PENDING_KEY, Pending
from hypervisor.errors import HostFailure, HostUnavailable
from hypervisor.toolstack.api import DomainState, OnEvent
from hypervisor.toolstack.drivers.fake import FakeToolstack

MIB = 1 << 20


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    made = make_rig(tmp_path, FakeToolstack(None, cpus=8, memory_mib=2048))
    yield made
    made.journal.close()


def grow(uuid: str, **more: Any) -> dict[str, Any]:
    return {"uuid": uuid, "mode": "auto", "vcpus": 4, "memory_mib": 512, **more}


def run_of(rig: Rig, uuid: str) -> tuple[int, int, int, int, DomainState]:
    info = rig.toolstack.get_domain(uuid)
    return info.vcpus, info.max_vcpus, info.memory_mib, info.max_memory_mib, info.state


def test_resize_confirm(rig: Rig) -> None:
    uuid = rig.create(metadata={"tenant": "blue"})
    before = rig.toolstack.get_spec(uuid)
    domid = rig.toolstack.get_domain(uuid).domid
    reply = rig.run("resize", grow(uuid))
    assert reply.ok and reply.result is not None, reply.error
    assert [step["name"] for step in reply.steps] == ["claim", "redefine", "restart", "settle"]
    assert reply.result["mode"] == "cold"
    assert reply.result["pending"]["old"] == {
        "vcpus": 1, "max_vcpus": 1, "memory_mib": 64, "max_memory_mib": 64, "weight": 256, "cap": 0,
    }  # fmt: skip
    assert run_of(rig, uuid) == (4, 4, 512, 512, DomainState.RUNNING)
    after = rig.toolstack.get_spec(uuid)
    assert (after.on_poweroff, after.on_reboot, after.on_crash) == (
        before.on_poweroff, before.on_reboot, before.on_crash,
    )  # fmt: skip
    assert rig.toolstack.get_domain(uuid).domid != domid and ("tenant", "blue") in after.metadata
    rig.refused("resize.pending", "resize", {"uuid": uuid, "vcpus": 1})
    confirmed = rig.ok("confirm_resize", {"uuid": uuid})
    assert PENDING_KEY not in confirmed["domain"]["metadata"]
    assert run_of(rig, uuid) == (4, 4, 512, 512, DomainState.RUNNING)
    for verb in ("confirm_resize", "revert_resize"):
        rig.refused("resize.none_pending", verb, {"uuid": uuid})


def test_resize_revert(rig: Rig) -> None:
    uuid = rig.create(disks=[{"id": "xvda", "path": rig.image()}])
    before = rig.toolstack.get_spec(uuid)
    rig.ok("resize", grow(uuid, weight=9, disks={"xvda": 2 * MIB}))
    assert rig.toolstack.get_spec(uuid).weight == 9
    rig.ok("revert_resize", {"uuid": uuid})
    assert run_of(rig, uuid) == (1, 1, 64, 64, DomainState.RUNNING)
    after = rig.toolstack.get_spec(uuid)
    assert after.metadata == before.metadata and after.weight == 256 and after.disks == before.disks
    assert rig.toolstack.list_devices(uuid)[0].size_bytes == 2 * MIB
    rig.clean()


def test_a_smaller_size_keeps_room_to_go_back(rig: Rig) -> None:
    uuid = rig.create(memory_mib=1024)
    rig.ok("resize", {"uuid": uuid, "mode": "cold", "memory_mib": 256, "max_memory_mib": 256})
    claims: Any = rig.host.claims
    assert (claims.capacity().memory_used_mib, claims.capacity().memory_claimed_mib) == (256, 768)
    rig.refused("host.insufficient_memory", "create", {"name": "b", "memory_mib": 1200, "kernel": str(rig.kernel)})
    rig.create("other", memory_mib=1024)  # exactly what is free
    rig.ok("revert_resize", {"uuid": uuid})
    assert claims.capacity().memory_free_mib == 0 and rig.toolstack.get_domain(uuid).memory_mib == 1024
    rig.ok("resize", {"uuid": uuid, "mode": "cold", "memory_mib": 256, "max_memory_mib": 256, "confirm": False})
    assert claims.capacity().memory_free_mib == 768
    rig.refused("resize.none_pending", "revert_resize", {"uuid": uuid})


def test_it_confirms_itself(rig: Rig) -> None:
    uuid = rig.create(memory_mib=512)
    rig.ok("resize", {"uuid": uuid, "mode": "cold", "max_memory_mib": 300, "memory_mib": 300, "confirm_seconds": 60})
    spec = rig.toolstack.get_spec(uuid)
    pending = Pending.of(spec.metadata)
    assert pending is not None and pending.open() and not pending.open(time.time() + 61)
    late = Pending(pending.since - 100, pending.confirm_by - 100, pending.old)
    rig.toolstack.redefine(uuid, late.applied(spec))
    assert rig.host.claims.capacity().memory_claimed_mib == 0  # type: ignore[attr-defined]
    rig.refused("domain.wrong_state", "revert_resize", {"uuid": uuid})
    rig.ok("resize", {"uuid": uuid, "memory_mib": 290})
    rig.ok("confirm_resize", {"uuid": uuid})
    assert Pending.of(rig.toolstack.get_spec(uuid).metadata) is None


@pytest.mark.parametrize("ends", ["destroy", "preserve", "restart"])
def test_no_end_of_the_guest_takes_the_domain_away(rig: Rig, ends: str) -> None:
    """A guest that powers off when it is asked to reboot, under every setting."""
    uuid = rig.create(on_poweroff=ends, on_reboot=ends, on_crash=ends)
    rig.ok("resize", grow(uuid))
    assert run_of(rig, uuid) == (4, 4, 512, 512, DomainState.RUNNING)
    spec = rig.toolstack.get_spec(uuid)
    assert {spec.on_poweroff, spec.on_reboot, spec.on_crash} == {OnEvent(ends)}


def test_a_guest_that_powers_off_instead(rig: Rig) -> None:
    uuid = rig.create()
    rig.toolstack.reboot = rig.toolstack.shutdown  # type: ignore[method-assign]
    rig.ok("resize", grow(uuid))
    assert run_of(rig, uuid) == (4, 4, 512, 512, DomainState.RUNNING)


def test_a_guest_that_does_not_stop(rig: Rig) -> None:
    uuid = rig.create(cmdline="fake.shutdown=ignore")
    before, domid = rig.toolstack.get_spec(uuid), rig.toolstack.get_domain(uuid).domid
    error = rig.refused("domain.timeout", "resize", grow(uuid, wait_seconds=0.05))
    assert error["undone"] is True and rig.toolstack.get_spec(uuid) == before
    assert run_of(rig, uuid) == (1, 1, 64, 64, DomainState.RUNNING)
    assert rig.toolstack.get_domain(uuid).domid == domid
    rig.ok("resize", grow(uuid, wait_seconds=0.05, force=True))
    assert run_of(rig, uuid) == (4, 4, 512, 512, DomainState.RUNNING)


def test_a_paused_guest_needs_force(rig: Rig) -> None:
    uuid = rig.create(start=False)
    rig.refused("domain.wrong_state", "resize", grow(uuid))
    rig.ok("resize", grow(uuid, force=True))
    assert run_of(rig, uuid) == (4, 4, 512, 512, DomainState.RUNNING)


@pytest.mark.parametrize(
    ("asked", "code"), [("shutdown", "host.insufficient_memory"), ("reboot", "host.insufficient_memory")]
)
def test_a_host_that_cannot_start_it_anew_gets_the_old_one_back(rig: Rig, asked: str, code: str) -> None:
    """Somebody beside the agent takes the memory between the claim and the restart."""
    uuid = rig.create()
    before = rig.toolstack.get_spec(uuid)
    real = rig.toolstack.redefine
    theirs = rig.foreign()
    once = iter([True])

    def redefine(ident: str, spec: Any) -> None:
        real(ident, spec)
        if next(once, False):
            with rig.toolstack.store.transaction():
                domain = rig.toolstack.store.get(theirs)
                domain.memory_mib = 1900
                rig.toolstack.store.put(domain)

    rig.toolstack.redefine = redefine  # type: ignore[method-assign]
    rig.toolstack.reboot = getattr(rig.toolstack, asked)  # type: ignore[method-assign]
    error = rig.refused(code, "resize", grow(uuid))
    assert error["undone"] is True and rig.toolstack.get_spec(uuid) == before
    assert run_of(rig, uuid) == (1, 1, 64, 64, DomainState.RUNNING)


@pytest.mark.parametrize("on_reboot", ["restart", "destroy"])
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("call", ["redefine", "reboot", "resize_disk"])
@pytest.mark.parametrize("error", [HostUnavailable("away"), HostFailure("broken")])
def test_a_driver_that_fails(rig: Rig, call: str, when: str, error: Any, on_reboot: str) -> None:
    uuid = rig.create(on_reboot=on_reboot, disks=[{"id": "xvda", "path": rig.image()}])
    before = rig.toolstack.get_spec(uuid)
    rig.toolstack.inject_error(call, error, when=when)
    failed = rig.refused(error.code, "resize", grow(uuid, disks={"xvda": 2 * MIB}))
    assert failed["undone"] is ((call, when) != ("resize_disk", "after"))
    assert rig.toolstack.get_spec(uuid) == before
    assert run_of(rig, uuid) == (1, 1, 64, 64, DomainState.RUNNING)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", json.dumps({"since": 1, "confirm_by": 0, "old": {}}), json.dumps({"old": 5})]
)
def test_metadata_that_is_no_pending_resize(text: str) -> None:
    assert Pending.of(((PENDING_KEY, text),)) is None
    assert Pending.of(()) is None
