"""The agent dies at every boundary of a resize: what runs after it finishes it once, and the claims were right then.

``tests/integration/test_agent_crash_resize.py`` does some of this with SIGKILL.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from agent_rig import Rig, make_rig

from agent import executor
from agent.journal import Journal
from agent.resizing import Pending
from agent.resources import Capacity
from agent.wire import Reply
from hypervisor.errors import HostFailure
from hypervisor.toolstack.api import DomainState
from hypervisor.toolstack.drivers.fake import FakeToolstack

MIB = 1 << 20
TOTAL = 4096
OLD = 512
LIVE = ("claim", "schedule", "vcpus", "memory", "disks")
COLD = ("claim", "redefine", "restart", "settle", "disks")
FORWARD = ("begun", "ran", "done")
BACK = ("undoing", "undone")


class Killed(BaseException):
    """Nothing in the agent catches it."""


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    made = make_rig(tmp_path, FakeToolstack(None, cpus=8, memory_mib=TOTAL))
    yield made
    made.journal.close()


def create(rig: Rig, **fields: Any) -> str:
    args = {"memory_mib": OLD, "max_memory_mib": 1024, "vcpus": 2, "max_vcpus": 4}
    return rig.create(disks=[{"id": "xvda", "path": rig.image()}], **(args | fields))


def crash(rig: Rig, monkeypatch: pytest.MonkeyPatch, at: str, args: dict[str, Any]) -> tuple[Capacity, Reply]:
    """What was left when it died at `at`, and the reply after another life."""

    def boundary(name: str) -> None:
        if name == at:
            raise Killed

    verb = at.partition(":")[0]
    ident = rig.accept(verb, args)
    monkeypatch.setattr(executor, "boundary", boundary)
    with pytest.raises(Killed):
        rig.executor.run(ident)
    monkeypatch.undo()
    rig.journal.close()
    rig.journal = Journal(rig.journal.path)  # another process would open it anew
    rig.executor._journal = rig.host.claims._journal = rig.journal  # type: ignore[attr-defined]
    left: Capacity = rig.host.claims.capacity()  # type: ignore[attr-defined]
    rig.executor.run(ident)
    rig.clean()
    return left, rig.reply(ident)


def held(left: Capacity) -> int:
    return TOTAL - left.memory_free_mib


@pytest.mark.parametrize("at", ["planned", *(f"{step}:{when}" for step in LIVE for when in FORWARD), "finishing"])
@pytest.mark.parametrize(("vcpus", "memory_mib"), [(4, 1024), (1, 300)])
def test_live(rig: Rig, monkeypatch: pytest.MonkeyPatch, at: str, vcpus: int, memory_mib: int) -> None:
    uuid = create(rig)
    args = {"uuid": uuid, "vcpus": vcpus, "memory_mib": memory_mib, "weight": 9, "disks": {"xvda": 2 * MIB}}
    left, reply = crash(rig, monkeypatch, f"resize:{at}", args)
    assert reply.ok, reply.error
    before = at in ("planned", "claim:begun")
    assert held(left) == (OLD if before else max(OLD, memory_mib))
    assert left.vcpus_used + left.vcpus_claimed == (2 if before else max(2, vcpus))
    info = rig.toolstack.get_domain(uuid)
    assert (info.vcpus, info.memory_mib, info.domid) == (vcpus, memory_mib, 1)
    assert rig.toolstack.get_spec(uuid).weight == 9
    assert rig.toolstack.list_devices(uuid)[0].size_bytes == 2 * MIB
    assert held(rig.host.claims.capacity()) == memory_mib  # type: ignore[attr-defined]


@pytest.mark.parametrize("at", [f"{step}:{when}" for step in LIVE for when in BACK])
@pytest.mark.parametrize(("vcpus", "memory_mib"), [(4, 1024), (1, 300)])
def test_live_undone(rig: Rig, monkeypatch: pytest.MonkeyPatch, at: str, vcpus: int, memory_mib: int) -> None:
    uuid = create(rig)
    spec = rig.toolstack.get_spec(uuid)
    rig.toolstack.inject_error("resize_disk", HostFailure("no space"))
    args = {"uuid": uuid, "vcpus": vcpus, "memory_mib": memory_mib, "weight": 9, "disks": {"xvda": 2 * MIB}}
    left, reply = crash(rig, monkeypatch, f"resize:{at}", args)
    assert reply.error is not None and (reply.error["code"], reply.error["undone"]) == ("host.failure", True)
    assert held(left) == (OLD if at == "claim:undone" else max(OLD, memory_mib))
    info = rig.toolstack.get_domain(uuid)
    assert (info.vcpus, info.memory_mib) == (2, OLD) and rig.toolstack.get_spec(uuid) == spec


@pytest.mark.parametrize("at", ["planned", *(f"{step}:{when}" for step in COLD for when in FORWARD), "finishing"])
@pytest.mark.parametrize("on_reboot", ["restart", "destroy"])
@pytest.mark.parametrize("memory_mib", [2048, 128])
def test_cold(rig: Rig, monkeypatch: pytest.MonkeyPatch, at: str, on_reboot: str, memory_mib: int) -> None:
    uuid = create(rig, on_reboot=on_reboot)
    args = {"uuid": uuid, "mode": "auto", "vcpus": 8, "memory_mib": memory_mib, "max_memory_mib": memory_mib,
            "disks": {"xvda": 2 * MIB}}  # fmt: skip
    left, reply = crash(rig, monkeypatch, f"resize:{at}", args)
    assert reply.ok, reply.error
    assert held(left) == (OLD if at in ("planned", "claim:begun") else max(OLD, memory_mib))
    info, spec = rig.toolstack.get_domain(uuid), rig.toolstack.get_spec(uuid)
    assert (info.vcpus, info.memory_mib, info.state) == (8, memory_mib, DomainState.RUNNING)
    assert info.domid == 2, "it was restarted once"
    assert spec.on_reboot == on_reboot and Pending.of(spec.metadata) is not None
    assert held(rig.host.claims.capacity()) == max(OLD, memory_mib)  # type: ignore[attr-defined]


@pytest.mark.parametrize("at", [f"{step}:{when}" for step in COLD for when in BACK])
@pytest.mark.parametrize("on_reboot", ["restart", "destroy"])
def test_cold_undone(rig: Rig, monkeypatch: pytest.MonkeyPatch, at: str, on_reboot: str) -> None:
    uuid = create(rig, on_reboot=on_reboot)
    spec = rig.toolstack.get_spec(uuid)
    rig.toolstack.inject_error("resize_disk", HostFailure("no space"))
    args = {"uuid": uuid, "mode": "auto", "vcpus": 8, "memory_mib": 2048, "disks": {"xvda": 2 * MIB}}
    left, reply = crash(rig, monkeypatch, f"resize:{at}", args)
    assert reply.error is not None and (reply.error["code"], reply.error["undone"]) == ("host.failure", True)
    assert held(left) == (OLD if at == "claim:undone" else 2048)
    info = rig.toolstack.get_domain(uuid)
    assert (info.vcpus, info.memory_mib, info.state) == (2, OLD, DomainState.RUNNING)
    assert rig.toolstack.get_spec(uuid) == spec


@pytest.mark.parametrize("at", ["planned", *(f"{step}:{when}" for step in COLD[:4] for when in FORWARD), "finishing"])
def test_revert(rig: Rig, monkeypatch: pytest.MonkeyPatch, at: str) -> None:
    uuid = create(rig, memory_mib=1024)
    spec = rig.toolstack.get_spec(uuid)
    rig.ok("resize", {"uuid": uuid, "mode": "cold", "memory_mib": 256, "max_memory_mib": 256})
    left, reply = crash(rig, monkeypatch, f"revert_resize:{at}", {"uuid": uuid})
    assert reply.ok, reply.error
    assert held(left) == 1024, "the way back was never given away"
    info = rig.toolstack.get_domain(uuid)
    assert (info.memory_mib, info.max_memory_mib, info.domid) == (1024, 1024, 3)
    assert rig.toolstack.get_spec(uuid).metadata == spec.metadata


@pytest.mark.parametrize("at", ["planned", *(f"confirm:{when}" for when in FORWARD), "finishing"])
def test_confirm(rig: Rig, monkeypatch: pytest.MonkeyPatch, at: str) -> None:
    uuid = create(rig)
    rig.ok("resize", {"uuid": uuid, "mode": "cold", "memory_mib": 256, "max_memory_mib": 256})
    _left, reply = crash(rig, monkeypatch, f"confirm_resize:{at}", {"uuid": uuid})
    assert reply.ok and Pending.of(rig.toolstack.get_spec(uuid).metadata) is None
    assert held(rig.host.claims.capacity()) == 256  # type: ignore[attr-defined]
