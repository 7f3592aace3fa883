"""Resize and devices by the agent on real host and domain processes, with the agent or the host process killed.

The guests are scripted: they restart when they are asked to, and are taken to follow a change of size at once.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from agent_process import AgentProcess

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))
from host_rig import HostRig

from agent.resizing import Pending
from agent.wire import Reply
from hypervisor.toolstack.api import DomainInfo, DomainSpec, DomainState

UUID = "11111111-2222-3333-4444-555555555555"
WAIT = 60.0
COLD = {"uuid": UUID, "mode": "auto", "vcpus": 2, "memory_mib": 32, "weight": 512}


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[HostRig]:
    made = HostRig(tmp_path / "host").start()
    yield made
    made.stop()


@pytest.fixture
def agent(tmp_path: Path, rig: HostRig) -> Iterator[AgentProcess]:
    made = AgentProcess(tmp_path, driver=("--driver-name", "embedded", "--driver-socket", str(rig.socket)))
    yield made
    if made.process is not None:
        made.stop()


def create(agent: AgentProcess, *words: str, **fields: Any) -> None:
    kernel = agent.folder / "guest"
    kernel.write_text("\n".join(["#scripted", "print hello", *(words or ("wait",))]))
    args = {"name": "web", "uuid": UUID, "memory_mib": 8, "kernel": str(kernel), **fields}
    agent.start()
    with agent.client() as client:
        reply = client.call("create", args, timeout=WAIT)
    assert reply.ok, reply.error
    agent.kill()


def send(agent: AgentProcess, verb: str, args: dict[str, Any], kill_at: str = "") -> Reply:
    """Let the agent die at `kill_at`, start it again: the reply."""
    with agent.client() as client:
        agent.start(kill_at)
        ident = client.send(verb, args)
        if kill_at:
            agent.wait_killed()
            agent.start()
        return client.wait(ident, WAIT)


def now(rig: HostRig) -> tuple[DomainInfo, DomainSpec]:
    toolstack = rig.connect()
    try:
        return toolstack.get_domain(UUID), toolstack.get_spec(UUID)
    finally:
        toolstack.close()


@pytest.mark.parametrize(
    "kill_at",
    ["", "resize:claim:ran", "resize:redefine:ran", "resize:restart:begun", "resize:restart:ran", "resize:settle:ran"],
)
def test_cold_resize_and_revert(agent: AgentProcess, rig: HostRig, kill_at: str) -> None:
    create(agent, on_reboot="destroy")
    before, spec = now(rig)
    reply = send(agent, "resize", COLD, kill_at)
    assert reply.ok, reply.error
    info, new = now(rig)
    assert (info.max_vcpus, info.max_memory_mib, info.memory_target_mib, info.state) == (2, 32, 32, DomainState.RUNNING)
    assert info.domid == before.domid + 1, "it was restarted once"
    assert (new.vcpus, new.memory_mib, new.weight, new.on_reboot) == (2, 32, 512, spec.on_reboot)
    assert Pending.of(info.metadata) is not None and rig.left_behind() == [UUID]
    agent.kill()
    reply = send(agent, "revert_resize", {"uuid": UUID})
    assert reply.ok, reply.error
    info, old = now(rig)
    assert (info.max_vcpus, info.max_memory_mib) == (1, 8) and old.metadata == spec.metadata
    assert (old.vcpus, old.memory_mib, old.weight, old.on_reboot) == (1, 8, 256, spec.on_reboot)
    assert rig.left_behind() == [UUID]


@pytest.mark.parametrize("kill_at", ["", "resize:restart:undoing", "resize:redefine:undoing", "resize:redefine:undone"])
def test_a_guest_that_does_not_restart(agent: AgentProcess, rig: HostRig, kill_at: str) -> None:
    create(agent, "deaf")
    before = now(rig)
    reply = send(agent, "resize", COLD | {"wait_seconds": 0.5}, kill_at)
    assert reply.error is not None and (reply.error["code"], reply.error["undone"]) == ("domain.timeout", True)
    info, spec = now(rig)
    assert spec == before[1] and (info.domid, info.state) == (before[0].domid, DomainState.RUNNING)
    agent.kill()
    assert send(agent, "resize", COLD | {"wait_seconds": 0.5, "force": True}).ok
    assert now(rig)[0].max_memory_mib == 32


@pytest.mark.parametrize(
    "kill_at", ["resize:schedule:ran", "resize:vcpus:ran", "resize:memory:begun", "resize:memory:ran"]
)
def test_live_resize(agent: AgentProcess, rig: HostRig, kill_at: str) -> None:
    create(agent, max_vcpus=2, max_memory_mib=32)
    before, _spec = now(rig)
    reply = send(agent, "resize", {"uuid": UUID, "weight": 9, "cap": 50, "vcpus": 2, "memory_mib": 32}, kill_at)
    assert reply.ok, reply.error
    info, spec = now(rig)
    assert (info.vcpus, info.memory_target_mib, info.domid) == (2, 32, before.domid)
    assert (spec.vcpus, spec.memory_mib, spec.weight, spec.cap) == (2, 32, 9, 50)


def test_the_host_process_dies_with_the_agent(agent: AgentProcess, rig: HostRig) -> None:
    create(agent)
    with agent.client() as client:
        agent.start("resize:restart:begun")
        ident = client.send("resize", COLD)
        agent.wait_killed()
        rig.kill()
        rig.start()
        agent.start()
        reply = client.wait(ident, WAIT)
    assert reply.ok, reply.error
    info, spec = now(rig)
    assert (info.max_vcpus, info.max_memory_mib, spec.weight) == (2, 32, 512) and rig.left_behind() == [UUID]


@pytest.mark.parametrize("kill_at", ["", "attach_disk:attach:begun", "attach_disk:attach:ran"])
def test_a_disk_comes_and_goes(agent: AgentProcess, rig: HostRig, kill_at: str) -> None:
    image = rig.folder / "disk.2048"
    image.write_bytes(bytes(1 << 20))
    create(agent)
    args = {"uuid": UUID, "disk": {"id": "xvda", "path": str(image)}, "wait_seconds": 0.2}
    reply = send(agent, "attach_disk", args, kill_at)
    assert reply.ok and reply.result is not None, reply.error
    assert (reply.result["device"]["id"], reply.result["device"]["size_bytes"]) == ("xvda", 1 << 20)
    assert len(now(rig)[1].disks) == 1
    agent.kill()
    args = {"uuid": UUID, "id": "xvda", "wait_seconds": 0.5, "force": True}
    reply = send(agent, "detach_disk", args, kill_at.replace("attach", "detach"))
    assert reply.ok, reply.error
    assert now(rig)[1].disks == ()
