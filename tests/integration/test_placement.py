"""OpenStack's own Placement and two agents: what they tell of creates, resizes, migrations, crashes, their own deaths.

``REEVE_PLACEMENT_SEED`` chooses another run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import random
import threading
import time
import uuid as uuid_module
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from agent_process import AgentProcess
from placement_service import PlacementMissing, placement

from agent.cli.main import ReeveApp
from agent.conf_placement import PlacementSettings
from agent.journal import Journal
from agent.placement import audit
from agent.placement.auth import FixedAuth
from agent.placement.build import make_reconciler
from agent.placement.client import Client, Consumer
from agent.placement.errors import Conflict
from agent.placement.http import Http
from agent.resources import ResourceClaims
from agent.wire import Reply
from hypervisor.toolstack.api import DomainSpec, KernelBoot
from hypervisor.toolstack.drivers.fake import FakeToolstack

pytestmark = pytest.mark.timeout(400)  # the first run installs Placement
SEED = int(os.environ.get("REEVE_PLACEMENT_SEED", "6"))
OPERATIONS = 100
WAIT = 60.0
NAMES = ("node1", "node2")
MEMORY_MIB, CPUS = 4096, 4
KILLS = {
    "create": (("create", "before"), ("create", "after"), ("unpause", "after")),
    "destroy": (("destroy", "before"), ("destroy", "after")),
    "resize": (("redefine", "before"), ("redefine", "after")),
    "migrate": (("migration_start", "after"), ("migration_status", "before"), ("migration_forget", "after")),
}
"""Verb → calls of the driver in which the agent dies."""


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with contextlib.ExitStack() as stack:
        try:
            found = stack.enter_context(placement(tmp_path_factory.mktemp("placement")))
        except PlacementMissing as exc:
            if os.environ.get("CI") == "true":
                raise
            pytest.skip(f"no openstack-placement here: {exc}")
        yield found


@pytest.fixture
def client(url: str) -> Iterator[Client]:
    http = Http(seconds=30.0)
    yield Client(http, FixedAuth("admin"), url)
    http.close()


Kill = tuple[str, str] | None


@dataclasses.dataclass
class Site:
    """:ivar where: index of the host of each domain. :ivar done: what happened, for a failure's text."""

    agents: list[AgentProcess]
    hosts: list[FakeToolstack]
    client: Client
    options: tuple[str, ...]
    providers: list[str] = dataclasses.field(default_factory=list)
    where: dict[str, int] = dataclasses.field(default_factory=dict)
    done: list[str] = dataclasses.field(default_factory=list)

    def start(self, index: int) -> None:
        self.agents[index].start("", *self.options)

    def carry_out(self, index: int, verb: str, args: dict[str, Any], kill: Kill = None) -> Reply:
        """:param kill: call of the driver in which the agent dies, to be started again."""
        if kill:
            self.hosts[index].inject_kill(*kill)
        self.done.append(f"{NAMES[index]}: {verb} {args} {kill}")
        with self.agents[index].client() as sender:
            ident = sender.send(verb, args)
            if kill:
                self.agents[index].wait_killed()
                self.start(index)
            return sender.wait(ident, WAIT)

    def expected(self, index: int) -> dict[str, dict[str, int]]:
        """By the host's own domain table."""
        return {
            info.uuid: {"VCPU": info.vcpus, "MEMORY_MB": max(info.memory_mib, info.memory_target_mib)}
            for info in self.hosts[index].list_domains()
        }

    def check(self, *indexes: int) -> None:
        """Placement comes to say what there is on these hosts, and says it of nothing else."""
        for index in indexes:
            wanted = self.expected(index)
            assert set(wanted) == {uuid for uuid, at in self.where.items() if at == index}, self.story()
            until(lambda wanted=wanted, index=index: self.rows(index) == wanted, self.story)  # type: ignore[misc]

    def check_inventory(self) -> None:
        for index in (0, 1):
            found = self.client.inventories(self.providers[index])[1]
            assert found["VCPU"]["total"] == CPUS and found["VCPU"]["allocation_ratio"] == 16.0
            assert found["MEMORY_MB"]["total"] == MEMORY_MIB and found["MEMORY_MB"]["reserved"] == 0

    def rows(self, index: int) -> dict[str, Any]:
        return dict(self.client.allocations(self.providers[index]))

    def story(self) -> str:
        logs = [f"--- {agent.host}\n{agent.log[-3000:]}" for agent in self.agents]
        rows = [self.rows(index) for index in (0, 1)]
        return "\n".join([*self.done[-10:], f"{rows} {[self.expected(index) for index in (0, 1)]}", *logs])


def until(condition: Callable[[], object], story: Callable[[], str]) -> None:
    end = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < end, story()
        time.sleep(0.1)


@pytest.fixture
def site(tmp_path: Path, url: str, client: Client) -> Iterator[Site]:
    options = (
        "--placement-enabled", "--placement-endpoint", url, "--placement-auth", "token", "--placement-token", "admin",
        "--placement-interval", "5", "--placement-timeout", "30", "--http-noenabled", "--agent-drain-seconds", "0",
        "--agent-unknown-seconds", "20",
    )  # fmt: skip
    agents, hosts = [], []
    for number, name in enumerate(NAMES):
        home = tmp_path / name
        home.mkdir()
        hosts.append(FakeToolstack(str(home / "host"), first_domid=1 + 1000 * number))
        settings = f"state_dir:{home / 'host'},cpus:{CPUS},memory_mib:{MEMORY_MIB}"
        driver = ("--driver-name", "fake", "--driver-settings", settings)
        agents.append(AgentProcess(home, f"filesystem://{tmp_path}/broker", driver, name))
    made = Site(agents, hosts, client, options)
    try:
        for index in (0, 1):
            made.start(index)
        for name in NAMES:
            until(lambda name=name: client.provider_named(name), lambda: "\n".join(agent.log for agent in agents))  # type: ignore[misc]
            found = client.provider_named(name)
            assert found is not None
            made.providers.append(found.uuid)
        yield made
    finally:
        for agent in agents:
            if agent.process is not None:
                agent.stop()
        for host in hosts:
            host.close()


class Random:
    """One operation after another, by chance; each says which hosts it concerned. In every fifth the agent dies."""

    def __init__(self, site: Site, seed: int) -> None:
        self.site = site
        self.chance = random.Random(seed)
        self.counts: dict[str, int] = {}

    def step(self) -> None:
        verb = self.chance.choices(
            ("create", "resize", "migrate", "destroy", "crash", "refused"), (32, 22, 22, 12, 8, 4)
        )[0]
        if not self.site.where or (verb == "create" and len(self.site.where) > 8):
            verb = "destroy" if self.site.where else "create"
        kill = self.chance.choice(KILLS[verb]) if verb in KILLS and self.chance.random() < 0.2 else None
        self.counts[verb] = self.counts.get(verb, 0) + 1
        self.counts["killed"] = self.counts.get("killed", 0) + bool(kill)
        uuid = self.chance.choice(sorted(self.site.where)) if self.site.where else ""
        self.site.check(*getattr(self, verb)(uuid, kill))

    def create(self, _uuid: str, kill: Kill) -> tuple[int, ...]:
        index, uuid = self.chance.randrange(2), str(uuid_module.UUID(int=self.chance.getrandbits(128), version=4))
        args = {
            "name": f"d{uuid[:8]}", "uuid": uuid, "kernel": self.site.agents[index].kernel(),
            "memory_mib": self.chance.choice((64, 128, 200)), "vcpus": self.chance.randint(1, 3), "on_crash": "destroy",
        }  # fmt: skip
        reply = self.site.carry_out(index, "create", args, kill)
        assert reply.ok, (reply.error, self.site.story())
        self.site.where[uuid] = index
        return (index,)

    def crash(self, uuid: str, _kill: Kill) -> tuple[int, ...]:
        """The guest does; no instruction tells the agent."""
        index = self.site.where.pop(uuid)
        self.site.done.append(f"{NAMES[index]}: {uuid} crashes")
        self.site.hosts[index].crash(uuid)
        return (index,)

    def refused(self, _uuid: str, _kill: Kill) -> tuple[int, ...]:
        args = {"name": "big", "kernel": self.site.agents[0].kernel(), "memory_mib": MEMORY_MIB + 1}
        reply = self.site.carry_out(0, "create", args)
        assert reply.error is not None and reply.error["code"] == "host.insufficient_memory", reply
        return (0,)

    def resize(self, uuid: str, kill: Kill) -> tuple[int, ...]:
        index = self.site.where[uuid]
        args = {"uuid": uuid, "mode": "cold", "memory_mib": self.chance.choice((64, 96, 256)), "force": True}
        now = self.site.hosts[index].get_domain(uuid).vcpus
        args["vcpus"] = self.chance.choice(sorted({1, 2, 3, 4} - {now}))
        reply = self.site.carry_out(index, "resize", args, kill)
        assert reply.ok, (reply.error, self.site.story())
        reply = self.site.carry_out(index, "confirm_resize", {"uuid": uuid})
        assert reply.ok or (reply.error or {})["code"] == "resize.none_pending", (reply.error, self.site.story())
        return (index,)

    def migrate(self, uuid: str, kill: Kill) -> tuple[int, ...]:
        index = self.site.where[uuid]
        reply = self.site.carry_out(index, "migrate", {"uuid": uuid, "target": NAMES[1 - index]}, kill)
        assert reply.ok, (reply.error, self.site.story())
        self.site.where[uuid] = 1 - index
        return (0, 1)

    def destroy(self, uuid: str, kill: Kill) -> tuple[int, ...]:
        index = self.site.where.pop(uuid)
        reply = self.site.carry_out(index, "destroy", {"uuid": uuid}, kill)
        assert reply.ok, (reply.error, self.site.story())
        return (index,)


def test_placement_is_right_through_creates_resizes_migrations_and_kills(site: Site) -> None:
    run = Random(site, SEED)
    for number in range(OPERATIONS):
        run.step()
        if number % 10 == 9:
            site.check(0, 1)
            site.check_inventory()
    assert min(run.counts[verb] for verb in ("create", "resize", "migrate", "destroy", "killed")) > 5, run.counts
    for uuid, index in sorted(site.where.items()):
        assert site.carry_out(index, "destroy", {"uuid": uuid}).ok
    site.where.clear()
    site.check(0, 1)
    assert site.rows(0) == {} == site.rows(1)


def test_audit_and_repair_mend_what_is_ours(
    tmp_path: Path, url: str, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audit, "SETTLE_SECONDS", 0.0)  # nothing else is at work on this host
    host = FakeToolstack(str(tmp_path / "host"))
    journal = Journal(tmp_path / "state" / "agent" / "journal.sqlite")
    claims = ResourceClaims(host, journal)
    settings = PlacementSettings(True, url, "token", "admin", "repaired", allocations="audit", timeout=30.0)
    told = make_reconciler(settings, journal.node_id(), claims, host)
    assert told is not None
    told.step()
    assert told.status.error == ""
    (tmp_path / "kernel").write_bytes(b"\x7fELF" + bytes(100))
    info = host.create(DomainSpec(str(uuid_module.uuid4()), "web", KernelBoot(str(tmp_path / "kernel")), 64))
    provider, orphan, theirs = journal.node_id(), str(uuid_module.uuid4()), str(uuid_module.uuid4())
    row = {"VCPU": 1, "MEMORY_MB": 64}
    client.set_consumer(orphan, Consumer({provider: row}, "reeve", "reeve", "REEVE_DOMAIN"))
    client.set_consumer(theirs, Consumer({provider: row}, "project", "user", "INSTANCE"))
    config = tmp_path / "agent.conf"
    config.write_text(
        f"[agent]\nstate_dir = {tmp_path}/state\n[driver]\nname = fake\nsettings = state_dir:{tmp_path}/host\n"
        f"[placement]\nenabled = true\nendpoint = {url}\nauth = token\ntoken = admin\ntimeout = 30\n"
    )

    def reeve(*argv: str) -> Any:
        out, err = io.StringIO(), io.StringIO()
        assert ReeveApp(stdout=out, stderr=err).run(["--config-file", str(config), *argv]) == 0, err.getvalue()
        return json.loads(out.getvalue())

    listed = {(item["consumer"], item["kind"], item["own"]) for item in reeve("placement", "audit", "--json")}
    assert listed == {(info.uuid, "missing", True), (orphan, "orphan", True), (theirs, "orphan", False)}
    results = {item["consumer"]: item["result"] for item in reeve("placement", "repair", "--json")}
    assert results == {info.uuid: "written", orphan: "removed", theirs: "foreign"}
    assert client.allocations(provider) == {info.uuid: row, theirs: row}
    shown = reeve("placement", "show", "--json")
    assert (shown["name"], shown["differences"]) == ("repaired", 1)
    assert shown["inventories"]["MEMORY_MB"]["used"] == 128 and "CUSTOM_REEVE_DRIVER_FAKE" in shown["traits"]
    journal.close()
    host.close()


def test_others_that_change_the_provider_at_the_same_time(tmp_path: Path, url: str, client: Client) -> None:
    """Real generation conflicts: inventory and traits get there, and what the other added stays."""
    host = FakeToolstack(None)
    journal = Journal(tmp_path / "journal.sqlite")
    claims = ResourceClaims(host, journal)
    settings = PlacementSettings(True, url, "token", "admin", "contended", timeout=30.0)
    told = make_reconciler(settings, journal.node_id(), claims, host)
    assert told is not None
    told.step()
    uuid = journal.node_id()
    added: list[str] = []
    over = threading.Event()

    def other() -> None:
        theirs = Client(Http(seconds=30.0), FixedAuth("admin"), url)
        while not over.is_set():
            with contextlib.suppress(Conflict):
                generation, found = theirs.aggregates(uuid)
                aggregate = str(uuid_module.uuid4())
                theirs.set_aggregates(uuid, generation, found | {aggregate})
                added.append(aggregate)

    thread = threading.Thread(target=other)
    thread.start()
    try:
        for ratio in range(1, 9):
            claims.vcpu_ratio = float(ratio)

            def arrived() -> bool:
                told.step()
                return told.status.error == ""

            until(arrived, lambda: told.status.error)
            assert client.inventories(uuid)[1]["VCPU"]["allocation_ratio"] == claims.vcpu_ratio
    finally:
        over.set()
        thread.join(30)
    assert added and client.aggregates(uuid)[1] == set(added)
    journal.close()
