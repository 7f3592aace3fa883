"""The checker of documents finds what is wrong, and leaves alone what is right."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from oslo_config import cfg

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "tools"))

import check_docs
import check_samples


@pytest.fixture
def document(tmp_path: Path) -> Path:
    return tmp_path / "page.md"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[x](other.md)", "no such file"),
        ("# A title\n[x](#a-title)", ""),
        ("[x](#another)", "no such heading"),
        ("[x](https://example.org/other.md)", ""),
        ("```\n[x](other.md)\n```", ""),
    ],
)
def test_links(document: Path, text: str, problem: str) -> None:
    document.write_text(text)
    found = [what for _, what in check_docs.links(document)]
    assert len(found) == bool(problem)
    assert problem in "".join(found)


@pytest.mark.parametrize(
    ("span", "wrong"),
    [
        ("hypervisor/abi/", False),
        ("hypervisor/nothing.py", True),
        ("bench/NAME.py", False),
        ("docs/architecture.md", False),
    ],
)
def test_files(document: Path, span: str, wrong: bool) -> None:
    document.write_text(f"see `{span}`")
    assert bool(list(check_docs.files(document))) is wrong


@pytest.mark.parametrize(
    ("name", "right"),
    [
        ("hypervisor.abi", True),
        ("hypervisor.abi.START_INFO_NR_PAGES", True),
        ("hypervisor.errors.from_json()", True),
        ("hypervisor.toolstack.api.DomainSpec.uuid", True),
        ("hypervisor.errors.NoSuchError", False),
        ("hypervisor.nowhere.at_all", False),
    ],
)
def test_names(document: Path, name: str, right: bool) -> None:
    document.write_text(f"calls `{name}`")
    assert check_docs.resolves(name) is right
    assert (not list(check_docs.names(document))) is right


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("make test", ""),
        ("make coffee", "no such target"),
        ("tox -e lint,type", ""),
        ("tox -e lint,lunch", "tox -e lunch"),
        ("python tools/gen_abi.py --check", ""),
        ("python tools/gen_tea.py", "no such file"),
        ("python bench/NAME.py", ""),
        ("apt-get install make", ""),
        ("", ""),
    ],
)
def test_commands(line: str, problem: str) -> None:
    found = check_docs.command_problem(line.split())
    assert bool(found) == bool(problem)
    assert problem in found


def test_shell_comments_are_not_commands(document: Path) -> None:
    document.write_text("```sh\n$ make test   # every check\nmake coffee # now\n```\n`make tea` or `make`\n")
    assert list(check_docs.commands(document)) == [
        (3, "make coffee: no such target"),
        (5, "make tea: no such target"),
    ]


HELP = {
    (): "reeve [--debug]\n\nCommands:\n  domain console-log  print\n  domain list  list\n  doctor         look\n",
    ("domain", "list"): "usage: reeve domain list [--all]",
    ("doctor",): "usage: reeve doctor",
}


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("domain list --all", ""),
        ("domain list --debug", ""),
        ("domain list --few", "reeve domain list --few: no such option"),
        ("domain console-log one", ""),
        ("domain dance", "reeve domain dance: no such command"),
        ("doctor -f json", ""),
        ("--help", ""),
    ],
)
def test_reeve_commands(monkeypatch: pytest.MonkeyPatch, line: str, problem: str) -> None:
    monkeypatch.setattr(check_docs, "reeve_help", lambda *command: HELP.get(command, "") + " --help")
    assert check_docs.reeve_problem(line.split()) == problem


def test_what_a_sample_mentions() -> None:
    text = "[DEFAULT]\n# Prose = not an option\n#name = x\n\n[broker]\nurl = amqp://\n"
    assert check_samples.mentioned(text) == {
        ("DEFAULT", "name"): check_samples.Line(3, "x", True),
        ("broker", "url"): check_samples.Line(6, "amqp://", False),
    }


@pytest.mark.parametrize(
    ("option", "text"),
    [
        (cfg.StrOpt("a"), "<None>"),
        (cfg.StrOpt("a", default="x", sample_default="<host>"), "<host>"),
        (cfg.BoolOpt("a", default=False), "false"),
        (cfg.ListOpt("a", default=["x", "y"]), "x,y"),
        (cfg.DictOpt("a", default={"k": "v"}), "k:v"),
        (cfg.FloatOpt("a", default=0.5), "0.5"),
    ],
)
def test_defaults_as_samples_write_them(option: cfg.Opt, text: str) -> None:
    assert check_samples.default_text(option) == text


def test_samples_are_compared_both_ways(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {("DEFAULT", "name"): "a", ("DEFAULT", "size"): "1", ("broker", "url"): ""}
    monkeypatch.setattr(check_samples, "registered", lambda: {"agent": options})
    (tmp_path / "reeve").mkdir()
    assert "no such file" in check_samples.sample_problems(tmp_path)[0]
    sample = tmp_path / "reeve" / "agent.conf.sample"
    sample.write_text("[DEFAULT]\n#name = a\n#nmae = b\n#size = 2\n")
    assert check_samples.sample_problems(tmp_path) == [
        f"{sample}: [broker] url is not shown",
        f"{sample}:3: [DEFAULT] nmae is no option",
        f"{sample}:4: [DEFAULT] size is shown as '2', but its default is '1'",
    ]
    sample.write_text("[DEFAULT]\nname = other\n#size = 1\n[broker]\n#url =\n")
    assert check_samples.sample_problems(tmp_path) == []
