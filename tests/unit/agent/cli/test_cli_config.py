from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from agent import conf
from agent.cli import config
from agent.cli.config import check, check_environment, check_file, options_of
from agent.cli.main import main


@pytest.fixture(autouse=True)
def nothing_else(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(conf, "SYSTEM_CONFIG", tmp_path / "none.conf")
    monkeypatch.setattr(config, "HYPERVISOR_CONFIG", tmp_path / "none2.conf")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "xdg"))


def found(tmp_path: Path, text: str, daemon: str = "agent") -> list[tuple[str, str, str]]:
    path = tmp_path / "agent.conf"
    path.write_bytes(text.encode("latin-1"))
    problems = check_file(path, options_of(daemon))
    return [(item.where.removeprefix(str(path)), item.what, item.cure) for item in problems]


@pytest.mark.parametrize(
    ("text", "where", "what", "cure"),
    [
        ("[agnet]\nhost = a\n", ":1", "there is no group [agnet]", "did you mean agent?"),
        ("[agent]\n\nworkes = 3\n", ":3", "there is no option workes of [agent]", "did you mean workers?"),
        ("[agent]\nzzz = 3\n", ":2", "there is no option zzz of [agent]", "remove it"),
        ("[agent]\nworkers = many\n", ":2", "[agent] workers", "at least 1 and at most 256"),
        ("[agent]\nworkers = 999\n", ":2", "[agent] workers", "at least 1 and at most 256"),
        ("[log]\nlevel = loud\n", ":2", "[log] level", "give one of debug, info"),
        ("[agent]\nworkers\n", ":2", "there is no value", "give a value"),
        ("host = a\n", ":1", "this is no line", "below a [group]"),
        ("[agent]\nhost = \xe9\n", "", "it is not UTF-8", "save it"),
    ],
)
def test_what_is_wrong_in_a_file(tmp_path: Path, text: str, where: str, what: str, cure: str) -> None:
    ((at, said, advice),) = found(tmp_path, text)
    assert at == where and what in said and cure in advice


def test_the_samples_and_what_is_right(tmp_path: Path) -> None:
    assert found(tmp_path, "[agent]\nhost = node1\ndrain-seconds = 3\n[driver]\nsettings = a:b,c:d\n") == []
    networks = "[DEFAULT]\n" if "DEFAULT" in options_of("hypervisor") else "[hypervisor]\n"
    assert "networks" in options_of("hypervisor")[networks[1:-2]]
    assert found(tmp_path, networks + "networks = default user\nnetworks = lan internal\n", "hypervisor") == []
    ((_, what, _),) = found(tmp_path, networks + "memory_share = 900\n", "hypervisor")
    assert "memory_share" in what


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    (problem,) = check([tmp_path / "missing.conf"], [], {})
    assert problem.severity == "error" and "missing.conf" in problem.where


def test_the_environment() -> None:
    environ = {
        "OS_AGENT__WORKERS": "many", "OS_LOG__LEVLE": "info", "OS_LOG__LEVEL": "debug", "OS_OTHER__THING": "1",
        "OS_PASSWORD": "x", "OS_RESOURCES__VCPU_RATIO": "2.5",
    }  # fmt: skip
    problems = list(check_environment(environ, options_of("agent")))
    assert [(item.where, item.cure) for item in problems] == [
        ("environment OS_AGENT__WORKERS", "give a value of type Integer(min=1, max=256), at least 1 and at most 256"),
        ("environment OS_LOG__LEVLE", "did you mean level?"),
    ]


def test_what_the_values_name(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    path = tmp_path / "agent.conf"
    path.write_text(
        f"[agent]\nstate_dir = {tmp_path}/file/x\nallowed_verbs = list,frobnicate\n[broker]\nurl = http://u:pw@h/\n"
        f"[driver]\nname = vmware\n[images]\ngrub_i386 = {tmp_path}/none\n[log]\nfile = {tmp_path}/no/log\n"
    )
    problems = {item.where: item for item in check([path], [], {})}
    assert "is no folder" in problems["[agent] state_dir"].what
    assert "frobnicate" in problems["[agent] allowed_verbs"].what
    assert "pw" not in str(problems["[broker] url"]) and problems["[broker] url"].cure.startswith("give amqp")
    assert "'vmware'" in problems["[driver] name"].what and "embedded" in problems["[driver] name"].cure
    assert problems["[images] grub_i386"].severity == "warning"
    assert problems["[log] file"].severity == "error"
    assert not (tmp_path / "no").exists(), "it makes nothing"


def test_what_only_shows_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "agent.conf"
    path.write_text("[oslo]\ntopic = reeve\n")
    (problem,) = check([path], [], {})
    assert problem.where == "the configuration as a whole" and "give another" in problem.cure


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, Any]:
    code = main(argv)
    return code, json.loads(capsys.readouterr().out)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "agent.conf"
    path.write_text(f"[agent]\nstate_dir = {tmp_path}/state\n[images]\ngrub_i386 = {path}\ngrub_x86_64 = {path}\n")
    file = ("--config-file", str(path))
    code, said = run(capsys, *file, "config", "check", "-f", "json")
    assert code == 0 and [item["where"] for item in said] == ["[images] dir"]
    assert run(capsys, *file, "config", "check", "--strict", "-f", "json")[0] == 1
    monkeypatch.setenv("OS_AGENT__WORKERS", "many")
    code, said = run(capsys, *file, "config", "check", "-f", "json")
    assert code == 1 and said[0]["where"] == "environment OS_AGENT__WORKERS"


def test_show(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "agent.conf"
    path.write_text("[broker]\nurl = amqp://u:s3cret@h/\n")
    monkeypatch.setenv("OS_LOG__LEVEL", "debug")
    code, said = run(capsys, "--config-file", str(path), "config", "show", "-f", "json")
    rows = {(row["group"], row["option"]): row for row in said}
    assert code == 0 and "s3cret" not in str(said) and rows["broker", "url"]["value"] == "***"
    assert rows["log", "level"] == {"group": "log", "option": "level", "value": "debug", "changes_on_sighup": True}
    assert len(rows) == sum(len(options) for options in conf.GROUPS.values())
