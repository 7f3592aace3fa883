"""Placement and a whole agent: instructions, another host name, its pages, and a Placement that is away."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

from fake_placement import FakePlacement

from agent import conf, reload
from agent.health import Health, gauges
from agent.rpc.client import Client
from agent.service import Service
from hypervisor.toolstack.drivers.fake import FakeToolstack


def until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        threading.Event().wait(0.005)


def make(tmp_path: Path, url: str, toolstack: FakeToolstack, host: str = "node1") -> Service:
    argv = [
        "--agent-state-dir", str(tmp_path / "state"), "--agent-host", host, "--http-noenabled",
        "--placement-enabled", "--placement-endpoint", url, "--placement-auth", "token", "--placement-token", "admin",
    ]  # fmt: skip
    service = Service(conf.load([], argv), toolstack, argv)
    service.start()
    return service


def test_an_agent_tells_placement_and_another_name_makes_no_second_provider(
    tmp_path: Path, server: FakePlacement
) -> None:
    toolstack = FakeToolstack(None)
    kernel = tmp_path / "vmlinuz"
    kernel.write_bytes(b"\x7fELF" + bytes(1000))
    service = make(tmp_path, server.url, toolstack)
    try:
        until(lambda: server.providers and gauges(service)["placement_up"])
        (uuid,) = server.providers
        assert uuid == service.journal.node_id()
        with Client(service.settings.broker_url, "node1") as client:
            reply = client.call("create", {"name": "web", "memory_mib": 64, "kernel": str(kernel)}, timeout=20)
        assert reply.ok and reply.result is not None
        domain = reply.result["domain"]["uuid"]
        until(lambda: server.rows(uuid) == {domain: {"VCPU": 1, "MEMORY_MB": 64}})
        reload.carry_out(service)
        assert Health(service)._threads() == ""
    finally:
        service.close()
    service = make(tmp_path, server.url, toolstack, "node2")
    try:
        until(lambda: [provider.name for provider in server.providers.values()] == ["node2"])
        assert list(server.providers) == [uuid] and set(server.rows(uuid)) == {domain}
    finally:
        service.close()


def test_an_agent_works_without_its_placement(tmp_path: Path) -> None:
    service = make(tmp_path, "http://127.0.0.1:1/placement", FakeToolstack(None))
    try:
        until(lambda: service.placement is not None and service.placement.status.error)
        with Client(service.settings.broker_url, "node1") as client:
            assert client.call("list", timeout=20).ok
        assert gauges(service)["placement_up"] == 0
        assert all(check() == "" for check in Health(service).live().values()), "instructions need no Placement"
    finally:
        service.close()
