"""Health pages, metrics, systemd's protocol and SIGHUP, of a whole agent over the fake driver."""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from agent import conf, reload
from agent.monitor import Monitor
from agent.rpc.client import Client
from agent.service import Service
from hypervisor import sdnotify
from hypervisor.errors import HostUnavailable
from hypervisor.toolstack.drivers.fake import FakeToolstack


class Manager:
    """systemd's end of the notification socket."""

    def __init__(self, path: Path) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.sock.bind(str(path))
        self.sock.settimeout(10)
        self.seen: list[str] = []

    def until(self, line: str) -> list[str]:
        """What came until `line` did, it included."""
        got: list[str] = []
        while not any(item.startswith(line) for item in got):
            got += self.sock.recv(4096).decode().splitlines()
        return got


@pytest.fixture
def manager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Manager]:
    made = Manager(tmp_path / "notify")
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
    yield made
    made.sock.close()


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "agent.conf"
    path.write_text("[reports]\ninterval = 60\n")
    monkeypatch.setattr(conf, "SYSTEM_CONFIG", path)
    return path


@pytest.fixture
def service(tmp_path: Path, config: Path) -> Iterator[Service]:
    argv = ["--agent-state-dir", str(tmp_path / "state"), "--agent-host", "node1", "--http-port", "0"]
    made = Service(conf.load(None, argv), FakeToolstack(None), argv)
    made.start()
    yield made
    made.close()


@pytest.fixture
def running(service: Service) -> Iterator[Service]:
    """With its main loop in a thread."""
    house = threading.Thread(target=service.run)
    house.start()
    yield service
    service.stop()
    house.join(20)
    assert not house.is_alive()


def get(service: Service, path: str) -> tuple[int, str]:
    assert service.monitor.http is not None
    url = f"http://127.0.0.1:{service.monitor.http.port}{path}"
    try:
        with urllib.request.urlopen(url, timeout=20) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)  # a poll with a deadline


def test_health(service: Service) -> None:
    until(lambda: get(service, "/readyz")[0] == 200)
    status, text = get(service, "/healthz")
    assert (status, json.loads(text)) == (200, {"status": "ok", "checks": {"threads": "ok", "journal": "ok"}})
    toolstack = service.toolstack
    assert isinstance(toolstack, FakeToolstack)
    toolstack.inject_error("host_info", HostUnavailable("the host is away"))
    status, text = get(service, "/readyz")
    assert status == 503 and json.loads(text)["checks"]["driver"] == "host.unavailable: the host is away"
    service.dispatcher.max_pending = 0
    assert "max_pending" in json.loads(get(service, "/readyz")[1])["checks"]["room"]
    service.stop()
    assert json.loads(get(service, "/readyz")[1])["checks"]["agent"] == "the agent is about to end"
    assert get(service, "/healthz")[0] == 200, "ending is no reason to be killed"


def test_a_thread_that_ended_is_no_health(service: Service) -> None:
    service.reporter.stop()
    status, text = get(service, "/healthz")
    assert status == 503 and json.loads(text)["checks"]["threads"] == "ended: reporter"


def test_metrics(service: Service, tmp_path: Path) -> None:
    kernel = tmp_path / "vmlinuz"
    kernel.write_bytes(b"\x7fELF" + bytes(1000))
    with Client(service.settings.broker_url, "node1") as client:
        made = client.call("create", {"name": 'a"b\\c', "memory_mib": 64, "kernel": str(kernel)}, timeout=20)
        if made.error is not None:  # the name is refused: what is not refused must be escaped
            made = client.call("create", {"name": "web", "memory_mib": 64, "kernel": str(kernel)}, timeout=20)
        assert made.ok and made.result is not None
        for verb in ("nonsense-1", "nonsense-2"):
            assert not client.call(verb, timeout=20).ok
        client.send_raw(b"not JSON", correlation_id="bad")
        client.wait("bad", 20)
    uuid = made.result["domain"]["uuid"]
    status, text = get(service, "/metrics")
    found = {
        (sample.name, *sorted(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    assert status == 200
    assert found["reeve_instructions_total", "create", "done"] == 1
    assert found["reeve_instructions_total", "failed", "unknown"] == 2, "what a sender makes up is no label"
    assert found["reeve_instruction_seconds_count", "create"] >= 1
    assert found["reeve_step_seconds_count", "build", "create"] == 1
    assert found["reeve_messages_total", "refused"] == 1
    assert found["reeve_messages_refused_total", "message.not_json"] == 1
    assert found["reeve_domains", "running"] == 1 and found["reeve_driver_up",] == 1
    name = made.result["domain"]["name"]
    assert found["reeve_domain_memory_bytes", *sorted((uuid, name))] == 64 << 20
    assert found["reeve_journal_quarantine",] == 1 and found["reeve_capacity_domains",] == 1
    assert "process_resident_memory_bytes" in text


def test_a_taken_port_stops_nothing_else(service: Service, caplog: pytest.LogCaptureFixture) -> None:
    assert service.monitor.http is not None
    given = service.settings.http
    taken = type(given)(enabled=True, address="127.0.0.1", port=service.monitor.http.port)
    other = Monitor(taken, service.metrics, {}, {})
    other.listen()
    assert other.http is None and "give another [http] port" in caplog.text
    other.stop()


def test_systemd_hears_of_start_watchdog_reload_and_end(
    manager: Manager, tmp_path: Path, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", "100000")
    argv = ["--agent-state-dir", str(tmp_path / "state"), "--agent-host", "node1", "--http-port", "0"]
    service = Service(conf.load(None, argv), FakeToolstack(None), argv)
    service.start()
    house = threading.Thread(target=service.run)
    house.start()
    try:
        assert "STATUS=host node1, driver fake" in manager.until("READY=1")
        manager.until("WATCHDOG=1")
        service.reload()
        got = manager.until("RELOADING=1")
        assert any(line.startswith("MONOTONIC_USEC=") for line in got)
        manager.until("READY=1")
        service.reporter.stop()
        until(lambda: not service.reporter.alive())
    finally:
        service.stop()
        house.join(20)
        service.close()
    assert any(line.startswith("EXTEND_TIMEOUT_USEC=") for line in manager.until("STOPPING=1"))


def test_the_watchdog_is_not_told_by_an_agent_that_is_not_well(
    manager: Manager, service: Service, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", "20000")
    wrong = ["the thread ended"]
    off = type(service.settings.http)(enabled=False, address="", port=0)
    monitor = Monitor(off, service.metrics, {"thread": lambda: wrong[0]}, {})
    monitor.start()
    until(lambda: "the watchdog is not told" in caplog.text)
    sdnotify.status("marker")
    assert "WATCHDOG=1" not in manager.until("STATUS=marker")
    wrong[0] = ""
    manager.until("WATCHDOG=1")
    monitor.stop()


def test_without_a_manager_nothing_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    assert not sdnotify.notify("READY=1")
    for address in ("relative", str(tmp_path / "nobody")):
        monkeypatch.setenv("NOTIFY_SOCKET", address)
        assert not sdnotify.notify("READY=1")
    monkeypatch.setenv("WATCHDOG_USEC", "30000000")
    assert sdnotify.watchdog_seconds() == 30
    monkeypatch.setenv("WATCHDOG_PID", str(os.getpid() + 1))
    assert sdnotify.watchdog_seconds() == 0
    monkeypatch.delenv("WATCHDOG_PID")
    monkeypatch.setenv("WATCHDOG_USEC", "soon")
    assert sdnotify.watchdog_seconds() == 0


def test_an_abstract_socket(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind("")  # the kernel gives an abstract name
        sock.settimeout(10)
        monkeypatch.setenv("NOTIFY_SOCKET", "@" + sock.getsockname()[1:].decode())
        sdnotify.ready("well")
        assert sock.recv(100) == b"READY=1\nSTATUS=well"


def test_what_may_change_changes_on_reload(running: Service, config: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    level = logging.getLogger().level
    config.write_text(
        "[reports]\ninterval = 7\n[limits]\nmax_pending = 9\n[agent]\nworkers = 3\n[log]\nlevel = error\n"
    )
    try:
        running.reload()
        until(lambda: running.reporter.interval == 7)
        assert running.dispatcher.max_pending == 9
        until(lambda: logging.getLogger().level == logging.ERROR)
        assert running.settings.workers == 8 and running.settings.log.level == "error"
    finally:
        logging.getLogger().setLevel(level)


def test_a_bad_configuration_changes_nothing(running: Service, config: Path, caplog: pytest.LogCaptureFixture) -> None:
    config.write_text("[reports]\ninterval = 7\n[limits]\nmax_pending = many\n")
    running.reload()
    until(lambda: "the configuration stays as it was" in caplog.text)
    assert running.reporter.interval == 60 and running.dispatcher.alive()


def test_the_options_marked_as_mutable_are_those_that_reload_knows(service: Service) -> None:
    names = {"interval": "report_interval"}
    prefixes = {"log": "log.", "placement": "placement."}
    marked = {
        prefixes[group] + option.dest if group in prefixes else names.get(option.dest, option.dest)
        for group, options in conf.list_opts()
        for option in options
        if option.mutable
    }
    assert marked == reload.MUTABLE
