"""The command line as such: errors, exit codes, help, formats."""

from __future__ import annotations

import json
import re
import shlex
from typing import Any

import pytest

from agent.cli.main import COMMANDS, ReeveApp, main
from hypervisor import errors


def test_no_command_is_a_usage_error(reeve: Any) -> None:
    result = reeve()
    assert result.code == 2
    assert result.err == "error: cli.usage: no command given (`reeve --help` lists them)\n"


@pytest.mark.parametrize(
    ("line", "hint"),
    [
        ("domain", "domain console, domain console-log, domain create"),
        ("domain lst", "domain list"),
        ("doctr", "doctor"),
        ("xyzzy", "`reeve --help` lists the commands"),
    ],
)
def test_an_unknown_command_is_a_usage_error_with_a_hint(reeve: Any, line: str, hint: str) -> None:
    result = reeve(*line.split())
    assert (result.code, result.out) == (2, "")
    assert hint in result.err
    assert result.err.count("\n") == 1


@pytest.mark.parametrize(
    "line",
    [
        "domain show",
        "domain show a b",
        "domain list --state asleep",
        "domain list --nonsense",
        "domain list -f xml",
        "domain wait web --timeout soon",
        "domain wait web --timeout -1",
        "domain create web --memory lots --kernel k",
        "domain create web --kernel k --metadata novalue",
        "domain create",
        "domain create web",
        "domain create web --spec /does/not/exist",
        "instruct",
        "instruct list --arg novalue",
        "instruct list --json /does/not/exist",
    ],
)
def test_a_wrong_command_line_is_one_line_and_exit_code_2(reeve: Any, line: str) -> None:
    result = reeve(*shlex.split(line))
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith("error: cli.usage: ")
    assert result.err.count("\n") == 1


def test_a_failure_is_one_line_and_exit_code_1(reeve: Any) -> None:
    result = reeve("domain", "show", "nobody")
    assert (result.code, result.out) == (1, "")
    assert result.err == "error: domain.not_found: no domain has the name or UUID 'nobody': there are none\n"


@pytest.mark.parametrize("option", [["-f", "json"], ["-fjson"], ["--format", "json"], ["--format=json"]])
def test_a_failure_in_json(reeve: Any, option: list[str]) -> None:
    result = reeve("domain", "show", "nobody", *option)
    assert result.code == 1
    assert result.out == ""
    assert result.error["code"] == "domain.not_found"
    assert result.error["retryable"] is False


def test_a_usage_error_in_json(reeve: Any) -> None:
    result = reeve("domain", "show", "-f", "json")
    assert (result.code, result.error["code"]) == (2, "cli.usage")


def test_retryable_is_told(reeve: Any) -> None:
    reeve.host.inject_error("list_domains", errors.HostUnavailable("away\nfor now"))
    result = reeve("domain", "list", "-f", "json")
    assert result.error == {"code": "host.unavailable", "message": "away for now", "retryable": True}


def test_an_error_nobody_foresaw_is_one_line_too(reeve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def explode(self: object, _args: object) -> object:
        raise RuntimeError("two\nlines")

    monkeypatch.setattr(COMMANDS["node show"], "take_action", explode)
    result = reeve("node", "show")
    assert (result.code, result.err) == (1, "error: cli.failed: two lines\n")


def test_debug_shows_where(reeve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def explode(self: object, _args: object) -> object:
        raise RuntimeError("oops")

    monkeypatch.setattr(COMMANDS["node show"], "take_action", explode)
    result = reeve("--debug", "node", "show")
    assert "Traceback" in result.err
    assert "error: cli.failed: oops\n" in result.err


@pytest.mark.parametrize(
    ("raised", "code"), [(KeyboardInterrupt(), 130), (BrokenPipeError(), 141)], ids=["Ctrl-C", "closed pipe"]
)
def test_interruptions_are_quiet(reeve: Any, monkeypatch: pytest.MonkeyPatch, raised: BaseException, code: int) -> None:
    def interrupted(self: object, _args: object) -> object:
        raise raised

    monkeypatch.setattr(COMMANDS["node show"], "take_action", interrupted)
    result = reeve("node", "show")
    assert (result.code, result.err) == (code, "")


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("reeve ")


def test_help_lists_every_command(reeve: Any) -> None:
    result = reeve("--help")
    assert result.code == 0
    for name in COMMANDS:
        assert f"  {name} " in result.out


@pytest.mark.parametrize("name", COMMANDS)
def test_help_teaches_by_examples_that_parse(reeve: Any, name: str) -> None:
    result = reeve(*name.split(), "--help")
    assert result.code == 0
    lines = [line for line, _ in COMMANDS[name].examples]
    assert lines
    app = ReeveApp()
    app.options, _ = app.parser.parse_known_args([])
    for line in lines:
        assert line in result.out
        part = next(part for part in re.split(r"[|&]+", line) if part.strip().startswith(f"reeve {name}"))
        mine = shlex.split(part)[1:]
        factory, found, rest = app.command_manager.find_command(app.parser.parse_known_args(mine)[1])
        assert found == name
        factory(app, app.options, cmd_name=found).get_parser("reeve").parse_args(rest)


@pytest.mark.parametrize("form", ["table", "json", "yaml", "value", "shell"])
def test_every_format_works(reeve: Any, form: str) -> None:
    result = reeve("node", "show", "-f", form)
    assert result.code == 0
    assert "fake" in result.out


def test_options_may_stand_before_and_after_the_command(reeve: Any, tmp_path: Any) -> None:
    other = f"state_dir={tmp_path / 'other'}"
    reeve.domain()
    assert reeve("domain", "list", "--driver", "fake", "--driver-setting", other, "-f", "json").json == []
    assert reeve("--driver", "fake", "--driver-setting", other, "domain", "list", "-f", "json").json == []
    assert len(reeve("domain", "list", "-f", "json").json) == 1


@pytest.mark.parametrize(
    ("options", "code"),
    [
        (["--driver", "vmware"], "driver.unsupported"),
        (["--driver", "fake", "--socket", "/x"], "domain.spec_invalid"),
        (["--driver-setting", "x"], "agent.config"),
        (["--config-file", "/does/not/exist"], "agent.config"),
    ],
)
def test_a_host_that_cannot_be_reached(reeve: Any, options: list[str], code: str) -> None:
    result = reeve("node", "show", "-f", "json", *options)
    assert result.error["code"] == code


def test_json_for_a_program_has_raw_values(reeve: Any) -> None:
    info = reeve.domain("web", "--metadata", "project=p1")
    shown = reeve("domain", "show", "web", "-f", "json").json
    assert shown == json.loads(json.dumps(info.to_json()))
    table = reeve("domain", "show", "web").out
    assert "project: p1" in table
    assert str(info.created_at) not in table
