"""`reeve top` and `reeve domain events`."""

from __future__ import annotations

import json
import threading
from typing import Any

import pytest

from agent.cli import events, top
from agent.cli.top import Sample, human, rates
from hypervisor import errors
from hypervisor.toolstack.api import DomainInfo, DomainSpec, DomainState, KernelBoot

UUID = "12345678-1234-4234-8234-1234567890ab"
COUNTERS = {"disk_read": 0, "disk_write": 0, "disk_requests": 0, "net_rx": 0, "net_tx": 0}


def sample(time: float, cpu_ns: int = 0, domid: int = 1, uuid: str = UUID, **counters: int) -> dict[str, Sample]:
    info = DomainInfo(uuid, uuid[:4], domid, DomainState.RUNNING, 2, 64, max_memory_mib=128)
    return {uuid: Sample(info, time, cpu_ns, COUNTERS | counters)}


def test_rates() -> None:
    before = sample(10.0, 1_000_000_000, disk_read=1000, net_tx=50)
    (row,) = rates(before, sample(12.0, 4_000_000_000, disk_read=5000, net_tx=150, disk_requests=4), "cpu")
    assert (row.cpu_percent, row.disk_read_bytes_per_second, row.net_tx_bytes_per_second) == (150.0, 2000.0, 50.0)
    assert (row.disk_requests_per_second, row.memory_mib, row.max_memory_mib, row.state) == (2.0, 64, 128, "running")


@pytest.mark.parametrize(
    "before", [{}, sample(10.0, 9_000_000_000, domid=7, disk_read=9999), sample(12.0, 5), sample(10.0, 1 << 60)]
)
def test_a_new_or_restarted_domain_has_no_rates_and_none_is_negative(before: dict[str, Sample]) -> None:
    (row,) = rates(before, sample(12.0, 4_000_000_000, disk_read=5000), "cpu")
    assert row.cpu_percent == 0.0 and row.disk_read_bytes_per_second in (0.0, 2500.0)


def test_order() -> None:
    other = UUID.replace("1", "a", 1)
    before = sample(0.0) | sample(0.0, uuid=other)
    now = sample(1.0, 5, net_rx=10) | sample(1.0, 50_000_000, uuid=other)
    assert [row.uuid for row in rates(before, now, "cpu")] == [other, UUID]
    assert [row.uuid for row in rates(before, now, "net")] == [UUID, other]
    assert [row.uuid for row in rates(before, now, "name")] == [UUID, other]


def test_once(reeve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (reeve.folder / "disk").write_bytes(bytes(1 << 20))
    info = reeve.domain("web", "--disk", f"xvda={reeve.folder / 'disk'}", "--nic", "")
    reeve.host.add_foreign(DomainSpec(UUID, "theirs", KernelBoot("/k"), 64))

    def worked(_seconds: float) -> None:
        reeve.host.guest_work(info.uuid, 10**9, xvda={"read_bytes": 1 << 20, "read_requests": 5}, nic0={"rx_bytes": 99})

    monkeypatch.setattr(top.time, "sleep", worked)
    shown = reeve("top", "--once", "-f", "json").json
    assert [row["name"] for row in shown["domains"]] == ["web", "theirs"] and shown["interval_seconds"] == 2.0
    row = shown["domains"][0]
    assert row["cpu_percent"] > 0 and row["disk_read_bytes_per_second"] > 0 and row["net_rx_bytes_per_second"] > 0
    assert row["disk_requests_per_second"] > 0 and row["net_tx_bytes_per_second"] == 0
    table = reeve("top", "--once", "--sort", "name").out.splitlines()
    assert table[0].split()[:4] == ["NAME", "STATE", "VCPUS", "CPU%"]
    assert [line.split()[0] for line in table[1:]] == ["theirs", "web"]
    lines = reeve("top", "--count", "3", "-f", "json").out.splitlines()
    assert len([json.loads(line) for line in lines]) == 3


def test_a_domain_without_counters_is_shown(reeve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    reeve.domain()
    monkeypatch.setattr(top.time, "sleep", lambda _seconds: None)
    reeve.host.inject_error("stats", errors.Unsupported("none"), times=2)
    assert reeve("top", "--once", "-f", "json").json["domains"][0]["cpu_percent"] == 0.0


def test_a_terminal_gets_a_screen(reeve: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    reeve.domain()
    monkeypatch.setattr(top.time, "sleep", lambda _seconds: None)
    monkeypatch.setenv("FORCE_COLOR", "1")
    top.Top(None, None)._live(reeve.host, 0.01, "cpu", 2)
    assert "web" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (999, "999"), (2048, "2.0K"), (300 * 1024, "300K"), (5 << 20, "5.0M"), (1 << 50, "1024.0T")],
)
def test_human(value: float, text: str) -> None:
    assert human(value) == text


def follow(reeve: Any, monkeypatch: pytest.MonkeyPatch, act: Any, *argv: str) -> Any:
    """Run the command; `act` runs once it listens."""
    real = events.DomainEvents.say

    def say(self: events.DomainEvents, text: str) -> None:
        real(self, text)
        threading.Thread(target=act).start()

    monkeypatch.setattr(events.DomainEvents, "say", say)
    return reeve("domain", "events", *argv)


def test_events_as_json_lines(reeve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    info = reeve.domain()

    def act() -> None:
        reeve.host.pause(info.uuid)
        reeve.host.unpause(info.uuid)
        reeve.host.destroy(info.uuid)

    out = follow(reeve, monkeypatch, act, "--count", "3", "--timeout", "20", "-f", "json")
    told = [json.loads(line) for line in out.out.splitlines()]
    assert [(event["kind"], event["name"], event["uuid"]) for event in told] == [
        (kind, "web", info.uuid) for kind in ("paused", "unpaused", "destroyed")
    ]
    assert out.code == 0


def test_events_of_one_domain_as_text(reeve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    web, other = reeve.domain(), reeve.domain("other")

    def act() -> None:
        reeve.host.pause(other.uuid)
        reeve.host.crash(web.uuid, "two\nlines")

    out = follow(reeve, monkeypatch, act, "web", "--count", "1", "--timeout", "20")
    assert out.out.endswith("  web  crashed  two lines\n") and out.out.count("\n") == 1


def test_events_of_a_domain_made_meanwhile_have_its_name(reeve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = DomainSpec(UUID, "new", KernelBoot(reeve.kernel), 64)
    out = follow(reeve, monkeypatch, lambda: reeve.host.create(spec), "--count", "1", "--timeout", "20", "-f", "json")
    assert json.loads(out.out)["name"] == "new"


def test_events_end_after_the_timeout(reeve: Any) -> None:
    result = reeve("domain", "events", "--timeout", "0.05")
    assert (result.code, result.out) == (0, "")
    assert reeve("domain", "events", "nobody", "-f", "json").error["code"] == "domain.not_found"
