"""kill -9 of the agent within resize and the device verbs: done once, or undone and reported; the claims are right.

Every boundary, in both directions, is tried without a process of its own in
``tests/unit/plugins/test_plugin_resize_crash.py``; here is the real thing.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from agent_process import AgentProcess

from agent.resizing import Pending
from agent.resources import Capacity, ResourceClaims
from agent.wire import Reply
from hypervisor.errors import HostFailure
from hypervisor.toolstack.api import DomainState

UUID = "11111111-2222-3333-4444-555555555555"
WAIT = 30.0
TOTAL = 16384
MIB = 1 << 20

LIVE = ("claim", "schedule", "vcpus", "memory", "disks")
COLD = ("claim", "redefine", "restart", "settle", "disks")
WHEN = ("begun", "ran")


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[AgentProcess]:
    made = AgentProcess(tmp_path)
    yield made
    if made.process is not None:
        made.stop()


def disk(agent: AgentProcess, name: str = "disk.img") -> str:
    path = agent.folder / name
    if not path.exists():
        path.write_bytes(bytes(MIB))
    return str(path)


def created(agent: AgentProcess, **fields: Any) -> None:
    args = {"name": "web", "uuid": UUID, "memory_mib": 512, "max_memory_mib": 1024, "vcpus": 2, "max_vcpus": 4,
            "kernel": agent.kernel(), "disks": [{"id": "xvda", "path": disk(agent)}], **fields}  # fmt: skip
    call(agent, "create", args)


def call(agent: AgentProcess, verb: str, args: dict[str, Any]) -> dict[str, Any]:
    agent.start()
    with agent.client() as client:
        reply = client.call(verb, args, timeout=WAIT)
    assert reply.ok and reply.result is not None, reply.error
    agent.kill()
    return reply.result


def capacity(agent: AgentProcess) -> Capacity:
    """What is left by the world and the journal, while no agent runs."""
    journal = agent.journal()
    try:
        return ResourceClaims(agent.toolstack(), journal).capacity()
    finally:
        journal.close()


def crash(agent: AgentProcess, boundary: str, args: dict[str, Any], verb: str = "") -> tuple[Capacity, Reply]:
    """Send, let the agent die at `boundary`, count, start it again: what was left then, and the reply."""
    with agent.client() as client:
        agent.start(boundary)
        ident = client.send(verb or boundary.partition(":")[0], args)
        agent.wait_killed()
        left = capacity(agent)
        agent.start()
        reply = client.wait(ident, WAIT)
    assert agent.stop() == 0, agent.log
    journal = agent.journal()
    counts = journal.counts()
    journal.close()
    assert (counts["unfinished"], counts["claims"], counts["quarantine"]) == (0, 0, 0), agent.log
    return left, reply


def taken(boundary: str) -> bool:
    """Whether the claim is in the journal at this boundary."""
    return boundary not in ("resize:planned", "resize:claim:begun", "resize:finished")


@pytest.mark.parametrize(
    "boundary", ["resize:planned", *(f"resize:{step}:{when}" for step in LIVE for when in WHEN), "resize:finished"]
)
def test_live_resize_killed_at(agent: AgentProcess, boundary: str) -> None:
    created(agent)
    vcpus, memory_mib = (1, 300) if boundary.endswith(":begun") else (4, 1024)
    args = {"uuid": UUID, "vcpus": vcpus, "memory_mib": memory_mib, "weight": 512, "disks": {"xvda": 2 * MIB}}
    left, reply = crash(agent, boundary, args)
    assert reply.ok, reply.error
    if taken(boundary):
        assert TOTAL - left.memory_free_mib == max(512, memory_mib)
        assert left.vcpus_used + left.vcpus_claimed == max(2, vcpus)
    else:
        assert TOTAL - left.memory_free_mib == (memory_mib if boundary == "resize:finished" else 512)
    toolstack = agent.toolstack()
    info, spec = toolstack.get_domain(UUID), toolstack.get_spec(UUID)
    assert (info.vcpus, info.memory_mib, info.domid, spec.weight) == (vcpus, memory_mib, 1, 512)
    assert toolstack.list_devices(UUID)[0].size_bytes == 2 * MIB
    assert capacity(agent).memory_free_mib == TOTAL - memory_mib


@pytest.mark.parametrize("boundary", [f"resize:{step}:{when}" for step in LIVE for when in ("undoing",)])
def test_live_resize_killed_while_undone(agent: AgentProcess, boundary: str) -> None:
    created(agent)
    before = agent.toolstack().get_spec(UUID)
    agent.toolstack().inject_error("resize_disk", HostFailure("injected: no space"))
    args = {"uuid": UUID, "vcpus": 4, "memory_mib": 1024, "weight": 512, "disks": {"xvda": 2 * MIB}}
    left, reply = crash(agent, boundary, args)
    assert reply.error is not None and (reply.error["code"], reply.error["undone"]) == ("host.failure", True)
    assert TOTAL - left.memory_free_mib == 1024, "the claim outlives everything that is undone before it"
    info = agent.toolstack().get_domain(UUID)
    assert (info.vcpus, info.memory_mib) == (2, 512) and agent.toolstack().get_spec(UUID) == before
    assert capacity(agent).memory_free_mib == TOTAL - 512


@pytest.mark.parametrize("boundary", [*(f"resize:{step}:{when}" for step in COLD for when in WHEN), "resize:finished"])
def test_cold_resize_killed_at(agent: AgentProcess, boundary: str) -> None:
    created(agent, on_reboot="destroy")
    args = {"uuid": UUID, "mode": "auto", "vcpus": 8, "memory_mib": 2048, "disks": {"xvda": 2 * MIB}}
    left, reply = crash(agent, boundary, args)
    assert reply.ok, reply.error
    assert TOTAL - left.memory_free_mib == (512 if boundary == "resize:claim:begun" else 2048)
    toolstack = agent.toolstack()
    info, spec = toolstack.get_domain(UUID), toolstack.get_spec(UUID)
    assert (info.vcpus, info.max_vcpus, info.memory_mib, info.state) == (8, 8, 2048, DomainState.RUNNING)
    assert info.domid == 2, "it was restarted once"
    assert spec.on_reboot == "destroy"
    pending = Pending.of(spec.metadata)
    assert pending is not None and pending.old["memory_mib"] == 512


@pytest.mark.parametrize(
    "boundary", [f"resize:{step}:{when}" for step in ("restart", "redefine") for when in ("undoing", "undone")]
)
def test_cold_resize_killed_while_undone(agent: AgentProcess, boundary: str) -> None:
    created(agent)
    before = agent.toolstack().get_spec(UUID)
    agent.toolstack().inject_error("resize_disk", HostFailure("injected: no space"))
    args = {"uuid": UUID, "mode": "auto", "vcpus": 8, "memory_mib": 2048, "disks": {"xvda": 2 * MIB}}
    left, reply = crash(agent, boundary, args)
    assert reply.error is not None and (reply.error["code"], reply.error["undone"]) == ("host.failure", True)
    assert TOTAL - left.memory_free_mib == 2048
    info = agent.toolstack().get_domain(UUID)
    assert (info.vcpus, info.memory_mib, info.state) == (2, 512, DomainState.RUNNING)
    assert agent.toolstack().get_spec(UUID) == before


@pytest.mark.parametrize("boundary", [f"revert_resize:{step}:{when}" for step in COLD[:4] for when in WHEN])
def test_revert_killed_at(agent: AgentProcess, boundary: str) -> None:
    created(agent, memory_mib=1024)
    before = agent.toolstack().get_spec(UUID)
    call(agent, "resize", {"uuid": UUID, "mode": "cold", "memory_mib": 256, "max_memory_mib": 256})
    left, reply = crash(agent, boundary, {"uuid": UUID})
    assert reply.ok, reply.error
    assert TOTAL - left.memory_free_mib == 1024, "the way back was never given away"
    info = agent.toolstack().get_domain(UUID)
    assert (info.memory_mib, info.max_memory_mib, info.domid) == (1024, 1024, 3)
    assert agent.toolstack().get_spec(UUID).metadata == before.metadata


@pytest.mark.parametrize("boundary", [f"confirm_resize:confirm:{when}" for when in WHEN])
def test_confirm_killed_at(agent: AgentProcess, boundary: str) -> None:
    created(agent)
    call(agent, "resize", {"uuid": UUID, "mode": "cold", "memory_mib": 256, "max_memory_mib": 256})
    _left, reply = crash(agent, boundary, {"uuid": UUID})
    assert reply.ok, reply.error
    assert Pending.of(agent.toolstack().get_domain(UUID).metadata) is None
    assert capacity(agent).memory_free_mib == TOTAL - 256


DEVICES = [
    *(f"{verb}:{step}:{when}" for verb in ("attach_disk", "attach_nic") for step in ("attach", "connect")
      for when in ("begun", "ran")),
    *(f"{verb}:detach:{when}" for verb in ("detach_disk", "detach_nic") for when in ("begun", "ran")),
    *(f"dump_core:dump:{when}" for when in ("begun", "ran")),
    "block_list:finishing",
]  # fmt: skip


@pytest.mark.parametrize("boundary", DEVICES)
def test_device_verbs_killed_at(agent: AgentProcess, boundary: str) -> None:
    created(agent, nics=[{}])
    verb = boundary.partition(":")[0]
    args: dict[str, Any] = {
        "attach_disk": {"disk": {"id": "xvdb", "path": disk(agent, "b.img")}},
        "attach_nic": {"nic": {"id": 1}},
        "detach_disk": {"id": "xvda"},
        "detach_nic": {"id": 0},
        "dump_core": {"name": "core"},
        "block_list": {},
    }[verb]
    _left, reply = crash(agent, boundary, {"uuid": UUID} | args)
    assert reply.ok, reply.error
    there = [device.id for device in agent.toolstack().list_devices(UUID)]
    expected = {
        "attach_disk": ["xvda", "xvdb", "0"],
        "attach_nic": ["xvda", "0", "1"],
        "detach_disk": ["0"],
        "detach_nic": ["xvda"],
    }
    assert there == expected.get(verb, ["xvda", "0"])
    if verb == "dump_core":
        assert [path.name for path in (agent.folder / "state" / "cores").iterdir()] == ["core"]


@pytest.mark.parametrize(("boundary", "sent"), [("sysrq:sysrq:begun", 0), ("sysrq:sysrq:ran", 1)])
def test_a_key_is_never_sent_twice(agent: AgentProcess, boundary: str, sent: int) -> None:
    created(agent)
    _left, reply = crash(agent, boundary, {"uuid": UUID, "key": "c"})
    assert reply.error is not None and reply.error["code"] == "instruction.outcome_unknown"
    assert agent.toolstack().console_log(UUID).count(b"sysrq: c") == sent


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("call_", ["set_memory", "set_vcpus", "resize_disk", "redefine", "reboot"])
def test_resize_killed_inside_the_driver(agent: AgentProcess, call_: str, when: str) -> None:
    created(agent)
    cold = call_ in ("redefine", "reboot")
    agent.toolstack().inject_kill(call_, when)
    size = {"vcpus": 8, "memory_mib": 2048, "mode": "auto"} if cold else {"vcpus": 4, "memory_mib": 1024}
    left, reply = crash(agent, "", {"uuid": UUID, "disks": {"xvda": 2 * MIB}, **size}, "resize")
    assert reply.ok, reply.error
    assert TOTAL - left.memory_free_mib == size["memory_mib"]
    info = agent.toolstack().get_domain(UUID)
    assert (info.vcpus, info.memory_mib, info.domid) == (size["vcpus"], size["memory_mib"], 2 if cold else 1)


@pytest.mark.parametrize("boundary", ["create:build:begun", "create:build:ran", "create:start:ran"])
def test_create_with_devices_killed_at(agent: AgentProcess, boundary: str) -> None:
    args = {"name": "web", "uuid": UUID, "memory_mib": 64, "kernel": agent.kernel(), "nics": [{}, {}],
            "disks": [{"id": "xvda", "path": disk(agent)}]}  # fmt: skip
    _left, reply = crash(agent, boundary, args)
    assert reply.ok, reply.error
    toolstack = agent.toolstack()
    assert [device.id for device in toolstack.list_devices(UUID)] == ["xvda", "0", "1"]
    assert toolstack.get_domain(UUID).domid == 1, "it was built once, with the MACs of its plan"


@pytest.mark.parametrize("boundary", ["create:start:undoing", "create:build:undoing", "create:build:undone"])
def test_create_with_devices_killed_while_undone(agent: AgentProcess, boundary: str) -> None:
    agent.toolstack().inject_error("unpause", HostFailure("injected: it does not run"))
    args = {"name": "web", "uuid": UUID, "memory_mib": 64, "kernel": agent.kernel(),
            "disks": [{"id": "xvda", "path": disk(agent)}]}  # fmt: skip
    _left, reply = crash(agent, boundary, args)
    assert reply.error is not None and (reply.error["code"], reply.error["undone"]) == ("host.failure", True)
    created(agent)  # the image is free again
