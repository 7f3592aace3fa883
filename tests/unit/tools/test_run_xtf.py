"""The XTF runner: what it finds in a tree, and which verdict it gives for what a test did."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import cast

import pytest

from hypervisor.errors import DomainNotFound, KernelNotXen, OperationTimeout
from hypervisor.toolstack.api import Capability, DomainInfo, DomainSpec, DomainState, ShutdownReason, Toolstack

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "tools"))

import run_xtf
from run_xtf import XtfTest, discover, parse_config, run_all, run_test

CONFIG = """name="test-{env}-{name}{variation}"

vcpus=2

type="pv"
loader="generic" # Legacy for before Xen 4.10

memory=64
kernel="/somewhere/else/tests/{name}/test-{env}-{name}"
"""


class ScriptedToolstack:
    """The verbs that the runner uses, with a guest that does what it is told here."""

    name = "scripted"

    def __init__(self, log: bytes = b"", state: DomainState = DomainState.SHUTDOWN) -> None:
        self.log = log
        self.state = state
        self.error: Exception | None = None
        self.calls: list[str] = []
        self.specs: list[DomainSpec] = []

    def capabilities(self) -> frozenset[Capability]:
        return frozenset({Capability.PV})

    def create(self, spec: DomainSpec) -> None:
        spec.validate()
        if self.error:
            raise self.error
        self.specs.append(spec)
        self.calls.append("create")

    def unpause(self, uuid: str) -> None:
        self.calls.append("unpause")

    def wait(self, uuid: str, states: frozenset[DomainState], timeout: float) -> DomainInfo:
        self.calls.append("wait")
        if self.state not in states:
            raise OperationTimeout("still running")
        reason = ShutdownReason.CRASH if self.state is DomainState.CRASHED else ShutdownReason.POWEROFF
        return DomainInfo(uuid, "x", 1, self.state, 1, 64, shutdown_reason=reason)

    def console_log(self, uuid: str, max_bytes: int) -> bytes:
        if not self.specs:
            raise DomainNotFound("no such domain")
        return self.log

    def destroy(self, uuid: str) -> None:
        self.calls.append("destroy")


def verdict(toolstack: ScriptedToolstack, test: XtfTest | None = None) -> str:
    return run_test(cast(Toolstack, toolstack), test or XtfTest("pv64", "example", "/k")).verdict


def add_test(folder: Path, name: str, envs: list[str], variations: list[str] | None = None) -> None:
    place = folder / "tests" / name
    place.mkdir(parents=True)
    info = {"name": name, "category": "functional", "environments": envs, "variations": variations or []}
    (place / "info.json").write_text(json.dumps(info))
    for env in envs:
        (place / f"test-{env}-{name}").write_bytes(b"\x7fELF")
        for variation in variations or [""]:
            suffix = f"~{variation}" if variation else ""
            text = CONFIG.format(env=env, name=name, variation=suffix)
            if variation:
                text += f'\n# Test Variation Configuration:\ncmdline="{variation} mode"\n'
            (place / f"test-{env}-{name}{suffix}.cfg").write_text(text)


def test_discovers_environments_and_variations(tmp_path: Path) -> None:
    add_test(tmp_path, "example", ["pv64", "hvm64", "pv32pae"])
    add_test(tmp_path, "pv-iopl", ["pv64"], ["hypercall", "vmassist"])
    found = discover(tmp_path)
    assert [test.full_name for test in found] == [
        "test-pv64-example",
        "test-pv32pae-example",
        "test-pv64-pv-iopl~hypercall",
        "test-pv64-pv-iopl~vmassist",
    ]
    assert found[0].kernel == str(tmp_path / "tests/example/test-pv64-example")
    assert (found[0].memory_mib, found[0].vcpus, found[0].cmdline) == (64, 2, "")
    assert found[3].cmdline == "vmassist mode"
    assert found[3].kernel.endswith("test-pv64-pv-iopl")


def test_selects_by_environment_and_expression(tmp_path: Path) -> None:
    add_test(tmp_path, "example", ["pv64", "pv32pae"])
    add_test(tmp_path, "selftest", ["pv64", "pv32pae"])
    assert [test.full_name for test in discover(tmp_path, ["pv32pae"], "self")] == ["test-pv32pae-selftest"]


def test_a_folder_that_is_no_tree_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_xtf.main([str(tmp_path)]) == 2
    assert "give the root of a built XTF tree" in capsys.readouterr().err


def test_an_unbuilt_test_is_an_error(tmp_path: Path) -> None:
    add_test(tmp_path, "example", ["pv64"])
    (tmp_path / "tests/example/test-pv64-example").unlink()
    (test,) = discover(tmp_path)
    result = run_test(cast(Toolstack, ScriptedToolstack()), test)
    assert result.verdict == "ERROR"
    assert "build the tree with make" in result.detail


def test_configuration_lines_are_read_as_literals() -> None:
    assert parse_config('memory=64\n# c = 1\nkernel = "a=b" # end\nvif = [ oops\n') == {"memory": 64, "kernel": "a=b"}


@pytest.mark.parametrize("word", ["SUCCESS", "SKIP", "ERROR", "FAILURE"])
def test_the_verdict_is_the_tests_own(word: str) -> None:
    log = b"--- Xen Test Framework ---\r\nEnvironment: PV 64bit\r\nTest result: " + word.encode() + b"\r\n"
    toolstack = ScriptedToolstack(log)
    assert verdict(toolstack) == word
    assert toolstack.calls == ["create", "unpause", "wait", "destroy"]


def test_an_end_without_a_verdict_is_a_crash() -> None:
    assert verdict(ScriptedToolstack(b"Test result: soon\n", DomainState.CRASHED)) == "CRASH"
    assert verdict(ScriptedToolstack(b"")) == "CRASH"


def test_one_that_does_not_end_is_a_timeout_and_is_destroyed() -> None:
    toolstack = ScriptedToolstack(b"Test result: SUCCESS\n", DomainState.RUNNING)
    assert verdict(toolstack) == "TIMEOUT"
    assert toolstack.calls[-1] == "destroy"


def test_a_toolstack_error_is_an_error_with_its_code() -> None:
    toolstack = ScriptedToolstack()
    toolstack.error = KernelNotXen("no notes")
    result = run_test(cast(Toolstack, toolstack), XtfTest("pv64", "example", "/k"))
    assert (result.verdict, result.detail) == ("ERROR", "kernel.no_xen_notes: no notes")


def test_an_environment_the_driver_lacks_is_skipped() -> None:
    toolstack = ScriptedToolstack()
    assert verdict(toolstack, XtfTest("pv32pae", "example", "/k")) == "SKIP"
    assert toolstack.calls == []


def test_a_domain_is_kept_after_its_end_and_has_a_good_name() -> None:
    toolstack = ScriptedToolstack(b"Test result: SUCCESS\n")
    long = XtfTest("pv64", "livepatch-priv-check-and-more-and-more-and-more~hypercall", "/k", "mode", 32)
    assert verdict(toolstack, long) == "SUCCESS"
    (spec,) = toolstack.specs
    assert (spec.on_poweroff, spec.on_crash, spec.memory_mib) == ("preserve", "preserve", 32)
    assert "~" not in spec.name


def test_results_come_in_the_order_of_the_tests() -> None:
    tests = [XtfTest("pv64", f"t{number}", "/k") for number in range(5)]
    results = run_all(cast(Toolstack, ScriptedToolstack(b"Test result: SKIP\n")), tests, 1.0, jobs=3)
    assert [result.test for result in results] == ["t0", "t1", "t2", "t3", "t4"]
