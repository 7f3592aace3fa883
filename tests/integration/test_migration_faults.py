"""Two agents with a broker between them and a domain that goes to and fro, while things die: SIGKILL, cut links.

At no moment does it run twice. In the end it runs once, or is paused and somebody names the command that decides; and
no journal row, claim or record is left. ``REEVE_MIGRATION_RUNS`` says how many runs with chosen faults (30).
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import random
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from agent_process import AgentProcess
from rabbitmq import Rabbit

from agent.errors import ReplyTimeout
from agent.wire import Reply
from hypervisor.toolstack.api import MigrationPhase
from hypervisor.toolstack.drivers.fake import FakeToolstack

pytestmark = pytest.mark.timeout(1800)
RUNS = int(os.environ.get("REEVE_MIGRATION_RUNS", "30"))
UUID = "11111111-2222-3333-4444-555555555555"
WAIT = 90.0
NAMES = ("node1", "node2")
SETTINGS = ("--agent-unknown-seconds", "20", "--agent-drain-seconds", "0")

SOURCE = [
    "consumer:journalled",
    "migrate:planned",
    *(
        f"migrate:{step}:{when}"
        for step in ("check", "prepare", "transfer", "settle", "finish")
        for when in ("begun", "ran", "done")
    ),
    "migrate:finishing",
    "publisher:before",
]
UNDO = [f"migrate:{step}:{when}" for step in ("transfer", "prepare") for when in ("undoing", "undone")]
TARGET = [
    "consumer:taken",
    "consumer:acked",
    *(f"migrate_in:{step}:{when}" for step in ("claim", "admit") for when in ("begun", "ran")),
    "migrate_in:finished",
    *(f"migrate_settle:settle:{when}" for when in ("begun", "ran")),
    *(f"migrate_finish:forget:{when}" for when in ("begun", "ran")),
    "publisher:published",
]
CALLS = {
    0: ("migration_offer", "migration_start", "migration_status", "migration_forget"),
    1: ("migration_prepare", "migration_resolve", "migration_status", "migration_forget"),
}


class Watcher:
    """Looks all the time whether the domain runs twice."""

    def __init__(self, folders: list[Path]) -> None:
        self._hosts = [FakeToolstack(str(folder)) for folder in folders]
        self._stop = threading.Event()
        self.target = 1
        self.twice: list[str] = []
        self.looks = 0
        self._thread = threading.Thread(target=self._watch, name="watcher", daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._stop.wait(0.02):
            # The target first: what ran there before has left the source by now.
            target = self.target
            there = self._running(target)
            here = self._running(1 - target)
            self.looks += 1
            if there and here and target == self.target:
                self.twice.append(f"{NAMES[target]} {there}, {NAMES[1 - target]} {here}")

    def _running(self, index: int) -> str:
        found = self._hosts[index].store.find(UUID)
        return found.state.value if found is not None and found.state == "running" else ""

    def close(self) -> None:
        self._stop.set()
        self._thread.join(10)
        for host in self._hosts:
            host.close()


@dataclasses.dataclass
class Site:
    """:ivar at: index of the agent whose host has the domain.

    :ivar armed: those that are to die at a boundary, which they may not reach.
    """

    agents: list[AgentProcess]
    hosts: list[FakeToolstack]
    watcher: Watcher
    at: int = 0
    armed: set[int] = dataclasses.field(default_factory=set)

    @property
    def source(self) -> int:
        return self.at

    @property
    def target(self) -> int:
        return 1 - self.at

    def start(self, index: int, kill_at: str = "") -> None:
        agent = self.agents[index]
        if agent.process is not None and agent.process.poll() is None:
            if not kill_at and index not in self.armed:
                return
            agent.kill()
        self.armed = self.armed | {index} if kill_at else self.armed - {index}
        agent.start(kill_at, *SETTINGS)

    def call(self, index: int, verb: str, args: dict[str, Any]) -> dict[str, Any]:
        with self.agents[index].client() as client:
            reply = client.call(verb, args, timeout=WAIT)
        assert reply.ok and reply.result is not None, (reply.error, self.logs())
        return reply.result

    def states(self) -> tuple[str, str]:
        """At the source and at the target; "" where there is none."""
        found = []
        for index in (self.source, self.target):
            domain = self.hosts[index].store.find(UUID)
            found.append(domain.state.value if domain is not None else "")
        return found[0], found[1]

    def settle(self, reply: Reply) -> None:
        """All that is left to be done by itself is waited for; then what the state must be is looked at."""
        for index in (0, 1):
            self.start(index)
        ident = reply.id
        end = time.monotonic() + WAIT
        while not self._quiet() or (reply.error is not None and self._on_its_way(ident)):
            assert time.monotonic() < end, (self.states(), self._records(), self.logs())
            time.sleep(0.05)
        states = self.states()
        if "running" not in states:
            assert "paused" in states, (states, reply.error, self.logs())
            assert reply.error is not None and reply.error["code"] == "migration.unresolved", reply.error
            index = self.source if states[0] else self.target
            (told,) = self.call(index, "migrations", {})["migrations"]
            assert f"reeve migration resolve {ident} --keep" in told["resolve"]
            assert "reeve migration resolve" in self.hosts[index].get_domain(UUID).detail
            self.call(index, "resolve_migration", {"ident": ident, "keep": True})
        for index, halves in enumerate(self._records()):
            for phase in halves:
                assert phase.ended, (phase, self.states(), self.logs())
                keep = phase in (MigrationPhase.KEPT, MigrationPhase.RUNNING)
                self.call(index, "resolve_migration", {"ident": ident, "keep": keep, "force": True})
        states = self.states()
        assert sorted(states) == ["", "running"], (states, reply.error, self.logs())
        assert not reply.ok or states == ("", "running"), "it said that it has moved"
        assert not self.watcher.twice
        if states[1]:
            self.at = self.target
            self.watcher.target = self.target

    def _quiet(self) -> bool:
        """No instruction is open on either side."""
        open_rows = 0
        for agent in self.agents:
            journal = agent.journal()
            counts = journal.counts()
            journal.close()
            open_rows += counts["unfinished"] + counts["claims"]
        broker = Path(self.agents[0].url.removeprefix("filesystem://")) / "data"
        waiting = [path for path in broker.glob("*.reeve.node?.msg")] if broker.is_dir() else []
        return not open_rows and not waiting

    def _on_its_way(self, ident: str) -> bool:
        """The host processes are still at it, or a half waits for a message."""
        halves = self._records()
        ends = [phase for half in halves for phase in half]
        return any(not phase.ended and phase not in _DECISION for phase in ends)

    def _records(self) -> list[list[MigrationPhase]]:
        return [[status.phase for status in host.migration_list()] for host in self.hosts]

    def logs(self) -> str:
        return "\n".join(f"--- {agent.host}\n{agent.log[-4000:]}" for agent in self.agents)


_DECISION = (MigrationPhase.UNRESOLVED, MigrationPhase.COMPLETE)


@contextlib.contextmanager
def make_site(folder: Path, url: str) -> Iterator[Site]:
    agents, hosts, folders = [], [], []
    for index, name in enumerate(NAMES):
        home = folder / name
        home.mkdir()
        folders.append(home / "host")
        hosts.append(FakeToolstack(str(home / "host"), first_domid=1 + 1000 * index))
        agents.append(AgentProcess(home, broker_url=url, host=name))
    site = Site(agents, hosts, Watcher(folders))
    try:
        for index in (0, 1):
            site.start(index)
        args = {"name": "web", "uuid": UUID, "memory_mib": 64, "kernel": agents[0].kernel()}
        site.call(0, "create", args)
        yield site
    finally:
        for agent in agents:
            if agent.process is not None:
                agent.stop()
        site.watcher.close()
        for host in hosts:
            host.close()


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    with make_site(tmp_path, f"filesystem://{tmp_path}/broker") as made:
        yield made


def migrate(
    site: Site, *, kills: dict[int, str] | None = None, random_kills: Sequence[tuple[int, float]] = ()
) -> Reply:
    """One migration. `kills`: where an agent dies; `random_kills`: which and after how many seconds."""
    for index in (0, 1):
        site.start(index, (kills or {}).get(index, ""))
    with site.agents[site.source].client() as client:
        ident = client.send("migrate", {"uuid": UUID, "target": NAMES[site.target]})
        for index, after in random_kills:
            with contextlib.suppress(ReplyTimeout):
                client.wait("nothing", after)
            site.agents[index].kill()
            site.start(index)
        end = time.monotonic() + WAIT
        while time.monotonic() < end:
            reply = client.wait_any({ident}, 0.1)
            if reply is not None:
                return reply
            for index in (0, 1):
                process = site.agents[index].process
                assert process is not None
                if process.poll() is not None:
                    site.start(index)
                    client.send("migrate", {"uuid": UUID, "target": NAMES[site.target]}, instruction_id=ident)
    raise AssertionError(f"no reply\n{site.logs()}")


def test_the_source_s_agent_is_killed_at_every_boundary(site: Site) -> None:
    for boundary in SOURCE:
        reply = migrate(site, kills={site.source: boundary})
        assert reply.ok, (boundary, reply.error, site.logs())
        site.settle(reply)
    assert site.watcher.looks > 50


def test_the_source_s_agent_is_killed_while_it_takes_back(site: Site) -> None:
    for boundary in UNDO:
        site.hosts[site.source].inject_link("complete")
        reply = migrate(site, kills={site.source: boundary})
        assert reply.error is not None and reply.error["code"] == "migration.failed", (boundary, reply.error)
        assert reply.error["undone"], reply.error
        site.settle(reply)


def test_the_target_s_agent_is_killed_at_every_boundary(site: Site) -> None:
    for boundary in TARGET:
        reply = migrate(site, kills={site.target: boundary})
        assert reply.ok, (boundary, reply.error, site.logs())
        site.settle(reply)


@pytest.mark.parametrize("side", [0, 1])
def test_an_agent_is_killed_inside_the_driver(site: Site, side: int) -> None:
    for call in CALLS[side]:
        for when in ("before", "after"):
            if call == "migration_resolve":
                site.hosts[site.source].inject_link("moved")
            index = site.source if side == 0 else site.target
            site.hosts[index].inject_kill(call, when)
            reply = migrate(site)
            site.hosts[index].clear_faults()
            site.settle(reply)
            assert reply.ok, (call, when, reply.error, site.logs())


def test_the_target_s_agent_is_away_at_first(site: Site) -> None:
    site.agents[site.target].kill()
    with site.agents[site.source].client() as client:
        ident = client.send("migrate", {"uuid": UUID, "target": NAMES[site.target]})
        with contextlib.suppress(ReplyTimeout):
            client.wait("nothing", 1.0)
        assert site.states() == ("running", "")
        site.start(site.target)
        reply = client.wait(ident, WAIT)
    assert reply.ok, (reply.error, site.logs())
    site.settle(reply)


def test_an_evacuation_goes_on_where_it_was(site: Site) -> None:
    names = ["a", "b", "c", "d"]
    kernel = site.agents[0].kernel()
    for name in names:
        site.call(0, "create", {"name": name, "memory_mib": 64, "kernel": kernel})
    site.start(0, "migrate:transfer:done")
    with site.agents[0].client() as client:
        ident = client.send("evacuate", {"target": "node2"})
        site.agents[0].wait_killed()
        site.start(0, "migrate:finish:begun")
        site.agents[0].wait_killed()
        site.start(0)
        reply = client.wait(ident, WAIT)
    assert reply.ok and reply.result is not None, (reply.error, site.logs())
    assert {row["name"]: row["outcome"] for row in reply.result["domains"]} == dict.fromkeys([*names, "web"], "moved")
    assert site.hosts[0].list_domains() == [] and site._records() == [[], []]
    assert sorted(info.name for info in site.hosts[1].list_domains()) == [*names, "web"]
    assert {info.state.value for info in site.hosts[1].list_domains()} == {"running"}


def fault(site: Site, chance: random.Random) -> Reply:
    """One migration with chosen faults."""
    point = chance.choice(["", "", "starting", "copying", "switching", "complete", "moved"])
    if point:
        what = "unresolved" if chance.random() < 0.2 and point in ("switching", "complete") else "cut"
        site.hosts[site.source].inject_link(point, what)
    kind = chance.choice(["boundary", "boundary", "random", "random", "driver", "none"])
    if kind == "boundary":
        side = chance.randrange(2)
        where = chance.choice([*SOURCE, *UNDO] if side == 0 else TARGET)
        reply = migrate(site, kills={site.source if side == 0 else site.target: where})
    elif kind == "random":
        count = chance.randrange(1, 4)
        reply = migrate(site, random_kills=[(chance.randrange(2), chance.random() * 0.8) for _ in range(count)])
    elif kind == "driver":
        side = chance.randrange(2)
        index = site.source if side == 0 else site.target
        site.hosts[index].inject_kill(chance.choice(CALLS[side]), chance.choice(["before", "after"]))
        reply = migrate(site)
    else:
        reply = migrate(site)
    for host in site.hosts:
        host.clear_faults()
    return reply


def test_chosen_faults(site: Site) -> None:
    chance = random.Random(5)
    outcomes: dict[str, int] = {}
    for _ in range(RUNS):
        reply = fault(site, chance)
        site.settle(reply)
        outcome = "moved" if reply.error is None else str(reply.error["code"])
        outcomes[outcome] = outcomes.get(outcome, 0) + 1
    assert outcomes.get("moved", 0) > RUNS // 5, outcomes


def test_the_broker_goes_and_comes_back(tmp_path: Path, rabbit: Rabbit) -> None:
    with make_site(tmp_path, rabbit.url) as site:
        for after in (0.0, 0.3, 0.6):
            with site.agents[site.source].client() as client:
                ident = client.send("migrate", {"uuid": UUID, "target": NAMES[site.target]})
                with contextlib.suppress(ReplyTimeout):
                    client.wait("nothing", after)
                rabbit.kill()
            rabbit.start()
            reply = ask_again(site, ident)
            site.settle(reply)


def ask_again(site: Site, ident: str) -> Reply:
    """Its reply, with a connection that the broker's restart has not broken."""
    end = time.monotonic() + WAIT
    while time.monotonic() < end:
        with contextlib.suppress(Exception), site.agents[site.source].client() as client:
            client.send("migrate", {"uuid": UUID, "target": NAMES[site.target]}, instruction_id=ident)
            return client.wait(ident, 15.0)
    raise AssertionError(f"no reply\n{site.logs()}")
