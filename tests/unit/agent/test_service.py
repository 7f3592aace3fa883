from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent import conf
from agent.configdrive import Drives
from agent.context import ContextFilter, log_fields
from agent.errors import AlreadyRunning, ConfigError, JournalCorrupt
from agent.folder_lock import lock_folder
from agent.rpc.client import Client
from agent.service import Service, main
from agent.wire import Instruction, Report
from hypervisor.errors import HostUnavailable
from hypervisor.toolstack.api import DomainSpec, KernelBoot
from hypervisor.toolstack.drivers.fake import FakeToolstack


def settings(tmp_path: Path, *argv: str) -> conf.Settings:
    return conf.load([], ["--agent-state-dir", str(tmp_path / "state"), "--agent-host", "node1", *argv])


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    made = Service(settings(tmp_path), FakeToolstack(None))
    made.start()
    yield made
    made.close()


@pytest.fixture
def client(service: Service) -> Iterator[Client]:
    with Client(service.settings.broker_url, "node1") as made:
        yield made


def kernel(tmp_path: Path) -> str:
    path = tmp_path / "vmlinuz"
    if not path.exists():  # an instruction may be reading it
        path.write_bytes(b"\x7fELF" + bytes(1000))
    return str(path)


def test_instructions_over_the_folder_broker(service: Service, client: Client, tmp_path: Path) -> None:
    reply = client.call("create", {"name": "web", "memory_mib": 64, "kernel": kernel(tmp_path)}, timeout=20)
    assert reply.ok and reply.result is not None
    uuid = reply.result["domain"]["uuid"]
    listed = client.call("list", timeout=20).result
    assert listed is not None and [domain["uuid"] for domain in listed["domains"]] == [uuid]
    assert client.call("destroy", {"uuid": uuid}, timeout=20).ok
    reply = client.call("destroy", {"uuid": uuid}, timeout=20)
    assert reply.error is not None and reply.error["code"] == "domain.not_found"
    assert service.journal.counts()["unfinished"] == 0


def test_the_same_id_gets_the_same_answer(client: Client, tmp_path: Path) -> None:
    args = {"name": "web", "memory_mib": 64, "kernel": kernel(tmp_path)}
    ident = client.send("create", args)
    first = client.wait(ident, 20)
    client.send("create", args, instruction_id=ident)
    assert client.wait(ident, 20) == first and first.ok
    listed = client.call("list", timeout=20).result
    assert listed is not None and len(listed["domains"]) == 1


def test_the_trace_of_an_instruction_is_in_its_reply_and_what_it_sends(client: Client) -> None:
    parent = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
    assert client.wait(client.send("list", traceparent=parent), 20).traceparent == parent
    with log_fields("i", traced={"traceparent": parent}):
        assert client.call("list", timeout=20).traceparent == parent


def test_draining_ends_in_time_and_says_whether_something_is_left(tmp_path: Path) -> None:
    service = Service(settings(tmp_path, "--agent-drain-seconds", "0"), toolstack := FakeToolstack(None))
    service.start()
    with Client(service.settings.broker_url, "node1") as client:
        args = {"name": "deaf", "memory_mib": 64, "kernel": kernel(tmp_path), "cmdline": "fake.shutdown=ignore"}
        made = client.call("create", args, timeout=20).result
        assert made is not None
        ident = client.send("shutdown", {"uuid": made["domain"]["uuid"], "wait_seconds": 600})
        deadline = time.monotonic() + 20
        while not ((entry := service.journal.entry(ident)) and entry.steps):
            assert time.monotonic() < deadline
            time.sleep(0.01)  # a poll with a deadline
        service.stop()
        assert not service.stopping.is_set()
        service.stop()
        assert service.stopping.is_set(), "asked twice: it does not wait for what runs"
        assert service.close() is False
        assert [domain.name for domain in toolstack.list_domains()] == ["deaf"], "no domain is touched"
        again = Service(settings(tmp_path), toolstack)
        again.start()
        assert again.journal.unfinished() == [ident], "it goes on at the next start"
        toolstack.destroy(made["domain"]["uuid"])
        client.wait(ident, 20)
        assert again.close() is True


def test_a_step_s_progress_is_reported(
    service: Service, client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[Report] = []
    monkeypatch.setattr(service.reporter, "_publish", told.append)
    args = {"name": "web", "memory_mib": 64, "max_memory_mib": 128, "kernel": kernel(tmp_path)}
    made = client.call("create", args | {"cmdline": "fake.memory=slow"}, timeout=20).result
    assert made is not None
    uuid = made["domain"]["uuid"]
    ident = client.send("resize", {"uuid": uuid, "memory_mib": 128})
    assert client.wait(ident, 20).ok
    progress = [report for report in told if report.kind == "progress"]
    assert progress and progress[-1].routing_key == "progress.node1"
    assert progress[-1].data | {"done": 64} == {
        "instruction": ident, "verb": "resize", "uuid": uuid, "done": 64, "total": 64, "unit": "MiB",
    }  # fmt: skip


def test_config_drives_of_domains_that_are_gone_are_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    toolstack = FakeToolstack(None)
    service = Service(settings(tmp_path), toolstack)
    drives = Drives(service.settings.config_drive_dir)
    ids = [f"{digit * 8}-2222-3333-4444-555555555555" for digit in "123"]
    for ident in ids:
        drives.write(ident, "cidata", {"meta-data": b"x"}, "maker")
        os.utime(drives.path(ident), (0, 0))
    toolstack.create(DomainSpec(ids[0], "web", KernelBoot(kernel(tmp_path)), 64))
    service.start()
    service.journal.accept(Instruction("making-it", "create", "node1", {}, ""))
    service.journal.take_claim("making-it", ids[1], 64, 1)
    monkeypatch.setattr("agent.service.HOUSEKEEPING_SECONDS", 0.01)
    toolstack.inject_error("list_domains", HostUnavailable("away"))
    house = threading.Thread(target=service.run)
    house.start()
    try:
        deadline = time.monotonic() + 20
        while drives.path(ids[2]).exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)  # a poll with a deadline
    finally:
        service.stop()
        house.join(20)
        service.close()
    assert sorted(drives.folder.iterdir()) == [drives.path(ids[0]), drives.path(ids[1])]


BAD = [
    (b"this is not JSON", "message.not_json"),
    (b"[" * 10000, "message.too_deep"),
    (b'{"reeve": "2.0"}', "message.unsupported_version"),
    (b'{"reeve": "1.0", "colour": "blue"}', "message.unknown_field"),
    (b" " * (5 << 20), "message.too_large"),
]


@pytest.mark.parametrize(("body", "code"), BAD)
def test_bad_messages_are_answered_and_leave_nothing(service: Service, client: Client, body: bytes, code: str) -> None:
    client.send_raw(body, correlation_id="bad-1")
    reply = client.wait("bad-1", 20)
    assert reply.error is not None and reply.error["code"] == code and "\n" not in reply.error["message"]
    counts = service.journal.counts()
    assert (counts["unfinished"], counts["claims"], counts["quarantine"]) == (0, 0, 1)
    assert client.call("list", timeout=20).ok


def test_an_instruction_for_another_host(service: Service, client: Client) -> None:
    body = {"reeve": "1.0", "id": "11111111-2222-3333-4444-555555555555", "verb": "list", "host": "node2"}
    client.send_raw(json.dumps(body).encode())
    reply = client.wait(str(body["id"]), 20)
    assert reply.error is not None and reply.error["code"] == "message.wrong_host"


def test_capacity_is_reported(service: Service, client: Client, tmp_path: Path) -> None:
    seen: list[Report] = []
    client.listen(seen.append, "#")
    client.call("create", {"name": "web", "memory_mib": 64, "kernel": kernel(tmp_path)}, timeout=20)
    for _ in range(200):
        client.drain(0.05)
        if any(report.kind == "capacity" and report.data["domains"] == 1 for report in seen):
            break
    else:
        raise AssertionError(f"no capacity report: {seen}")
    assert {"created", "unpaused"} <= {r.data["event"] for r in seen if r.kind == "lifecycle"}


def test_restart_goes_on(tmp_path: Path) -> None:
    toolstack = FakeToolstack(None)
    options = settings(tmp_path)
    with Client(options.broker_url, "node1") as client:
        first = Service(options, toolstack)
        first.start()
        owner = first.claims and first.journal.node_id()
        reply = client.call("create", {"name": "web", "memory_mib": 64, "kernel": kernel(tmp_path)}, timeout=20)
        first.close()
        ident = client.send("list")
        second = Service(options, toolstack)
        second.start()
        assert client.wait(ident, 20).ok
        assert second.journal.node_id() == owner
        assert reply.result is not None
        assert client.call("destroy", {"uuid": reply.result["domain"]["uuid"]}, timeout=20).ok
        second.close()


def test_stop_during_a_wait_keeps_the_instruction(tmp_path: Path) -> None:
    toolstack = FakeToolstack(None)
    options = settings(tmp_path, "--agent-drain-seconds", "0")
    with Client(options.broker_url, "node1") as client:
        first = Service(options, toolstack)
        first.start()
        args = {"name": "web", "memory_mib": 64, "kernel": kernel(tmp_path), "cmdline": "fake.shutdown=ignore"}
        created = client.call("create", args, timeout=20).result
        assert created is not None
        uuid = created["domain"]["uuid"]
        ident = client.send("shutdown", {"uuid": uuid, "wait_seconds": 600, "force": False})
        while first.journal.entry(ident) is None or not first.journal.entry(ident).steps:  # type: ignore[union-attr]
            client.drain(0.01)
        first.close()
        toolstack.destroy(uuid)
        second = Service(options, toolstack)
        second.start()
        reply = client.wait(ident, 20)
        second.close()
    assert reply.ok and reply.result is not None and reply.result["domain"]["state"] == "gone"


def test_only_allowed_verbs(tmp_path: Path) -> None:
    service = Service(settings(tmp_path, "--agent-allowed-verbs", "list,show"), FakeToolstack(None))
    service.start()
    with Client(service.settings.broker_url, "node1") as client:
        assert client.call("list", timeout=20).ok
        reply = client.call("destroy", {"uuid": "11111111-2222-3333-4444-555555555555"}, timeout=20)
    service.close()
    assert reply.error is not None and reply.error["code"] == "instruction.unknown_verb"


def test_one_agent_per_state_folder(service: Service, tmp_path: Path) -> None:
    with pytest.raises(AlreadyRunning, match=f"another reeve-agent \\(pid {os.getpid()}\\) uses the state folder"):
        Service(service.settings, FakeToolstack(None)).start()
    with pytest.raises(AlreadyRunning, match="another agent takes instructions"):
        other = conf.load(
            [],
            ["--agent-state-dir", str(tmp_path / "b"), "--agent-host", "node1",
             "--broker-url", service.settings.broker_url],
        )  # fmt: skip
        Service(other, FakeToolstack(None)).start()


def test_the_lock_is_free_after_close(tmp_path: Path) -> None:
    lock_folder(tmp_path / "x").close()
    lock_folder(tmp_path / "x").close()
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be used"):
        lock_folder(tmp_path / "file" / "x")


def test_a_damaged_journal_stops_the_start(tmp_path: Path) -> None:
    options = settings(tmp_path)
    options.journal_path.parent.mkdir(parents=True)
    options.journal_path.write_bytes(b"no database" * 1000)
    with pytest.raises(JournalCorrupt):
        Service(options, FakeToolstack(None)).start()
    lock_folder(options.state_dir / "agent").close()


def test_main_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = logging.getLogger()
    before = root.handlers[:], root.level
    try:
        assert main(["--agent-host", "a b"]) == 2
        assert "[agent] host 'a b' is not usable" in capsys.readouterr().err
        assert main(["--agent-state-dir", str(tmp_path), "--driver-name", "vmware"]) == 1
        assert "agent.config: driver 'vmware' is not installed" in capsys.readouterr().err
        assert main(["--agent-state-dir", str(tmp_path), "--broker-url", "http://x/"]) == 1
        assert "agent.config: broker URL 'http://x/' has scheme 'http'" in capsys.readouterr().err
    finally:
        root.handlers[:], root.level = before


def test_log_records_carry_the_instruction(caplog: pytest.LogCaptureFixture) -> None:
    record = logging.LogRecord("x", logging.INFO, "f", 1, "m", (), None)
    with log_fields("id-1", "uuid-1"):
        assert ContextFilter().filter(record)
    assert (record.instruction, record.domain) == ("id-1", "uuid-1")  # type: ignore[attr-defined]
    ContextFilter().filter(record)
    assert record.instruction == "-"  # type: ignore[attr-defined]
