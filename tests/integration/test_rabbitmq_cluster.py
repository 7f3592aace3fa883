"""The agent on a RabbitMQ cluster of three nodes, of which one dies: the one that everything went through."""

from __future__ import annotations

import os
import re
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from agent_process import HOST, AgentProcess
from rabbitmq import Rabbit, RabbitMissing, private_cluster

from agent import wire
from agent.rpc import connection as broker
from agent.rpc.client import Client

WAIT = 90.0
COUNT = 45
OPTIONS = ("--broker-queues", "quorum", "--oslo-noenabled")


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[list[Rabbit]]:
    folder = tmp_path / "rabbit"
    folder.mkdir()
    context = private_cluster(folder)
    try:
        made = context.__enter__()
    except RabbitMissing as exc:
        if os.environ.get("CI") == "true":
            raise
        pytest.skip(str(exc))
    try:
        yield made
    finally:
        context.__exit__(None, None, None)


@pytest.fixture
def agent(tmp_path: Path, nodes: list[Rabbit]) -> Iterator[AgentProcess]:
    made = AgentProcess(tmp_path, url_of(nodes))
    yield made
    if made.process is not None:
        made.stop()


def url_of(nodes: list[Rabbit]) -> str:
    return f"amqp://guest:guest@{','.join(f'127.0.0.1:{node.port}' for node in nodes)}/"


def until(condition: Callable[[], Any], seconds: float = WAIT) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"did not happen within {seconds} s"
        threading.Event().wait(0.1)


def in_use(agent: AgentProcess, nodes: list[Rabbit]) -> Rabbit | None:
    """The node from which the agent takes instructions by its log; on a busy machine it need not be the first."""
    found = re.findall(rf"taking instructions from {wire.queue_name(HOST)} of amqp://[^@]*@127.0.0.1:(\d+)/", agent.log)
    return next((node for node in nodes if found and node.port == int(found[-1])), None)


def queue_type(node: Rabbit, host: str) -> str:
    """By what the broker refuses."""
    with broker.connect(node.url) as connection:
        try:
            broker.instruction_queue(host, quorum=True)(connection.channel()).queue_declare()
        except connection.channel_errors as exc:
            return str(exc)
    return "quorum"


@pytest.mark.timeout(400)
def test_the_node_in_use_dies(nodes: list[Rabbit], agent: AgentProcess) -> None:
    """Connections, leaders of all queues and unconfirmed messages go with it: nothing is lost, nothing done twice."""
    agent.start("", *OPTIONS)
    kernel = agent.kernel()
    until(lambda: in_use(agent, nodes))
    victim = in_use(agent, nodes)
    assert victim is not None
    others = [node for node in nodes if node is not victim]
    assert queue_type(others[0], HOST) == "quorum"
    with Client(url_of([victim, *others]), HOST, quorum=True) as client:
        sent = {}
        for number in range(COUNT):
            if number == COUNT // 3:
                victim.kill()
            name = f"web{number}"
            sent[client.send("create", {"name": name, "memory_mib": 16, "kernel": kernel})] = name
        for ident, name in sent.items():
            reply = client.wait(ident, WAIT)
            assert reply.ok and reply.result is not None, reply.error
            assert reply.result["domain"]["name"] == name
        assert in_use(agent, nodes) in others
        listed = client.call("list", {}, timeout=WAIT)
        assert listed.ok and listed.result is not None
        assert sorted(domain["name"] for domain in listed.result["domains"]) == sorted(sent.values())
    assert agent.stop() == 0
    assert sorted(domain.name for domain in agent.toolstack().list_domains()) == sorted(sent.values())
    with sqlite3.connect(agent.folder / "state" / "agent" / "journal.sqlite") as db:
        assert db.execute("SELECT count(*) FROM instructions WHERE verb = 'create'").fetchone() == (COUNT,)
        assert db.execute("SELECT count(*) FROM instructions WHERE finished IS NULL").fetchone() == (0,)
        assert db.execute("SELECT count(*) FROM outbox WHERE routing_key LIKE 'reeve.reply.%'").fetchone() == (0,)
