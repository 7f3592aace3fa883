"""The agent's death and the host process's, with real domain processes (their guests are scripted)."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from agent_process import AgentProcess

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))
from host_rig import HostRig, alive, kill_process, until

from agent.wire import Reply
from hypervisor.toolstack.api import DomainState

UUID = "11111111-2222-3333-4444-555555555555"
WAIT = 40.0


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


def args(tmp_path: Path, script: str = "print hello\nwait", **fields: Any) -> dict[str, Any]:
    kernel = tmp_path / "guest"
    kernel.write_text(f"#scripted\n{script}")
    return {"name": "web", "uuid": UUID, "memory_mib": 8, "kernel": str(kernel), **fields}


def crash_and_restart(agent: AgentProcess, boundary: str, verb: str, given: dict[str, Any]) -> Reply:
    with agent.client() as client:
        agent.start(boundary)
        ident = client.send(verb, given)
        agent.wait_killed()
        agent.start()
        return client.wait(ident, WAIT)


@pytest.mark.parametrize(
    "boundary",
    ["create:planned", "create:build:begun", "create:build:ran", "create:start:begun", "create:start:ran",
     "create:finishing"],
)  # fmt: skip
def test_create_killed_at(agent: AgentProcess, rig: HostRig, tmp_path: Path, boundary: str) -> None:
    reply = crash_and_restart(agent, boundary, "create", args(tmp_path))
    assert reply.ok, reply.error
    toolstack = rig.connect()
    (domain,) = toolstack.list_domains()
    assert (domain.uuid, domain.state) == (UUID, DomainState.RUNNING)
    assert rig.left_behind() == [UUID], "one domain, one folder, one process"
    until(lambda: b"hello" in toolstack.console_log(UUID), "the guest to print")
    toolstack.close()


@pytest.mark.parametrize("boundary", ["destroy:destroy:begun", "destroy:destroy:ran"])
def test_destroy_killed_at(agent: AgentProcess, rig: HostRig, tmp_path: Path, boundary: str) -> None:
    agent.start()
    with agent.client() as client:
        assert client.call("create", args(tmp_path), timeout=WAIT).ok
    pid = rig.process_of(UUID)
    agent.kill()
    assert crash_and_restart(agent, boundary, "destroy", {"uuid": UUID}).ok
    assert rig.left_behind() == [] and not alive(pid)


def test_the_agent_s_restart_touches_no_domain(agent: AgentProcess, rig: HostRig, tmp_path: Path) -> None:
    agent.start()
    with agent.client() as client:
        assert client.call("create", args(tmp_path), timeout=WAIT).ok
        pid = rig.process_of(UUID)
        agent.kill()
        agent.start()
        shown = client.call("show", {"uuid": UUID}, timeout=WAIT).result
    assert shown is not None and shown["domain"]["own"] is True and shown["domain"]["state"] == "running"
    assert rig.process_of(UUID) == pid and alive(pid)


def test_a_killed_host_process_is_a_pause_for_the_agent(agent: AgentProcess, rig: HostRig, tmp_path: Path) -> None:
    agent.start()
    with agent.client() as client:
        assert client.call("create", args(tmp_path), timeout=WAIT).ok
        rig.kill()
        refused = client.call("create", args(tmp_path, name="other", uuid=UUID.replace("1", "7")), timeout=WAIT)
        assert refused.error is not None
        assert (refused.error["code"], refused.error["retryable"]) == ("host.unavailable", True)
        rig.start()
        listed = until(lambda: client.call("list", timeout=WAIT).result, "the agent to see its host again")
        assert [domain["uuid"] for domain in listed["domains"]] == [UUID]
        assert client.call("destroy", {"uuid": UUID}, timeout=WAIT).ok


def test_the_agent_waits_for_a_host_process_that_comes_late(agent: AgentProcess, rig: HostRig, tmp_path: Path) -> None:
    """Killed in a step with the host process gone too: nobody can say what happened until it is back."""
    with agent.client() as client:
        agent.start("create:build:ran")
        ident = client.send("create", args(tmp_path))
        agent.wait_killed()
        rig.kill()
        agent.start()
        started = time.monotonic()
        until(lambda: "asking again" in agent.log or "trying again" in agent.log, "the agent to notice")
        assert time.monotonic() - started < WAIT
        rig.start()
        reply = client.wait(ident, WAIT)
    assert reply.ok, reply.error
    assert rig.left_behind() == [UUID]


@pytest.mark.parametrize(
    ("script", "change", "code"),
    [
        ("print hello", {"kernel": "/etc/passwd"}, "kernel.invalid"),
        ("print hello", {"kernel": "/nowhere"}, "kernel.invalid"),
        ("print hello", {"memory_mib": 1 << 20}, "host.insufficient_memory"),
        ("die-in-build", {}, "host.failure"),
    ],
)
def test_bad_input_leaves_nothing(
    agent: AgentProcess, rig: HostRig, tmp_path: Path, script: str, change: dict[str, Any], code: str
) -> None:
    agent.start()
    with agent.client() as client:
        reply = client.call("create", args(tmp_path, script) | change, timeout=WAIT)
    assert reply.error is not None and (reply.error["code"], reply.error["undone"]) == (code, True), reply.error
    assert "\n" not in reply.error["message"] and rig.left_behind() == []
    toolstack = rig.connect()
    info = toolstack.host_info()
    assert (info.domains, info.memory_free_mib) == (0, info.memory_total_mib)
    toolstack.close()
    agent.stop()
    journal = agent.journal()
    counts = journal.counts()
    journal.close()
    assert (counts["unfinished"], counts["claims"]) == (0, 0)


def test_a_guest_that_crashes_ends_as_that_domain_only(agent: AgentProcess, rig: HostRig, tmp_path: Path) -> None:
    agent.start()
    with agent.client() as client:
        assert client.call("create", args(tmp_path), timeout=WAIT).ok
        kill_process(rig.process_of(UUID), signal.SIGSEGV)
        reply = client.call("create", args(tmp_path, name="other", uuid=UUID.replace("1", "7")), timeout=WAIT)
        assert reply.ok, reply.error
        end = time.monotonic() + WAIT
        while client.call("show", {"uuid": UUID}, timeout=WAIT).result["domain"]["state"] != "crashed":  # type: ignore[index]
            assert time.monotonic() < end
            threading.Event().wait(0.05)
        other = client.call("show", {"uuid": UUID.replace("1", "7")}, timeout=WAIT).result
    assert other is not None and other["domain"]["state"] == "running"
