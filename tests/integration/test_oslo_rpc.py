"""The real oslo.messaging RPC client, two releases of it, unmodified, over a real RabbitMQ."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import kombu
import oslo_venvs
import pytest
from agent_process import HOST, AgentProcess
from oslo_venvs import NEW, OLD, OsloClient
from rabbitmq import Rabbit

from agent.rpc import connection as broker
from hypervisor.toolstack.api import DomainState

pytestmark = pytest.mark.timeout(300)  # the first test waits for pip

WAIT = 30.0
DISPATCHER = "oslo_messaging.rpc.dispatcher"
EXMODS = ("reeve_errors", DISPATCHER)


def until(condition: Callable[[], Any], seconds: float = WAIT) -> Any:
    end = time.monotonic() + seconds
    while not (got := condition()):
        assert time.monotonic() < end, f"did not happen within {seconds} s"
        threading.Event().wait(0.05)
    return got


@pytest.fixture(scope="session")
def pythons(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    try:
        return oslo_venvs.make(tmp_path_factory.mktemp("oslo"))
    except oslo_venvs.OsloMissing as exc:
        if os.environ.get("CI") == "true":
            raise
        pytest.skip(f"oslo.messaging cannot be installed here: {exc}")


@dataclasses.dataclass
class Stack:
    """An agent for one topic and clients that fit it."""

    agent: AgentProcess
    rabbit: Rabbit
    python: str
    mode: str
    rabbit_options: dict[str, Any]
    clients: list[OsloClient] = dataclasses.field(default_factory=list)

    @property
    def topic(self) -> str:
        return f"topic-{self.mode}-{self.agent.folder.name}"

    @property
    def exchange(self) -> str:
        return f"exchange-{self.mode}-{self.agent.folder.name}"

    def start(self, kill_at: str = "", *options: str) -> None:
        heard = self.agent.log.count(f"from {self.topic}")
        chosen = ("--oslo-queues", self.mode, "--oslo-topic", self.topic, "--oslo-exchange", self.exchange)
        if self.rabbit_options.get("rabbit_transient_quorum_queue"):
            chosen = (*chosen, "--oslo-transient-quorum")
        self.agent.start(kill_at, *chosen, *options)
        until(lambda: self.agent.log.count(f"from {self.topic}") > heard)

    def client(self, exmods: tuple[str, ...] = EXMODS, **options: Any) -> OsloClient:
        target = {"topic": self.topic, "server": HOST, "version": "1.0"}
        made = OsloClient.start(
            self.python, self.agent.folder / f"client{len(self.clients)}", self.agent.url, target,
            exchange=self.exchange, rabbit=self.rabbit_options, exmods=exmods, **options,
        )  # fmt: skip
        self.clients.append(made)
        return made

    def create(self, **fields: Any) -> dict[str, Any]:
        return {"name": "web", "memory_mib": 64, "kernel": self.agent.kernel(), **fields}

    def close(self) -> None:
        for client in self.clients:
            client.close()
        if self.agent.process is not None:
            self.agent.stop()


QUORUM = {"rabbit_quorum_queue": True, "rabbit_transient_quorum_queue": True, "kombu_compression": "gzip"}
KINDS = {
    "old-defaults": (OLD, "oslo-defaults", {}),
    "new-durable": (NEW, "durable", {"amqp_durable_queues": True}),
    "new-quorum": (NEW, "quorum", QUORUM),
}


@pytest.fixture(scope="module")
def stacks(
    tmp_path_factory: pytest.TempPathFactory, rabbit: Rabbit, pythons: dict[str, str]
) -> Iterator[Callable[[str], Stack]]:
    """Stacks by kind; each is made once."""
    made: dict[str, Stack] = {}

    def stack(kind: str) -> Stack:
        if kind not in made:
            release, mode, options = KINDS[kind]
            agent = AgentProcess(tmp_path_factory.mktemp(kind), rabbit.url)
            made[kind] = Stack(agent, rabbit, pythons[release], mode, options)
            made[kind].start()
            made[kind].client()
        return made[kind]

    yield stack
    for item in made.values():
        item.close()


@pytest.fixture(params=KINDS)
def stack(request: pytest.FixtureRequest, stacks: Callable[[str], Stack]) -> Iterator[Stack]:
    """A running agent and a client that fits it; the test's domains are destroyed."""
    yield from emptied(stacks(request.param))


@pytest.fixture
def durable(stacks: Callable[[str], Stack]) -> Iterator[Stack]:
    """The same, of the default kind."""
    yield from emptied(stacks("new-durable"))


def emptied(stack: Stack) -> Iterator[Stack]:
    if not stack.agent.running:
        stack.start()
    yield stack
    if not stack.agent.running:
        stack.start()
    for domain in stack.clients[0].call("list")["domains"]:
        stack.clients[0].call("destroy", {"uuid": domain["uuid"]})


def names(client: OsloClient) -> set[str]:
    return {domain["name"] for domain in client.call("list")["domains"]}


def test_the_life_of_a_domain(stack: Stack) -> None:
    (client,) = stack.clients
    made = client.call("create", stack.create(max_memory_mib=128))["domain"]
    assert made["state"] == "running" and uuid.UUID(made["uuid"])
    resized = client.call("resize", {"uuid": made["uuid"], "memory_mib": 96})
    assert (resized["mode"], resized["domain"]["memory_mib"]) == ("live", 96)
    assert client.call("show", {"uuid": made["uuid"]})["domain"]["memory_mib"] == 96
    gone = client.call("destroy", {"uuid": made["uuid"]})["domain"]
    assert gone["state"] == "gone" and names(client) == set()


def test_casts_to_this_server_to_any_and_to_all(stack: Stack) -> None:
    (client,) = stack.clients
    client.cast("create", stack.create(name="one"))
    client.cast("create", stack.create(name="two"), server=None)
    client.cast("create", stack.create(name="three"), server=None, fanout=True)
    until(lambda: names(client) == {"one", "two", "three"})
    assert client.call("list", server=None)["domains"], "a call to any server of the topic"
    for domain in client.call("list")["domains"]:
        client.cast("destroy", {"uuid": domain["uuid"]})
    until(lambda: not names(client))


def test_failures_are_rebuilt(stack: Stack) -> None:
    (client,) = stack.clients
    missing = str(uuid.uuid4())
    raised = client.raised("show", {"uuid": missing})
    assert raised["kinds"][1:4] == ["DomainNotFound", "DomainError", "ReeveError"]
    assert (raised["code"], raised["retryable"], raised["undone"], raised["host"]) == (
        "domain.not_found", False, True, HOST,
    )  # fmt: skip
    assert missing in raised["text"]
    for args in ({}, {"uuid": "x"}, {"uuid": missing, "colour": 1}):
        raised = client.raised("show", args)
        assert raised["kinds"][1] == "InstructionBadArgs", raised
    raised = client.raised("create", stack.create(memory_mib=1 << 23))
    assert (raised["kinds"][1], raised["undone"]) == ("HostInsufficientMemory", True)


def test_methods_versions_and_namespaces(stack: Stack) -> None:
    (client,) = stack.clients
    for method in ("frobnicate", "_private", "__init__", "Create"):
        raised = client.raised(method)
        assert raised["kinds"][1] == "NoSuchMethod" and raised["method"] == method
    for prepare in ({"version": "2.0"}, {"version": "1.9"}, {"namespace": "other"}):
        raised = client.raised("list", **prepare)
        assert raised["kinds"][1] == "UnsupportedVersion" and raised["method"] == "list"
    assert client.raised("list", version="1.1", version_cap="1.0")["kinds"][0] == "RPCVersionCapError"
    assert client.call("list", namespace="reeve") == client.call("list", version=None)
    assert client.call("oslo_rpc_server_ping") == "pong"


def test_a_long_call_is_heard_of(stack: Stack) -> None:
    """Its caller would give up after two seconds without a sign of life."""
    (client,) = stack.clients
    domain = client.call("create", stack.create(name="deaf", cmdline="fake.shutdown=ignore"))["domain"]
    args = {"uuid": domain["uuid"], "wait_seconds": 3}
    raised = client.raised("shutdown", args, call_monitor_timeout=2, timeout=60)
    assert raised["kinds"][1] == "DomainTimeout", raised


def test_the_context_is_kept_and_its_secrets_are_not(stack: Stack) -> None:
    request = f"req-{uuid.uuid4()}"
    context = {"request_id": request, "user": "u1", "auth_token": "s3cret", "nested": {"password": "s3cret"}}
    stack.clients[0].call("list", context=context)
    line = next(line for line in stack.agent.log.splitlines() if "list begins" in line and request in line)
    assert f" {request}]" in line and '"user": "u1"' in line and '"auth_token": "***"' in line
    journal = stack.agent.folder / "state" / "agent"
    kept = b"".join(path.read_bytes() for path in journal.glob("journal.sqlite*"))
    assert request.encode() in kept and b"s3cret" not in kept and "s3cret" not in stack.agent.log


def test_a_call_nobody_takes_in_time_is_not_carried_out(stack: Stack) -> None:
    (client,) = stack.clients
    stack.agent.kill()
    assert client.raised("create", stack.create(name="late"), timeout=1)["kinds"][0] == "MessagingTimeout"
    client.begin("create", stack.create(name="patient"), timeout=60)
    stack.start()
    assert client.receive()["result"]["domain"]["name"] == "patient"
    assert names(client) == {"patient"}


@pytest.mark.parametrize("boundary", ["consumer:journalled", "create:build:ran", "create:finished", "publisher:before"])
def test_killed_in_the_middle_of_a_call(durable: Stack, boundary: str) -> None:
    (client,) = durable.clients
    assert durable.agent.stop() == 0
    durable.start(boundary)
    client.begin("create", durable.create(), call_monitor_timeout=20, timeout=60)
    durable.agent.wait_killed()
    durable.start()
    domain = client.receive()["result"]["domain"]
    assert [item["uuid"] for item in client.call("list")["domains"]] == [domain["uuid"]]
    assert durable.agent.stop() == 0
    (left,) = durable.agent.toolstack().list_domains()
    assert (left.uuid, left.state) == (domain["uuid"], DomainState.RUNNING)
    journal = durable.agent.journal()
    assert (journal.counts()["unfinished"], journal.counts()["outbox"], journal.listeners()) == (0, 0, [])
    journal.close()


def test_a_message_delivered_twice_is_carried_out_once(stack: Stack) -> None:
    """A client that repeats its message after a lost connection sends the same `_unique_id`."""
    queue_name, replies = f"reply_{uuid.uuid4().hex}", []
    request = {
        "method": "create", "args": stack.create(), "version": "1.0", "_msg_id": uuid.uuid4().hex,
        "_reply_q": queue_name, "_timeout": None, "_unique_id": uuid.uuid4().hex,
    }  # fmt: skip
    message = {"oslo.version": "2.0", "oslo.message": json.dumps(request)}

    def take(body: Any, received: Any) -> None:
        received.ack()
        replies.append(json.loads(body["oslo.message"]))

    with broker.connect(stack.rabbit.url, heartbeat=0) as connection:
        channel = connection.channel()
        queue = kombu.Queue(queue_name, durable=True, expires=60)(channel)
        queue.declare()
        producer = kombu.Producer(channel, serializer="json")
        with kombu.Consumer(channel, [queue], callbacks=[take]):
            for expected in (1, 2):
                producer.publish(message, exchange=stack.exchange, routing_key=f"{stack.topic}.{HOST}", expiration=60)
                until(lambda expected=expected: drain(connection) or len(replies) == expected)
        queue.delete()
    assert replies[0] == replies[1], "the same answer, and to be known as the same by its _unique_id"
    assert replies[0]["failure"] is None and replies[0]["ending"] is True
    listed = stack.clients[0].call("list")["domains"]
    assert [domain["uuid"] for domain in listed] == [replies[0]["result"]["domain"]["uuid"]]


def drain(connection: kombu.Connection) -> None:
    with contextlib.suppress(TimeoutError):
        connection.drain_events(timeout=0.1)


def test_what_is_sent_to_all_while_an_agent_restarts_is_not_lost(durable: Stack) -> None:
    (client,) = durable.clients
    durable.agent.kill()
    client.cast("create", durable.create(), server=None, fanout=True)
    client.cast("create", durable.create(name="two"))
    durable.start()
    until(lambda: names(client) == {"web", "two"})


def test_a_stock_listener_hears_of_everything_although_the_agent_is_killed(durable: Stack) -> None:
    (client,) = durable.clients
    topic, parent = f"notes-{durable.agent.folder.name}", "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
    options = ("--notifications-oslo", "--notifications-topics", topic)
    assert durable.agent.stop() == 0
    durable.start("create:finished", *options)
    client.begin("create", durable.create(), timeout=60, context={"request_id": "req-7", "traceparent": parent})
    durable.agent.wait_killed()
    durable.start("", *options)
    uuid_ = client.receive()["result"]["domain"]["uuid"]
    assert client.raised("destroy", {"uuid": str(uuid.uuid4())})["code"] == "domain.not_found"
    # The listener comes last: what was sent before waits for it.
    listener = OsloClient.start(
        durable.python, durable.agent.folder / "listener", durable.agent.url, {"listen": [topic]},
        exchange=durable.exchange, rabbit=durable.rabbit_options,
    )  # fmt: skip
    heard: list[dict[str, Any]] = []
    wanted = {"domain.create.start", "domain.create.end", "domain.unpaused", "domain.destroy.error"}
    while not wanted <= {item["event"] for item in heard}:
        heard.append(listener.receive(30))
    listener.close()
    assert durable.agent.stop() == 0
    durable.start()
    by_event = {item["event"]: item for item in heard}
    end = by_event["domain.create.end"]
    assert end["payload"]["uuid"] == end["payload"]["result"]["domain"]["uuid"] == uuid_
    assert (end["context"]["request_id"], end["context"]["traceparent"]) == ("req-7", parent)
    assert (end["publisher"], end["priority"]) == (f"reeve-agent.{HOST}", "info")
    assert uuid.UUID(end["metadata"]["message_id"]) and end["metadata"]["timestamp"]
    assert by_event["domain.destroy.error"]["priority"] == "error"
    events = [item["event"] for item in heard]
    assert events.index("domain.create.start") < events.index("domain.create.end")


def test_clients_without_our_module_and_with_other_flags(
    tmp_path: Path, rabbit: Rabbit, pythons: dict[str, str]
) -> None:
    """A client of the defaults made the exchange before the agent, which is set to durable queues."""
    stack = Stack(AgentProcess(tmp_path, rabbit.url), rabbit, pythons[NEW], "durable", {})
    try:
        client = stack.client(exmods=())
        assert client.raised("list", timeout=1)["kinds"][0] == "MessagingTimeout"
        stack.start()
        assert client.call("list") == {"domains": []}
        assert "is used as it is" in stack.agent.log
        raised = client.raised("show", {"uuid": str(uuid.uuid4())})
        assert (raised["kinds"][0], raised["exc_type"]) == ("RemoteError", "DomainNotFound")
        assert "no domain" in raised["value"]
        assert client.raised("frobnicate")["exc_type"] == "NoSuchMethod"
        assert client.raised("list", version="9.0")["exc_type"] == "UnsupportedVersion"
    finally:
        stack.close()
