"""An agent that asks another one: over a folder broker, with real agents in this process."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from agent import conf, wire
from agent.context import Interrupted
from agent.errors import BrokerError, InstructionError, ReplyTimeout
from agent.rpc import peers as module
from agent.rpc.client import Client
from agent.rpc.peers import BrokerPeers
from agent.service import Service

IDENT = str(uuid.UUID(int=3))


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"filesystem://{tmp_path}/broker"


@pytest.fixture
def service(tmp_path: Path, url: str) -> Iterator[Callable[[], Service]]:
    started: list[Service] = []

    def start(name: str = "node2") -> Service:
        config = tmp_path / f"{name}.conf"
        config.write_text(
            f"[agent]\nhost = {name}\nstate_dir = {tmp_path / name}\nworkers = 1\n[broker]\nurl = {url}\n"
            f"[driver]\nname = fake\nsettings = state_dir:{tmp_path / name / 'host'}\n"
        )
        made = Service(conf.load([str(config)]))
        made.start()
        started.append(made)
        return made

    yield start  # type: ignore[misc]
    for made in started:
        made.close()


@pytest.fixture
def stopping() -> threading.Event:
    return threading.Event()


@pytest.fixture
def outbox() -> list[wire.Outgoing]:
    return []


@pytest.fixture
def peers(url: str, stopping: threading.Event, outbox: list[wire.Outgoing]) -> BrokerPeers:
    return BrokerPeers(url, stopping, outbox.append, ask_again_seconds=0.3)


def test_what_is_told_waits_in_the_outbox(peers: BrokerPeers, outbox: list[wire.Outgoing]) -> None:
    for _ in range(2):
        peers.tell("node2", "list", {"own": True}, ident=IDENT)
    (message,) = outbox
    assert (message.exchange, message.routing_key, message.correlation_id) == ("", "reeve.node2", IDENT)
    found = wire.decode(wire.Raw(message.body, len(message.body)), "node2")
    assert (found.id, found.verb, found.args, found.reply_to) == (IDENT, "list", {"own": True}, "")


def call(peers: BrokerPeers, verb: str = "list", ident: str = IDENT, **fields: Any) -> Any:
    given = {"timeout": 20.0, "expire": False, **fields}
    return peers.call("node2", verb, given.pop("args", {}), ident=ident, **given)


def test_a_result_comes_back(peers: BrokerPeers, service: Any) -> None:
    service()
    assert call(peers) == {"domains": []}


def test_a_refusal_is_raised_with_its_code(peers: BrokerPeers, service: Any) -> None:
    service()
    with pytest.raises(InstructionError) as caught:
        call(peers, "show", args={"uuid": IDENT})
    assert (caught.value.code, caught.value.retryable) == ("domain.not_found", False)
    assert caught.value.message.startswith("host node2: ")


def test_the_same_ident_is_answered_from_the_journal(peers: BrokerPeers, service: Any, tmp_path: Path) -> None:
    agent = service()
    kernel = tmp_path / "kernel"
    kernel.write_bytes(b"\x7fELF" + bytes(600))
    args = {"name": "web", "memory_mib": 8, "kernel": str(kernel)}
    first = call(peers, "create", args=args)
    assert call(peers, "create", args=args) == first
    assert len(agent.toolstack.list_domains()) == 1


def test_nobody_answers(peers: BrokerPeers) -> None:
    with pytest.raises(ReplyTimeout, match="node2"):
        call(peers, timeout=0.2)


def test_what_expires_is_not_done_later(peers: BrokerPeers, service: Any) -> None:
    with pytest.raises(ReplyTimeout):
        call(peers, timeout=0.1, expire=True)
    service()
    with pytest.raises(InstructionError) as caught:
        call(peers)
    assert caught.value.code == "instruction.expired" and caught.value.retryable


def test_what_does_not_expire_waits_for_its_agent(peers: BrokerPeers, service: Any) -> None:
    with pytest.raises(ReplyTimeout):
        call(peers, timeout=0.1)
    service()
    assert call(peers) == {"domains": []}


def test_a_stop_ends_the_wait(peers: BrokerPeers, stopping: threading.Event) -> None:
    threading.Timer(0.2, stopping.set).start()
    began = time.monotonic()
    with pytest.raises(Interrupted):
        call(peers, timeout=60.0)
    with pytest.raises(Interrupted):
        gather(peers, 2)
    assert time.monotonic() - began < 10


def test_a_broker_that_is_not_there(stopping: threading.Event, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for url in ("amqp://guest:guest@127.0.0.1:1/", f"filesystem://{tmp_path}/file/broker"):
        with pytest.raises(BrokerError):
            call(BrokerPeers(url, stopping, [].append))


def gather(peers: BrokerPeers, count: int, at_once: int = 2, more: Callable[[], bool] = lambda: True) -> dict[str, Any]:
    found: dict[str, Any] = {}
    calls = [(str(uuid.UUID(int=100 + n)), {"own": n % 2 == 0}) for n in range(count)]
    peers.call_all(
        "node2", "list", calls, at_once=at_once, done=lambda i, outcome: found.update({i: outcome}), more=more
    )
    return found


def test_many_at_once(peers: BrokerPeers, service: Any) -> None:
    service()
    found = gather(peers, 7)
    assert len(found) == 7 and all(outcome == {"domains": []} for outcome in found.values())
    assert gather(peers, 0) == {}


class OneByOne:
    """A client whose host answers the oldest instruction each time it is asked."""

    def __init__(self) -> None:
        self.open: list[str] = []
        self.most = 0

    def __call__(self, *args: Any, **kwargs: Any) -> OneByOne:
        return self

    def send(self, verb: str, args: Any, *, instruction_id: str) -> None:
        self.open.append(instruction_id)
        self.most = max(self.most, len(self.open))

    def wait_any(self, idents: Any, timeout: float) -> wire.Reply:
        assert self.open[0] in idents
        return wire.Reply(self.open.pop(0), "node2", result={})

    def close(self) -> None: ...


@pytest.mark.parametrize("at_once", [1, 2, 5])
def test_no_more_than_allowed_are_under_way(peers: BrokerPeers, monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    client = OneByOne()
    monkeypatch.setattr(module, "Client", client)
    assert len(gather(peers, 9, at_once=at_once)) == 9
    assert client.most == at_once and not client.open


def test_no_more_are_sent_when_it_is_told_so(peers: BrokerPeers, service: Any) -> None:
    service()
    left = [True, True, True]
    assert len(gather(peers, 7, at_once=1, more=lambda: bool(left and left.pop()))) == 3


def test_failures_are_told_as_well(peers: BrokerPeers, service: Any) -> None:
    service()
    found: list[Any] = []
    peers.call_all(
        "node2", "show", [(IDENT, {"uuid": IDENT})], at_once=1, done=lambda i, out: found.append(out), more=lambda: True
    )
    assert isinstance(found[0], InstructionError) and found[0].code == "domain.not_found"


def test_an_agent_that_comes_late_and_a_lost_reply(peers: BrokerPeers, service: Any, url: str) -> None:
    """What is not answered is asked again, with the same ids."""
    found: dict[str, Any] = {}
    thread = threading.Thread(target=lambda: found.update(gather(peers, 3)))
    thread.start()
    thread.join(0.8)
    agent = service()
    thread.join(20)
    assert len(found) == 3
    assert agent.journal.counts()["unfinished"] == 0


def test_a_broker_that_goes_and_comes_back(peers: BrokerPeers, service: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    service()
    broken = [True, True]
    real = module.Client

    def client(*args: Any, **kwargs: Any) -> Client:
        if broken:
            broken.pop()
            raise BrokerError("it is away")
        return real(*args, **kwargs)

    monkeypatch.setattr(module, "Client", client)
    monkeypatch.setattr(module, "FIRST_PAUSE", 0.01)
    assert len(gather(peers, 3)) == 3


def test_agents_that_ask_each_other_do_not_block_each_other(service: Any, tmp_path: Path, url: str) -> None:
    """One worker each, and both wait for the other: what they ask has workers of its own."""
    one, two = service("node1"), service("node2")
    kernel = tmp_path / "kernel"
    kernel.write_bytes(b"\x7fELF" + bytes(600))
    clients = {agent.settings.host: Client(url, agent.settings.host) for agent in (one, two)}
    made = {}
    for name, client in clients.items():
        # Others before it, so that the domids of the two differ.
        for n in range(1 if name == "node1" else 3):
            args = {"name": f"{name}-{n}", "memory_mib": 8, "kernel": str(kernel)}
            reply = client.call("create", args, timeout=30)
            assert reply.ok and reply.result
        made[name] = reply.result["domain"]["uuid"]
    idents = {
        name: client.send("migrate", {"uuid": made[name], "target": "node2" if name == "node1" else "node1"})
        for name, client in clients.items()
    }
    for name, client in clients.items():
        reply = client.wait(idents[name], 30)
        assert reply.ok, reply.error
        client.close()
