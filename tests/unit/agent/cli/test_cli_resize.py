"""`reeve domain resize`, `sysrq`, `dump-core`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from agent.cli import resize
from hypervisor import errors
from hypervisor.toolstack.api import DomainSpec, KernelBoot

MIB = 1 << 20
UUID = "12345678-1234-4234-8234-1234567890ab"


@pytest.fixture
def web(reeve: Any) -> Any:
    (reeve.folder / "disk").write_bytes(bytes(MIB))
    words = ("--memory", "256M", "--max-memory", "768M", "--max-vcpus", "4", "--disk", f"xvda={reeve.folder / 'disk'}")
    return reeve.domain("web", *words)


def test_up_and_down(reeve: Any, web: Any) -> None:
    words = ("--vcpus", "4", "--memory", "768M", "--disk", "xvda=2M", "--weight", "512", "--cap", "150")
    shown = reeve("domain", "resize", "web", *words, "-f", "json").json
    assert (shown["vcpus"], shown["memory_mib"], shown["mode"], shown["disks"]) == (4, 768, "live", {"xvda": 2 * MIB})
    spec = reeve.host.get_spec(web.uuid)
    assert (spec.weight, spec.cap) == (512, 150)
    shown = reeve("domain", "resize", "web", "--vcpus", "1", "--memory", "256", "-f", "json").json
    assert (shown["vcpus"], shown["memory_mib"], shown["domid"]) == (1, 256, web.domid)
    assert "768" in reeve("domain", "resize", "web", "--memory", "768M").out


def test_by_a_restart_and_back(reeve: Any, web: Any) -> None:
    words = ("domain", "resize", "web")
    assert reeve(*words, "--vcpus", "8", "-f", "json").error["code"] == "domain.spec_invalid"
    shown = reeve(*words, "--vcpus", "8", "--mode", "auto", "-f", "json").json
    assert (shown["vcpus"], shown["mode"], shown["pending"]["old"]["vcpus"]) == (8, "cold", 1)
    assert shown["domid"] != web.domid
    assert reeve(*words, "--vcpus", "2", "-f", "json").error["code"] == "resize.pending"
    assert reeve(*words, "--revert", "-f", "json").json["vcpus"] == 1
    assert reeve(*words, "--confirm", "-f", "json").error["code"] == "resize.none_pending"
    reeve(*words, "--vcpus", "8", "--mode", "cold")
    assert reeve(*words, "--confirm", "-f", "json").json["vcpus"] == 8
    assert reeve(*words, "--vcpus", "1", "--mode", "cold", "--no-confirm", "-f", "json").json["pending"] is None


@pytest.mark.parametrize(
    "line",
    ["", "--vcpus 2 --confirm", "--confirm --revert", "--disk xvda", "--disk xvda=huge", "--disk xvda=0",
     "--disk xvda=2M --disk xvda=3M", "--memory none", "--mode warm --vcpus 1"],
)  # fmt: skip
def test_wrong_command_lines(reeve: Any, web: Any, line: str) -> None:
    result = reeve("domain", "resize", "web", *line.split())
    assert (result.code, result.err.count("\n")) == (2, 1) and result.err.startswith("error: cli.usage: ")


@pytest.mark.parametrize(
    ("line", "code"),
    [
        ("--vcpus 0", "instruction.bad_args"),
        ("--vcpus 99", "instruction.bad_args"),
        ("--memory 10M", "domain.memory_too_small"),
        ("--memory 900M", "domain.spec_invalid"),
        ("--disk xvda=512K", "domain.spec_invalid"),
        ("--disk xvdz=2M", "instruction.bad_args"),
        ("--disk xvdb=2M", "device.not_found"),
        ("--memory 900G --mode cold", "host.insufficient_memory"),
    ],
)
def test_refusals_change_nothing(reeve: Any, web: Any, line: str, code: str) -> None:
    before = reeve.host.get_spec(web.uuid)
    assert reeve("domain", "resize", "web", *line.split(), "-f", "json").error["code"] == code
    after = reeve.host.get_domain(web.uuid)
    assert reeve.host.get_spec(web.uuid) == before and (after.vcpus, after.memory_mib) == (1, 256)


def test_a_failure_is_taken_back(reeve: Any, web: Any) -> None:
    reeve.host.inject_error("resize_disk", errors.HostFailure("no space"))
    before = reeve.host.get_spec(web.uuid)
    words = ("--vcpus", "4", "--memory", "768M", "--disk", "xvda=2M", "-f", "json")
    assert reeve("domain", "resize", "web", *words).error["message"] == "no space"
    assert reeve.host.get_spec(web.uuid) == before and reeve.host.get_domain(web.uuid).memory_mib == 256
    reeve.host.inject_error("resize_disk", errors.HostFailure("no word"), when="after")
    message = reeve("domain", "resize", "web", *words).error["message"]
    assert message.startswith("no word; step disks not undone: disks xvda have grown")


def test_a_guest_that_does_not_follow(reeve: Any) -> None:
    reeve.domain("slow", "--cmdline=fake.vcpus=ignore", "--max-vcpus", "4")
    words = ("domain", "resize", "slow", "--vcpus", "4", "--wait", "0.05", "-f", "json")
    error = reeve(*words).error
    assert (error["code"], error["retryable"]) == ("domain.timeout", True)


def test_a_foreign_domain(reeve: Any) -> None:
    reeve.host.add_foreign(DomainSpec(UUID, "theirs", KernelBoot("/k"), 64, max_vcpus=4))
    assert reeve("domain", "resize", "theirs", "--vcpus", "2", "-f", "json").error["code"] == "domain.not_ours"


def test_the_bar_is_fed(monkeypatch: pytest.MonkeyPatch, reeve: Any, web: Any) -> None:
    told: list[tuple[str, dict[str, Any]]] = []

    class Spy:
        def __enter__(self) -> Any:
            return lambda step, data: told.append((step.name, data))

        def __exit__(self, *_exc: object) -> None: ...

    monkeypatch.setattr(resize, "progress_bar", Spy)
    reeve("domain", "resize", "web", "--memory", "768M", "--vcpus", "2")
    assert [name for name, data in told if not data] == ["claim", "vcpus", "memory"]
    assert ("memory", {"done": 512, "total": 512, "unit": "MiB"}) in told


def test_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch, reeve: Any, web: Any, capsys: Any) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    assert reeve("domain", "resize", "web", "--memory", "768M", "-f", "json").json["memory_mib"] == 768


def test_sysrq(reeve: Any) -> None:
    info = reeve.domain()
    assert reeve("domain", "sysrq", "web", "t", "-f", "json").json == {"uuid": info.uuid, "name": "web", "key": "t"}
    assert b"sysrq: t" in reeve.host.console_log(info.uuid)
    assert reeve("domain", "sysrq", "web", "too", "-f", "json").error["code"] == "domain.spec_invalid"


def test_dump_core(reeve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(reeve.folder)
    info = reeve.domain()
    made = reeve("domain", "dump-core", "web", "web.core", "-f", "json").json
    core = Path(made["path"])
    assert core == reeve.folder / "web.core" and made["bytes"] == core.stat().st_size
    assert json.loads(core.read_text())["fake core of"] == info.uuid
    assert reeve("domain", "dump-core", "web", "web.core", "-f", "json").error["code"] == "domain.spec_invalid"
