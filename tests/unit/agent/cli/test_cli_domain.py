"""`reeve node` and `reeve domain`, against the fake driver."""

from __future__ import annotations

import io
import json
import sys
import uuid
from pathlib import Path
from typing import Any

import pytest

from hypervisor import errors
from hypervisor.toolstack.api import DomainSpec, DomainState, KernelBoot, OnEvent


def test_node_show(reeve: Any) -> None:
    shown = reeve("node", "show", "-f", "json").json
    assert shown == json.loads(json.dumps(reeve.host.host_info().to_json()))
    assert shown["driver"] == "fake"
    assert "pv" in shown["capabilities"]
    assert "console" in reeve("node", "show").out


def test_one_number_for_a_script(reeve: Any) -> None:
    assert reeve("node", "show", "-f", "value", "-c", "memory_free_mib").out == "16384\n"


def test_create_makes_a_running_domain(reeve: Any) -> None:
    info = reeve.domain("web", "--memory", "1G", "--vcpus", "2", "--cmdline=quiet", "--on-crash", "destroy")
    assert (info.name, info.state, info.memory_mib, info.vcpus, info.owner) == (
        "web",
        DomainState.RUNNING,
        1024,
        2,
        "operator",
    )
    spec = reeve.host.get_spec(info.uuid)
    assert (spec.boot.cmdline, spec.on_crash, spec.on_reboot) == ("quiet", OnEvent.DESTROY, OnEvent.RESTART)


def test_create_can_leave_it_paused(reeve: Any) -> None:
    assert reeve.domain("web", "--paused").state is DomainState.PAUSED


def test_create_that_cannot_run_leaves_nothing(reeve: Any) -> None:
    reeve.host.inject_error("unpause", errors.HostFailure("no"))
    result = reeve("domain", "create", "web", "--kernel", reeve.kernel)
    assert (result.code, result.err) == (1, "error: host.failure: no\n")
    assert reeve.host.list_domains() == []


@pytest.mark.parametrize(
    ("options", "code"),
    [
        (["web", "--kernel", "/does/not/exist"], "kernel.invalid"),
        (["-x-", "--kernel", "KERNEL"], "cli.usage"),
        (["a b", "--kernel", "KERNEL"], "domain.spec_invalid"),
        (["web", "--kernel", "KERNEL", "--memory", "900T"], "host.insufficient_memory"),
        (["web", "--kernel", "KERNEL", "--vcpus", "99"], "domain.spec_invalid"),
        (["web", "--kernel", "KERNEL", "--vcpus", "32"], "host.insufficient_vcpus"),
        (["web", "--kernel", "KERNEL", "--uuid", "nonsense"], "domain.spec_invalid"),
        (["web", "--kernel", "KERNEL", "--ramdisk", "/does/not/exist"], "ramdisk.invalid"),
    ],
)
def test_create_refuses(reeve: Any, options: list[str], code: str) -> None:
    words = [reeve.kernel if word == "KERNEL" else word for word in options]
    result = reeve("domain", "create", *words, "-f", "json")
    assert result.error["code"] == code
    assert reeve.host.list_domains() == []


def test_create_from_a_spec_with_options_that_win(reeve: Any, tmp_path: Path) -> None:
    first = reeve.domain("web", "--metadata", "a=1")
    spec = reeve("domain", "show", "web", "--spec", "-f", "json").json
    assert DomainSpec.from_json(spec) == reeve.host.get_spec(first.uuid)
    reeve("domain", "destroy", "web")
    file = tmp_path / "spec.json"
    file.write_text(json.dumps(spec))
    again = reeve("domain", "create", "--spec", str(file), "--memory", "32", "--metadata", "b=2", "-f", "json").json
    assert (again["uuid"], again["memory_mib"], again["metadata"]) == (first.uuid, 32, {"a": "1", "b": "2"})


def test_create_from_standard_input(reeve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = {"name": "piped", "boot": {"kernel": reeve.kernel}}
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(json.dumps(spec).encode())))
    assert reeve("domain", "create", "--spec", "-", "-f", "json").json["name"] == "piped"


@pytest.mark.parametrize(
    "content", [b"", b"[1]", b"{", b'{"x": NaN}', b"[" * 100_000, b'"' + b"x" * (1 << 20) + b'"', b"\xff\xfe"]
)
def test_a_spec_file_that_is_no_object(reeve: Any, tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "spec.json"
    file.write_bytes(content)
    result = reeve("domain", "create", "web", "--spec", str(file))
    assert result.code == 2
    assert result.err.startswith(f"error: cli.usage: {file}")
    assert result.err.count("\n") == 1


@pytest.mark.parametrize(
    "spec", [{"boot": 5}, {"boot": {"kernel": "/k", "bios": 1}}, {"colour": "red"}, {"metadata": 5}]
)
def test_a_spec_with_wrong_fields(reeve: Any, tmp_path: Path, spec: dict[str, Any]) -> None:
    file = tmp_path / "spec.json"
    file.write_text(json.dumps(spec))
    result = reeve("domain", "create", "web", "--kernel", reeve.kernel, "--spec", str(file), "-f", "json")
    assert result.error["code"] == "domain.spec_invalid"


def test_list(reeve: Any) -> None:
    reeve.host.add_foreign(DomainSpec(str(uuid.uuid4()), "theirs", KernelBoot("/k"), 64))
    ours = reeve.domain("ours", "--paused")
    rows = reeve("domain", "list", "-f", "json").json
    assert [row["name"] for row in rows] == ["theirs", "ours"]
    assert rows[1] == {
        "uuid": ours.uuid,
        "name": "ours",
        "domid": ours.domid,
        "state": "paused",
        "vcpus": 1,
        "memory_mib": 256,
        "owner": "operator",
    }
    assert reeve("domain", "list", "--state", "paused", "-f", "value", "-c", "name").out == "ours\n"
    assert reeve("domain", "list", "--owner", "", "-f", "value", "-c", "name").out == "theirs\n"


def test_a_domain_is_found_by_name_and_by_uuid(reeve: Any) -> None:
    info = reeve.domain("web")
    for key in ("web", info.uuid, info.uuid.upper()):
        assert reeve("domain", "show", key, "-f", "json").json["uuid"] == info.uuid


def test_a_uuid_wins_over_a_name_that_looks_like_it(reeve: Any) -> None:
    first = reeve.domain("web")
    reeve.domain(first.uuid)
    assert reeve("domain", "show", first.uuid, "-f", "json").json["name"] == "web"


def test_the_names_there_are_are_told(reeve: Any) -> None:
    reeve.domain("web")
    assert "there are: web" in reeve("domain", "show", "wep").err


@pytest.mark.parametrize(
    ("verb", "state"),
    [("pause", "paused"), ("unpause", "running"), ("reset", "running"), ("destroy", "gone"), ("shutdown", "gone")],
)
def test_verbs_show_what_became_of_the_domain(reeve: Any, verb: str, state: str) -> None:
    info = reeve.domain("web")
    shown = reeve("domain", verb, "web", "-f", "json").json
    assert (shown["uuid"], shown["state"]) == (info.uuid, state)


def test_reboot_changes_the_domid_only(reeve: Any) -> None:
    info = reeve.domain("web")
    shown = reeve("domain", "reboot", "web", "--wait", "5", "-f", "json").json
    assert shown["uuid"] == info.uuid
    assert shown["domid"] != info.domid


@pytest.mark.parametrize("verb", ["pause", "unpause", "reset", "destroy", "shutdown", "reboot", "show", "wait"])
def test_verbs_on_nobody(reeve: Any, verb: str) -> None:
    assert reeve("domain", verb, "nobody", "-f", "json").error["code"] == "domain.not_found"


@pytest.mark.parametrize("verb", ["shutdown", "reboot"])
def test_a_guest_that_does_not_obey(reeve: Any, verb: str) -> None:
    reeve.domain("web", "--cmdline=fake.shutdown=ignore")
    assert reeve("domain", verb, "web", "-f", "json").json["state"] == "running"
    error = reeve("domain", verb, "web", "--wait", "0.05", "-f", "json").error
    assert (error["code"], error["retryable"]) == ("domain.timeout", True)


def test_a_wrong_state_is_told(reeve: Any) -> None:
    reeve.domain("web", "--cmdline=fake.boot=crash")
    assert reeve("domain", "pause", "web", "-f", "json").error["code"] == "domain.wrong_state"


def test_wait(reeve: Any) -> None:
    info = reeve.domain("web")
    assert reeve("domain", "wait", "web", "--state", "running", "-f", "json").json["state"] == "running"
    error = reeve("domain", "wait", "web", "--timeout", "0.05", "-f", "json").error
    assert error["code"] == "domain.timeout"
    reeve.host.destroy(info.uuid)
    assert reeve("domain", "wait", "web", "--state", "gone", "-f", "json").json == {"name": "web", "state": "gone"}
    assert reeve("domain", "wait", "web", "-f", "json").error["code"] == "domain.not_found"


def test_wait_for_a_crash(reeve: Any) -> None:
    reeve.domain("web", "--cmdline=fake.boot=crash")
    shown = reeve("domain", "wait", "web", "-f", "json").json
    assert (shown["state"], shown["shutdown_reason"]) == ("crashed", "crash")


def test_console_log(reeve: Any) -> None:
    info = reeve.domain("web", "--cmdline=fake.print=up")
    reeve.host.guest_print(info.uuid, b"\xff\x00tail")
    out = reeve("domain", "console-log", "web")
    assert out.code == 0
    assert "up\r\n" in out.out
    assert out.out.endswith("\ufffd\0tail")
    assert reeve("domain", "console-log", "web", "--bytes", "4").out == "tail"
