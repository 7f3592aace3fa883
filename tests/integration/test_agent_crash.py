"""kill -9 of the agent at every boundary: after a restart each instruction is done once, or undone and reported."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from agent_process import AgentProcess

from agent.errors import ReplyTimeout
from agent.wire import Reply
from hypervisor.errors import HostFailure
from hypervisor.toolstack.api import DomainState

UUID = "11111111-2222-3333-4444-555555555555"
WAIT = 30.0

CREATE = [
    "consumer:taken",
    "consumer:journalled",
    "consumer:acked",
    "create:planned",
    *(
        f"create:{step}:{when}"
        for step in ("claim", "config_drive", "build", "start")
        for when in ("begun", "ran", "done")
    ),
    "create:finishing",
    "create:finished",
    "publisher:before",
    "publisher:published",
]
UNDO = [
    f"create:{step}:{when}" for step in ("start", "build", "config_drive", "claim") for when in ("undoing", "undone")
]
OTHERS = [
    *(f"destroy:{step}:{when}" for step in ("destroy", "remove_drive") for when in ("begun", "ran", "done")),
    *(f"pause:pause:{when}" for when in ("begun", "ran")),
    *(f"unpause:unpause:{when}" for when in ("begun", "ran")),
    *(f"shutdown:{step}:{when}" for step in ("ask", "wait") for when in ("begun", "ran")),
    *(f"reboot:{step}:{when}" for step in ("ask", "wait") for when in ("begun", "ran")),
    "list:finishing",
]


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[AgentProcess]:
    made = AgentProcess(tmp_path)
    yield made
    if made.process is not None:
        made.stop()


def create_args(agent: AgentProcess) -> dict[str, Any]:
    drive = {"user_data": "#cloud-config\n{}\n"}
    return {"name": "web", "uuid": UUID, "memory_mib": 64, "kernel": agent.kernel(), "config_drive": drive}


def drives(agent: AgentProcess) -> list[str]:
    """The config drives that are there."""
    return sorted(path.name for path in (agent.folder / "state" / "config-drives").iterdir())


def crash_and_restart(agent: AgentProcess, boundary: str, verb: str, args: dict[str, Any]) -> Reply:
    """Send, let the agent die at `boundary` (or in the driver), start it again: the reply, asked for twice."""
    with agent.client() as client:
        agent.start(boundary)
        ident = client.send(verb, args)
        agent.wait_killed()
        agent.start()
        reply = client.wait(ident, WAIT)
        # A reply may come twice (killed between publishing and noting it); asking again gives the same one.
        client.send(verb, args, instruction_id=ident)
        assert client.wait(ident, WAIT) == reply
    assert agent.stop() == 0, agent.log
    journal = agent.journal()
    counts = journal.counts()
    journal.close()
    assert (counts["unfinished"], counts["claims"], counts["quarantine"]) == (0, 0, 0), agent.log
    broker = agent.folder / "state" / "broker"
    assert list((broker / "unacked").iterdir()) == []
    return reply


@pytest.mark.parametrize("boundary", CREATE)
def test_create_killed_at(agent: AgentProcess, boundary: str) -> None:
    reply = crash_and_restart(agent, boundary, "create", create_args(agent))
    assert reply.ok, reply.error
    assert drives(agent) == [f"{UUID}.iso"]
    (domain,) = agent.toolstack().list_domains()
    # The first domid the host ever gave: it was built once.
    assert (domain.uuid, domain.state, domain.domid) == (UUID, DomainState.RUNNING, 1)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("call", ["create", "unpause"])
def test_create_killed_inside_the_driver(agent: AgentProcess, call: str, when: str) -> None:
    agent.toolstack().inject_kill(call, when)
    reply = crash_and_restart(agent, "", "create", create_args(agent))
    assert reply.ok, reply.error
    (domain,) = agent.toolstack().list_domains()
    assert (domain.uuid, domain.state, domain.domid) == (UUID, DomainState.RUNNING, 1)


@pytest.mark.parametrize("boundary", UNDO)
def test_create_killed_while_undone(agent: AgentProcess, boundary: str) -> None:
    agent.toolstack().inject_error("unpause", HostFailure("injected: it does not run"))
    reply = crash_and_restart(agent, boundary, "create", create_args(agent))
    assert reply.error is not None
    assert (reply.error["code"], reply.error["undone"]) == ("host.failure", True)
    assert agent.toolstack().list_domains() == [] and drives(agent) == []


@pytest.mark.parametrize("boundary", OTHERS)
def test_other_verbs_killed_at(agent: AgentProcess, boundary: str) -> None:
    agent.start()
    with agent.client() as client:
        created = client.call("create", create_args(agent) | {"on_poweroff": "preserve"}, timeout=WAIT)
        assert created.ok, created.error
    agent.kill()
    verb = boundary.partition(":")[0]
    reply = crash_and_restart(agent, boundary, verb, {} if verb == "list" else {"uuid": UUID})
    assert reply.ok, reply.error
    domains = agent.toolstack().list_domains()
    assert drives(agent) == [f"{domain.uuid}.iso" for domain in domains]
    expected = {
        "destroy": [],
        "pause": [(DomainState.PAUSED, 1)],
        "shutdown": [(DomainState.SHUTDOWN, 1)],
        "reboot": [(DomainState.RUNNING, 2)],
    }.get(verb, [(DomainState.RUNNING, 1)])
    assert [(domain.state, domain.domid) for domain in domains] == expected


def test_killed_again_and_again_at_the_same_place(agent: AgentProcess) -> None:
    """Each life gets a little further: nothing is done twice on the way."""
    with agent.client() as client:
        ident = client.send("create", create_args(agent))
        for boundary in ("create:claim:begun", "create:claim:ran", "create:build:ran", "create:start:begun"):
            agent.start(boundary)
            agent.wait_killed()
        agent.start()
        assert client.wait(ident, WAIT).ok
    assert [domain.domid for domain in agent.toolstack().list_domains()] == [1]


def test_many_instructions_survive_a_kill(agent: AgentProcess) -> None:
    """None lost, none twice, with several under way and several still in the queue."""
    with agent.client() as client:
        kernel = agent.kernel()
        idents = [
            client.send("create", {"name": f"web{n}", "memory_mib": 64, "kernel": kernel, "start": n % 2 == 0})
            for n in range(30)
        ]
        agent.start("create:start:ran")
        agent.wait_killed()
        agent.start()
        replies = [client.wait(ident, WAIT) for ident in idents]
    assert all(reply.ok for reply in replies)
    domains = agent.toolstack().list_domains()
    assert sorted(domain.name for domain in domains) == sorted(f"web{n}" for n in range(30))
    assert max(domain.domid for domain in domains) == 30
    assert agent.stop() == 0


def test_a_running_domain_is_not_touched_by_the_agent_s_death(agent: AgentProcess) -> None:
    agent.start()
    with agent.client() as client:
        assert client.call("create", create_args(agent), timeout=WAIT).ok
        before = agent.toolstack().get_domain(UUID)
        agent.kill()
        assert agent.toolstack().get_domain(UUID).state is DomainState.RUNNING
        agent.start()
        assert client.call("show", {"uuid": UUID}, timeout=WAIT).ok
        after = agent.toolstack().get_domain(UUID)
        assert (after.domid, after.created_at, after.owner) == (before.domid, before.created_at, before.owner)
        # Still ours after the restart: the marker is the node's, not the process's.
        assert client.call("destroy", {"uuid": UUID}, timeout=WAIT).ok


def test_sigterm_ends_it_quickly_and_cleanly(agent: AgentProcess) -> None:
    agent.start()
    with agent.client() as client:
        assert client.call("list", timeout=WAIT).ok
    assert agent.stop() == 0 and "Traceback" not in agent.log


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_killed_at_random_moments(agent: AgentProcess, seed: int) -> None:
    """Several domains, several instructions each, in order; the agent dies whenever it likes."""
    chance = random.Random(seed)
    args = create_args(agent)
    uuids = [UUID[:-1] + str(n) for n in range(8)]
    with agent.client() as client:
        idents = []
        for verb in ("create", "pause", "unpause", "destroy", "create"):
            for n, uuid in enumerate(uuids):
                given = {"uuid": uuid} if verb != "create" else args | {"uuid": uuid, "name": f"web{n}"}
                idents.append(client.send(verb, given))
        for _ in range(4):
            agent.start()
            with contextlib.suppress(ReplyTimeout):
                client.wait("nothing", 0.45 + chance.random() * 0.5)
            agent.kill()
        agent.start()
        replies = [client.wait(ident, WAIT) for ident in idents]
        assert client.call("list", timeout=WAIT).ok  # the last agent has started, too
    assert [reply.error for reply in replies if not reply.ok] == []
    domains = agent.toolstack().list_domains()
    assert sorted(domain.uuid for domain in domains) == uuids
    assert {domain.state for domain in domains} == {DomainState.RUNNING}
    # Each domain was built exactly twice.
    assert max(domain.domid for domain in domains) == 16
    assert agent.stop() == 0
