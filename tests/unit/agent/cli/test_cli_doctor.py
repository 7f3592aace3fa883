"""`reeve doctor`: every check says something, what is missing has a cure, and nothing is changed."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import pytest
from authority import Authority

from agent import conf
from agent.cli import checks
from agent.cli.checks import Finding, Status
from agent.service import Service
from hypervisor import errors
from hypervisor.host import sandbox
from hypervisor.host.mover import TlsFiles
from hypervisor.host.sandbox import Report
from hypervisor.toolstack.api import HostInfo
from hypervisor.toolstack.drivers.fake import FakeToolstack


def rows(reeve: Any) -> dict[str, dict[str, str]]:
    result = reeve("doctor", "-f", "json")
    assert result.code in (0, 1)
    return {row["check"]: row for row in json.loads(result.out)}


def test_every_check_is_told_with_a_cure(reeve: Any) -> None:
    found = rows(reeve)
    assert list(found) == [
        *("python", "machine", "unicorn", "engine", "memfd", "seccomp", "landlock", "userfaultfd", "kvm", "xen"),
        *("dpkg-deb", "apt-get", "cpio", "busybox", "qemu-storage-daemon", "qemu-img", "slirp4netns"),
        *("grub-xen-host", "state_dir", "disk", "host_process", "migration", "broker", "agent"),
    ]
    for row in found.values():
        assert set(row) == {"check", "status", "detail", "cure"}
        assert row["status"] in ("ok", "warn", "missing")
        assert row["detail"]
        assert (row["cure"] == "") == (row["status"] == "ok")


def test_it_changes_nothing(reeve: Any) -> None:
    before = sorted(reeve.folder.rglob("*"))
    config = reeve.options[1]
    rows(reeve)
    assert sorted(reeve.folder.rglob("*")) == sorted([*before, Path(config)])


def test_the_driver_is_asked(reeve: Any) -> None:
    assert rows(reeve)["host_process"]["status"] == "ok"
    reeve.host.inject_error("host_info", errors.HostUnavailable("away"))
    row = rows(reeve)["host_process"]
    assert row["status"] == "warn"
    assert "away" in row["detail"]


@pytest.mark.parametrize(
    ("report", "seccomp", "landlock"),
    [
        (Report(True, 4), "ok", "ok"),
        (Report(True, 0, ("Landlock is not in this kernel",)), "ok", "warn"),
        (Report(False, 0, ("Landlock is not in this kernel", "seccomp: Function not implemented")), "warn", "warn"),
    ],
)
def test_the_sandbox(reeve: Any, monkeypatch: pytest.MonkeyPatch, report: Report, seccomp: str, landlock: str) -> None:
    monkeypatch.setattr(sandbox, "probe", lambda: report)
    found = rows(reeve)
    assert (found["seccomp"]["status"], found["landlock"]["status"]) == (seccomp, landlock)
    assert ("Function not implemented" in found["seccomp"]["detail"]) == (seccomp == "warn")
    assert ("sandbox = required" in found["seccomp"]["cure"]) == (seccomp == "warn")


def test_a_host_process_without_seccomp_says_so(reeve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may live in a container that forbids what this shell may."""
    plain = FakeToolstack.host_info

    def without(self: FakeToolstack) -> HostInfo:
        return dataclasses.replace(plain(self), detail=(("seccomp", "no"),))

    monkeypatch.setattr(FakeToolstack, "host_info", without)
    row = rows(reeve)["host_process"]
    assert row["status"] == "warn" and "without seccomp" in row["detail"] and "sandbox = required" in row["cure"]


def test_files_of_migration_are_looked_at(reeve: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As the host process was told them; a host by itself needs none."""
    assert rows(reeve)["migration"]["detail"].startswith("no certificate configured")
    authority, other = Authority(tmp_path), Authority(tmp_path, "other")
    plain = FakeToolstack.host_info
    cases: tuple[tuple[TlsFiles, str, str], ...] = (
        (authority.host("good", days=90), "ok", "is valid for"),
        (authority.host("soon", days=2), "warn", "is valid for"),
        (authority.host("expired", days=-1), "warn", "expired"),
        (dataclasses.replace(authority.host("foreign"), ca=other.ca), "warn", "is not valid"),
        (dataclasses.replace(authority.host("a"), key=authority.host("b").key), "warn", "is no such file"),
        (dataclasses.replace(authority.host("c"), key=str(tmp_path / "gone")), "warn", "cannot be read"),
        (dataclasses.replace(authority.host("d"), certificate=str(tmp_path)), "warn", "cannot be read"),
    )
    for files, status, detail in cases:
        told = "\n".join(map(str, (files.ca, files.certificate, files.key)))
        monkeypatch.setattr(
            FakeToolstack, "host_info", lambda s, t=told: dataclasses.replace(plain(s), detail=(("migration", t),))
        )
        row = rows(reeve)["migration"]
        assert row["status"] == status and detail in row["detail"], row


def test_broker_and_agent_before_and_after_the_agent_starts(reeve: Any) -> None:
    found = rows(reeve)
    assert found["broker"]["status"] == found["agent"]["status"] == "warn"
    service = Service(conf.load([reeve.options[1]]))
    service.start()
    try:
        found = rows(reeve)
    finally:
        service.close()
    assert found["broker"]["status"] == found["agent"]["status"] == "ok", found


def test_missing_makes_the_exit_code(reeve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "run_all", lambda _connection: [Finding("a", Status.OK, "d")])
    assert reeve("doctor").code == 0
    monkeypatch.setattr(checks, "run_all", lambda _connection: [Finding("a", Status.WARN, "d", "c")])
    assert reeve("doctor").code == 0
    assert reeve("doctor", "--strict").code == 1
    monkeypatch.setattr(checks, "run_all", lambda _connection: [Finding("a", Status.MISSING, "d", "c")])
    assert reeve("doctor").code == 1


class Folders:
    """A connection of which only the state folder is asked."""

    def __init__(self, state_dir: Path) -> None:
        self.state_dir = str(state_dir)


def test_the_state_folder(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    assert checks.state_dir(Folders(folder)).detail.endswith("will be made")  # type: ignore[arg-type]
    folder.mkdir(parents=True)
    folder.chmod(0o700)
    assert checks.state_dir(Folders(folder)).status is Status.OK  # type: ignore[arg-type]
    folder.chmod(0o777)
    loose = checks.state_dir(Folders(folder))  # type: ignore[arg-type]
    assert (loose.status, loose.cure) == (Status.WARN, f"chmod go-w {folder}")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_state_folder_of_somebody_else(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    assert checks.state_dir(Folders(tmp_path / "state")).status is Status.MISSING  # type: ignore[arg-type]


def test_a_tool_that_is_not_there() -> None:
    finding = checks.tool("no-such-tool", "some-package")()
    assert finding.status is Status.WARN
    assert "apt-get install some-package" in finding.cure


def test_a_failing_engine_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    import hypervisor.engines.unicorn as engine

    def broken() -> None:
        raise RuntimeError("offsets\nmoved")

    monkeypatch.setattr(engine, "selfcheck", broken)
    finding = checks.engine()
    assert (finding.status, finding.detail) == (Status.MISSING, "offsets moved")
