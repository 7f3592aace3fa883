"""A distribution of somebody else, installed by pip: the template of docs/plugins.md, with broken ones beside it."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from agent import conf
from agent.api import API_VERSION, Context
from agent.cli.main import main
from agent.rpc.client import Client
from agent.service import Service
from hypervisor.toolstack.drivers.fake import FakeToolstack

TEMPLATE = Path(__file__).resolve().parents[2] / "docs" / "plugins.md"
NEWER = f"""
from agent.api import Plan, Plugin


class Newer(Plugin):
    verb = "newer"
    api_version = ({API_VERSION[0]}, {API_VERSION[1] + 1})
    args_schema = {{"type": "object"}}

    def plan(self, args, host):
        return Plan(())


class Raises(Newer):
    verb = "raises"

    def __init__(self):
        raise SystemExit("made in another way")


class Thief(Newer):
    verb = "create"
    api_version = (1, 0)


class Command:
    pass
"""


def wheel(folder: Path, name: str, modules: Mapping[str, str], points: Mapping[str, Mapping[str, str]]) -> Path:
    """A wheel as a build backend leaves it; none is needed here, so none has to be installed."""
    info = f"{name.replace('-', '_')}-1.0.dist-info"
    entry_points = "".join(
        f"[{group}]\n" + "".join(f"{key} = {value}\n" for key, value in found.items())
        for group, found in points.items()
    )
    files = {f"{module}.py": text for module, text in modules.items()} | {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/entry_points.txt": entry_points,
    }
    record = ""
    for file, text in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()
        record += f"{file},sha256={digest},{len(text.encode())}\n"
    path = folder / f"{name.replace('-', '_')}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as made:
        for file, text in {**files, f"{info}/RECORD": f"{record}{info}/RECORD,,\n"}.items():
            made.writestr(file, text)
    return path


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder into which pip has put the template and one with nothing but faults."""
    folder = tmp_path_factory.mktemp("plugins")
    blocks = dict(re.findall(r"```(toml|python)\n(.*?)```", TEMPLATE.read_text(), re.S))
    project = tomllib.loads(blocks["toml"])
    (module,) = project["tool"]["setuptools"]["py-modules"]
    good = wheel(folder, project["project"]["name"], {module: blocks["python"]}, project["project"]["entry-points"])
    bad = wheel(
        folder,
        "reeve-broken",
        {"reeve_newer": NEWER, "reeve_exits": "raise SystemExit(3)\n", "reeve_fails": "assert False, 'not here'\n"},
        {
            "reeve.instructions": {
                "newer": "reeve_newer:Newer",
                "raises": "reeve_newer:Raises",
                "exits": "reeve_exits:Plugin",
                "fails": "reeve_fails:Plugin",
                "create": "reeve_newer:Thief",
            },
            "reeve.commands": {
                "exits": "reeve_exits:Command",
                "wrong": "reeve_newer:Command",
                "domain_list": "reeve_annotate:DomainAnnotate",
            },
        },
    )
    target = folder / "site"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile"]
    environ = {key: value for key, value in os.environ.items() if not key.startswith("PIP_")}
    pip = [*command, "--disable-pip-version-check", "--target", str(target), str(good), str(bad)]
    done = subprocess.run(pip, capture_output=True, text=True, timeout=120, env=environ, check=False)
    assert done.returncode == 0, done.stderr
    return str(target)


@pytest.fixture
def config(installed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (tmp_path / "notes").mkdir()
    file = tmp_path / "agent.conf"
    file.write_text(
        f"[agent]\nhost = node1\nstate_dir = {tmp_path}/state\n[broker]\nurl = filesystem://{tmp_path}/broker\n"
        f"[driver]\nname = fake\nsettings = state_dir:{tmp_path}/host\n"
        f"[plugin_annotate]\nfolder = {tmp_path}/notes\nmax_length = 20\n"
    )
    monkeypatch.syspath_prepend(installed)
    yield file
    for name in [
        name for name, module in sys.modules.items() if str(module.__dict__.get("__file__")).startswith(installed)
    ]:
        del sys.modules[name]


@pytest.fixture
def service(config: Path, tmp_path: Path) -> Iterator[Service]:
    made = Service(conf.load([str(config)]), FakeToolstack(str(tmp_path / "host")))
    made.start()
    yield made
    made.close()


def new_domain(service: Service, tmp_path: Path) -> str:
    kernel = tmp_path / "vmlinuz"
    kernel.write_bytes(b"\x7fELF" + bytes(1000))
    with Client(service.settings.broker_url, "node1") as client:
        reply = client.call("create", {"name": "web", "memory_mib": 64, "kernel": str(kernel)}, timeout=20)
    assert reply.ok, reply.error
    return str((reply.result or {})["domain"]["uuid"])


def test_verb_option_and_command_of_the_template(
    service: Service, config: Path, tmp_path: Path, installed: str
) -> None:
    """The command in a process of its own, as an operator has it."""
    uuid = new_domain(service, tmp_path)
    note = tmp_path / "notes" / f"{uuid}.txt"

    def reeve(text: str) -> subprocess.CompletedProcess[str]:
        line = ["domain", "annotate", "web", text, "-f", "json", "--config-file", str(config)]
        command = [sys.executable, "-m", "agent.cli.main", *line]
        environ = os.environ | {"PYTHONPATH": installed}
        return subprocess.run(command, capture_output=True, text=True, timeout=60, env=environ, check=False)

    done = reeve("do not touch")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"text": "do not touch", "before": ""}
    assert note.read_text() == "do not touch"
    refused = reeve("longer than the option allows")
    assert refused.returncode == 1 and note.read_text() == "do not touch"
    assert json.loads(refused.stderr.splitlines()[-1])["error"]["code"] == "annotate.too_long"


def test_the_step_of_the_template_is_resumed_and_undone(service: Service, tmp_path: Path) -> None:
    """As docs/plugins.md says that it has to be, interrupted before, within and after its run."""
    ctx: Any = Context
    write = service.executor._verbs["annotate"].plugin.step_kinds[0]
    step = write(file=str(tmp_path / "note"), text="new", before="old")
    assert step.check(ctx) == "not_done"
    step.undo(ctx)
    (tmp_path / "note").write_text("old")
    (tmp_path / "note.new").write_text("ne")
    assert step.check(ctx) == "not_done"
    step.undo(ctx)
    assert step.run(ctx) == {"text": "new", "before": "old"} and step.check(ctx) == "done"
    step.undo(ctx)
    step.undo(ctx)
    assert (tmp_path / "note").read_text() == "old"


def test_broken_ones_are_left_out_and_said(service: Service, caplog: pytest.LogCaptureFixture) -> None:
    broken = service.broken_plugins
    assert set(broken) == {"newer", "raises", "exits", "fails", "create"}
    have, wants = (".".join(map(str, (API_VERSION[0], API_VERSION[1] + more))) for more in (0, 1))
    assert broken["newer"] == f"it is written for plugin API {wants}, this agent has {have}: upgrade the agent"
    assert broken["raises"] == "cannot be loaded: SystemExit: made in another way"
    assert broken["exits"] == "cannot be loaded: SystemExit: 3"
    assert broken["fails"] == "cannot be loaded: AssertionError: not here"
    assert broken["create"] == "there is a verb 'create' already, of plugins.create"
    said = [record.getMessage() for record in caplog.get_records("setup")]
    assert all(f"plugin {name} left out: {why}" in said for name, why in broken.items())
    with Client(service.settings.broker_url, "node1") as client:
        assert client.call("list", timeout=20).ok


def test_the_command_line_with_broken_commands(
    config: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    options = ["--config-file", str(config)]
    assert main(["domain", "list", "-f", "json", *options]) == 0
    assert json.loads(capsys.readouterr().out) == []  # still ours
    for name, why in (("exits", "SystemExit: 3"), ("wrong", "is no agent.cli.api.Command")):
        assert main([name, "--whatever", *options]) == 1
        error = capsys.readouterr().err
        assert f"the command {name!r} cannot be loaded" in error and why in error
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert "Keep a line of text about a domain" in text and "(cannot be used: SystemExit: 3)" in " ".join(text.split())
    assert main(["completion", "bash"]) == 0
    assert "domain annotate" in capsys.readouterr().out


def test_the_configuration_with_options_of_plugins(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["-f", "json", "--config-file", str(config)]
    main(["config", "check", *options])
    found = {row["where"]: row for row in json.loads(capsys.readouterr().out)}
    assert "plugin_annotate" not in json.dumps(found) and found["plugin newer"]["severity"] == "warning"
    assert main(["config", "show", *options]) == 0
    shown = {(row["group"], row["option"]): row["value"] for row in json.loads(capsys.readouterr().out)}
    assert shown["plugin_annotate", "max_length"] == 20
    config.write_text(config.read_text().replace("max_length = 20", "max_length = 0\nmaxlength = 3"))
    assert main(["config", "check", *options]) == 1
    text = capsys.readouterr().out
    assert "max_length" in text and "did you mean max_length?" in text
    service = Service(conf.load([str(config)]), FakeToolstack(None))
    service.start()
    service.close()
    assert "its options in [plugin_annotate] cannot be used" in service.broken_plugins["annotate"]
