"""What the benchmarks share: numbers, the table, the one JSON object, the one line of a failure."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "bench"))

import common
from common import BenchFailed, CpuTimes, compare, count, median, positive, render, rounded

PROC_STAT = "cpu  {user} 0 {system} {idle} {iowait} 0 0 0 0 0\ncpu0 1 2 3 4 5 6 7 8 9 10\n"


@pytest.fixture
def options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> argparse.Namespace:
    monkeypatch.setattr(common, "noise", lambda: {"load_average": 0.0, "cpu_busy_percent": 0.0})
    return common.parser("A test.").parse_args(["--images-dir", str(tmp_path)])


def test_busy_is_neither_idle_nor_waiting_for_disks() -> None:
    before = CpuTimes.parse(PROC_STAT.format(user=100, system=50, idle=1000, iowait=10))
    after = CpuTimes.parse(PROC_STAT.format(user=120, system=60, idle=1050, iowait=30))
    assert before.busy_percent(after) == 30.0
    assert before.busy_percent(before) == 0.0


def test_numbers_are_rounded_to_what_can_be_believed() -> None:
    assert rounded(1306.2345) == 1306.0
    assert rounded(0.00123456) == 0.001235
    assert median([3.0, 1.0, 2.00009]) == 2.0


def test_a_ratio_above_one_means_that_reeve_is_slower() -> None:
    assert compare(6.0, 3.0) == 2.0
    with pytest.raises(BenchFailed, match="nothing to compare"):
        compare(1.0, 0.0)


@pytest.mark.parametrize("text", ["0", "-1", "nan", "1e9"])
def test_seconds_are_above_zero(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError):
        positive(text)


@pytest.mark.parametrize("text", ["0", "1001"])
def test_counts_have_bounds(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError):
        count(text)
    assert count("20") == 20


def test_a_table_lines_up() -> None:
    lines = render([["", "s"], ["long name", 1.23456], ["x", 100]]).splitlines()
    assert lines == ["           s", "long name  1.235", "x            100"]


@pytest.mark.parametrize("short", [True, False])
def test_one_json_object_on_standard_output(
    short: bool, options: argparse.Namespace, capsys: pytest.CaptureFixture[str]
) -> None:
    options.json = short
    code = common.run(
        options, "test", lambda _options, _folder: {"value": 1.5}, lambda result: [["v", result["value"]]]
    )
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    assert code == 0
    assert found["bench"] == "test" and found["value"] == 1.5
    assert found["noise"]["load_average"] == 0.0 and found["machine"]["cpus"] >= 1
    assert (printed.out.count("\n") == 1) is short
    assert ("v  1.5" in printed.err) is not short


def test_a_busy_machine_is_told_beside_the_figures(
    options: argparse.Namespace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(common, "noise", lambda: {"load_average": 2.0, "cpu_busy_percent": 55.5})
    options.json = True
    assert common.run(options, "test", lambda _options, _folder: {}, lambda _result: [["none"]]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["noise"]["cpu_busy_percent"] == 55.5
    assert printed.err.splitlines() == ["note: the machine was 55.5% busy before the benchmark: figures are too high"]


def test_a_failure_is_one_line_and_nothing_on_standard_output(
    options: argparse.Namespace, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[Path] = []

    def fail(_options: argparse.Namespace, folder: Path) -> common.Result:
        (folder / "log").write_text("x")
        seen.append(folder)
        raise BenchFailed("this broke:\nmend that")

    assert common.run(options, "test", fail, lambda _result: [["none"]]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.splitlines() == ["test: this broke: mend that"]
    assert not seen[0].exists()


def test_an_interruption_is_reported_and_cleaned_up(
    options: argparse.Namespace, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(_options: argparse.Namespace, _folder: Path) -> common.Result:
        raise KeyboardInterrupt

    assert common.run(options, "test", interrupt, lambda _result: [["none"]]) == 130
    assert capsys.readouterr().err.splitlines() == ["test: interrupted"]


def test_without_qemu_nothing_is_measured(
    options: argparse.Namespace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(common, "QEMU", "qemu-system-none")
    import boot

    assert common.run(options, "boot", boot.measure, boot.table) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and "qemu-system-none is not installed" in lines[0] and "apt-get install" in lines[0]
