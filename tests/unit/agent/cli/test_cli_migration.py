"""`reeve domain migrate`, `domain standby …`, `host evacuate` and `migration …`: two agents here, over fake hosts."""

from __future__ import annotations

import dataclasses
import json
import threading
import uuid
from collections.abc import Iterator
from typing import Any

import pytest

from agent import conf
from agent.cli.migration import progress_text
from agent.service import Service
from hypervisor.toolstack.api import DomainInfo, MigrationPhase
from hypervisor.toolstack.drivers.fake import FakeToolstack


@dataclasses.dataclass
class Site:
    """:ivar here: `testnode`, whose agent runs; `there` the host of `node2`."""

    reeve: Any
    here: FakeToolstack
    there: FakeToolstack

    def create(self, name: str = "web", cmdline: str = "") -> DomainInfo:
        words = [f"name={name}", f"kernel={self.reeve.kernel}", "memory_mib=64", f"cmdline={cmdline}"]
        args = [word for item in words for word in ("--arg", item)]
        made = self.reeve("instruct", "create", *args, "-f", "json").json
        return self.here.get_domain(made["result"]["domain"]["uuid"])


@pytest.fixture
def site(reeve: Any) -> Iterator[Site]:
    config = reeve.options[1]
    second = reeve.folder / "node2.conf"
    second.write_text(
        f"[agent]\nhost = node2\nstate_dir = {reeve.folder / 'agent2'}\n"
        f"[broker]\nurl = filesystem://{reeve.folder / 'agent' / 'broker'}\n"
        f"[driver]\nname = fake\nsettings = state_dir:{reeve.folder / 'host2'},first_domid:1000\n"
    )
    services = [Service(conf.load([str(path)])) for path in (config, second)]
    there = FakeToolstack(str(reeve.folder / "host2"), first_domid=1000)
    for service in services:
        service.start()
    yield Site(reeve, reeve.host, there)
    for service in services:
        service.close()
    there.close()


def test_migrate(site: Site) -> None:
    info = site.create()
    data = site.reeve("domain", "migrate", "web", "node2", "-f", "json").json
    assert (data["uuid"], data["name"], data["target"], data["mode"], data["state"]) == (
        *(info.uuid, "web", "node2", "live"),
        "running",
    )
    assert data["bytes_sent"] > 0 and data["downtime_ms"] > 0
    assert site.here.list_domains() == []
    assert [domain.uuid for domain in site.there.list_domains()] == [info.uuid]
    assert site.reeve("migration", "list", "-f", "json").json == []


def test_migrate_with_every_option(site: Site) -> None:
    site.create()
    words = [
        "--image",
        "--bandwidth",
        "1G",
        "--downtime",
        "10",
        "--compress",
        "zstd",
        "--max-rounds",
        "5",
        "--no-throttle",
        "--copy-disks",
        "--flatten-disks",
        "--timeout",
        "60",
    ]
    assert site.reeve("domain", "migrate", "web", "node2", *words, "-f", "json").json["mode"] == "image"


def test_a_refusal_is_one_error(site: Site) -> None:
    site.create()
    site.there.create(dataclasses.replace(site.here.get_spec(site.here.list_domains()[0].uuid), uuid=str(uuid.uuid4())))
    error = site.reeve("domain", "migrate", "web", "node2", "-f", "json").error
    assert error["code"] == "domain.name_in_use"
    assert site.reeve("domain", "migrate", "web", "testnode", "-f", "json").error["code"] == "instruction.bad_args"
    assert site.reeve("domain", "migrate", "wep", "node2", "-f", "json").error["code"] == "domain.not_found"
    assert site.reeve("domain", "migrate", "web", "node2", "--live", "--image").code == 2
    assert site.here.list_domains()[0].name == "web"


def test_cancel_while_it_is_copied(site: Site) -> None:
    info = site.create(cmdline="fake.rounds=never")
    results: list[Any] = []
    thread = threading.Thread(
        target=lambda: results.append(site.reeve("domain", "migrate", "web", "node2", "-f", "json"))
    )
    thread.start()
    while not (listed := site.reeve("migration", "list", "-f", "json").json):
        thread.join(0.02)
    assert (listed[0]["name"], listed[0]["role"], listed[0]["peer"]) == ("web", "source", "node2")
    shown = site.reeve("migration", "show", "web", "-f", "json").json
    assert (shown["uuid"], shown["ident"], shown["resolve"]) == (info.uuid, listed[0]["ident"], [])
    ended = site.reeve("migration", "cancel", listed[0]["ident"], "-f", "json").json
    assert ended["phase"] in ("kept", "starting", "copying")  # as last seen, when the agent was quicker to forget it
    thread.join(30)
    assert results[0].error["code"] == "migration.cancelled"
    assert site.here.get_domain(info.uuid).state == "running" and site.there.list_domains() == []


def test_a_pair_is_resolved(site: Site) -> None:
    info = site.create()
    site.here.inject_link("complete", "unresolved")
    # The agent's own log is on this standard error, too.
    error = json.loads(site.reeve("domain", "migrate", "web", "node2", "-f", "json").err.splitlines()[-1])["error"]
    assert error["code"] == "migration.unresolved" and "reeve migration resolve" in error["message"]
    shown = site.reeve("migration", "show", "web", "-f", "json").json
    assert shown["phase"] == "unresolved"
    assert shown["resolve"] == [f"reeve migration resolve {shown['ident']} --{how}" for how in ("keep", "drop")]
    assert "migration resolve" in site.reeve("domain", "show", "web").out
    assert site.reeve("migration", "resolve", "web", "-f", "json").code == 2, "keep or drop must be said"
    settled = site.reeve("migration", "resolve", "web", "--keep", "-f", "json").json
    assert settled["phase"] == "kept"
    assert site.here.get_domain(info.uuid).state == "running" and site.there.list_domains() == []
    assert site.reeve("migration", "list", "-f", "json").json == []


def test_resolve_by_force_needs_no_agent(site: Site) -> None:
    info = site.create()
    site.here.inject_link("switching", "unresolved")
    assert site.reeve("domain", "migrate", "web", "node2").code == 1
    assert site.reeve("migration", "resolve", info.uuid, "--drop", "-f", "json").error["code"] == "migration.refused"
    data = site.reeve("migration", "resolve", info.uuid, "--keep", "--force", "-f", "json").json
    assert data["phase"] == MigrationPhase.KEPT
    assert site.here.get_domain(info.uuid).state == "running"


def test_a_migration_that_is_not_there(site: Site) -> None:
    for command in ("show", "cancel"):
        assert site.reeve("migration", command, "web", "-f", "json").error["code"] == "migration.not_found"
    assert site.reeve("migration", "resolve", "web", "--keep", "-f", "json").error["code"] == "migration.not_found"


def test_evacuate(site: Site) -> None:
    for name in ("a", "b", "c"):
        site.create(name)
    site.reeve.domain("theirs")  # made by the command line, not by the agent
    rows = site.reeve("host", "evacuate", "node2", "-f", "json").json
    assert {row["name"]: row["outcome"] for row in rows} == {
        "a": "moved", "b": "moved", "c": "moved", "theirs": "skipped",
    }  # fmt: skip
    assert [info.name for info in site.here.list_domains()] == ["theirs"]
    assert sorted(info.name for info in site.there.list_domains()) == ["a", "b", "c"]


def test_evacuate_that_leaves_some(site: Site) -> None:
    site.create("a")
    stays = site.create("b")
    site.there.create(dataclasses.replace(site.here.get_spec(stays.uuid), uuid=str(uuid.uuid4())))
    result = site.reeve("host", "evacuate", "node2", "-f", "json")
    assert result.code == 1 and '"code": "cli.incomplete"' in result.err
    assert '"failed"' in result.out and "domain.name_in_use" in result.out
    assert [info.name for info in site.here.list_domains()] == ["b"]


def test_a_standby_kept_looked_at_and_ended(site: Site) -> None:
    info = site.create()
    words = ["--interval", "50", "--bandwidth", "1G", "--compress", "zstd", "--timeout", "60"]
    data = site.reeve("domain", "standby", "start", "web", "node2", *words, "-f", "json").json
    assert (data["uuid"], data["role"], data["peer"]) == (info.uuid, "source", "node2")
    assert data["phase"] == MigrationPhase.STANDBY and data["epochs"] >= 1
    for words in ([], ["web"], [info.uuid], [data["ident"]]):
        (row,) = site.reeve("domain", "standby", "status", *words, "-f", "json").json
        assert (row["name"], row["phase"]) == ("web", MigrationPhase.STANDBY)
    assert site.here.get_domain(info.uuid).state == "running"
    (ended,) = site.reeve("domain", "standby", "stop", "web", "-f", "json").json
    assert ended["phase"] == MigrationPhase.KEPT and ended["dropped"]
    assert site.reeve("domain", "standby", "status", "-f", "json").json == []
    assert site.here.get_domain(info.uuid).state == "running" and site.there.migration_list() == []


def test_a_standby_taken_over(site: Site) -> None:
    """`reeve` speaks to the first host: it is the one that keeps the domain here."""
    info = site.create()
    site.reeve("domain", "migrate", "web", "node2")
    args = ("--host", "node2", "--arg", f"uuid={info.uuid}", "--arg", "target=testnode")
    assert site.reeve("instruct", "standby", *args, "-f", "json").json["ok"]
    data = site.reeve("domain", "standby", "takeover", "web", "-f", "json").json
    assert (data["uuid"], data["state"], data["source"], data["source_dropped"]) == (
        info.uuid,
        "running",
        "node2",
        True,
    )
    assert data["lost_ms"] == 0 and data["source_error"] == ""
    assert site.here.get_domain(info.uuid).state == "running" and site.there.list_domains() == []


def test_a_standby_that_is_not_there(site: Site) -> None:
    site.create()
    for command in (["stop", "web"], ["takeover", "web"], ["takeover", "web", "--force"], ["status", "web"]):
        error = site.reeve("domain", "standby", *command, "-f", "json").error
        assert error["code"] == "migration.not_found", command
    assert site.reeve("domain", "standby", "start", "wep", "node2", "-f", "json").error["code"] == "domain.not_found"
    assert site.reeve("domain", "standby", "start", "web", "testnode", "-f", "json").error["code"] == (
        "instruction.bad_args"
    )


def test_progress_in_words() -> None:
    assert progress_text({"done": 1, "total": 3, "unit": "domains"}) == "1 of 3 domains"
    data = {"done": 5, "total": 10, "unit": "pages", "phase": "copying", "rounds": 2, "rate_bytes": 5e8}
    data |= {"dirty_rate_pages": 1000.0, "downtime_estimate_ms": 1.25}
    assert progress_text(data) == ("5 of 10 pages, round 2, 500 MB/s, dirtied 4.1 MB/s, downtime about 1.2 ms")
    assert progress_text(data | {"phase": "switching"}) == "5 of 10 pages, switching"
