from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from agent import conf
from agent.errors import ConfigError

SAMPLE = Path(__file__).resolve().parents[3] / "etc" / "reeve" / "agent.conf.sample"


def write(path: Path, text: str) -> list[str]:
    path.write_text(text)
    return [str(path)]


def test_every_option_has_help() -> None:
    for group, options in conf.list_opts():
        for option in options:
            assert option.help and option.help.endswith("."), f"[{group}] {option.dest}"


def test_the_sample_is_what_the_options_say(tmp_path: Path) -> None:
    made = tmp_path / "sample"
    subprocess.run(
        [sys.executable, "-m", "oslo_config.generator", "--namespace", "reeve.agent", "--output-file", str(made)],
        check=True,
        timeout=60,
    )
    assert made.read_text() == SAMPLE.read_text(), (
        "run: oslo-config-generator --namespace reeve.agent --output-file etc/reeve/agent.conf.sample"
    )


def test_the_sample_names_every_option() -> None:
    text = SAMPLE.read_text()
    for group, options in conf.list_opts():
        section = re.search(rf"^\[{group}\]$(.*?)(?=^\[|\Z)", text, re.M | re.S)
        assert section is not None, group
        for option in options:
            assert re.search(rf"^#{option.dest} =", section[1], re.M), option.dest


def test_defaults_of_an_empty_configuration(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    settings = conf.load([])
    assert settings.state_dir == tmp_path / "reeve"
    assert settings.journal_path == tmp_path / "reeve" / "agent" / "journal.sqlite"
    assert settings.broker_url == f"filesystem://{tmp_path}/reeve/broker"
    assert settings.image_dir == tmp_path / "reeve" / "images"
    assert settings.driver == "embedded" and settings.driver_settings == {}
    assert settings.host


def test_defaults_for_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    settings = conf.load([])
    assert settings.state_dir == Path("/var/lib/reeve")
    assert settings.broker_url == "filesystem:///var/lib/reeve/broker"


def test_file_environment_and_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = write(
        tmp_path / "a.conf",
        "[agent]\nhost = node7\nworkers = 3\nstate_dir = /tmp/x\n[driver]\nname = fake\nsocket = /run/s\n"
        "settings = cpus:4,state_dir:/tmp/y\n[broker]\nurl = amqp://u:p@h/\n",
    )
    settings = conf.load(files)
    assert (settings.host, settings.workers, settings.driver) == ("node7", 3, "fake")
    assert settings.driver_settings == {"cpus": "4", "state_dir": "/tmp/y", "socket": "/run/s"}
    assert settings.broker_url == "amqp://u:p@h/"
    monkeypatch.setenv("OS_AGENT__WORKERS", "5")
    assert conf.load(files).workers == 5
    settings = conf.load(files, ["--agent-host", "node8"])
    assert (settings.host, settings.driver) == ("node8", "fake")


def test_configuration_files_of_a_user(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.setattr(conf, "SYSTEM_CONFIG", tmp_path / "system.conf")
    assert conf.config_files() == []
    (tmp_path / "reeve").mkdir()
    write(tmp_path / "reeve" / "agent.conf", "[agent]\nhost = mine\n")
    write(tmp_path / "system.conf", "[agent]\nhost = theirs\nworkers = 9\n")
    settings = conf.load()
    assert (settings.host, settings.workers) == ("mine", 9)


@pytest.mark.parametrize(
    "text",
    [
        "[agent]\nworkers = many\n",
        "[agent]\nworkers = 0\n",
        "[agent]\nhost = a b\n",
        "[agent]\nhost = ../x\n",
        "[log]\nlevel = loud\n",
        "no section\n",
    ],
)
def test_bad_values_are_one_clear_line(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        conf.load(write(tmp_path / "bad.conf", text))
    assert "\n" not in caught.value.message and caught.value.code == "agent.config"
    with pytest.raises(ConfigError):
        conf.load([str(tmp_path / "bad.conf")], ["--driver-name", "fake"])


def test_a_missing_file_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.conf"):
        conf.load([str(tmp_path / "nowhere.conf")])


def test_a_bad_command_line_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match="workers"):
        conf.load([], ["--agent-workers", "0"])
    with pytest.raises(SystemExit) as caught:
        conf.load([], ["--no-such-option"])
    assert caught.value.code == 2 and "--no-such-option" in capsys.readouterr().err


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        conf.load([], ["--help"], description="What it does.", epilog="examples: one")
    text = capsys.readouterr().out
    assert caught.value.code == 0 and "What it does." in text and "examples: one" in text
    assert "--broker-url" in text and "--agent-state-dir" in text


def test_oslo_names_that_cannot_be(tmp_path: Path) -> None:
    for option, text in (("topic", "a topic"), ("exchange", "x/y"), ("topic", "reeve")):
        with pytest.raises(ConfigError, match=rf"\[oslo\] {option}"):
            conf.load(write(tmp_path / "agent.conf", f"[oslo]\n{option} = {text}\n"))
    given = conf.load(write(tmp_path / "agent.conf", "[oslo]\nnamespaces = a,b\nqueues = quorum\n")).oslo
    assert (given.namespaces, given.queues, given.enabled) == (("a", "b"), "quorum", True)
