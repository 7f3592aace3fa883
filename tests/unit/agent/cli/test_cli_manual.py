from __future__ import annotations

import argparse
import re
import shutil
import subprocess

import pytest

from agent import conf
from agent.cli import completion
from agent.cli.main import COMMANDS, ReeveApp, main
from agent.cli.manual import PAGES, agent_page, command_page, escaped

GROFF = shutil.which("groff")


@pytest.fixture
def page(request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["manual", request.param]) == 0
    out = capsys.readouterr().out
    assert isinstance(out, str)
    return out


def plain(roff: str) -> str:
    shown = re.sub(r"\\\[u([0-9A-F]{4,6})\]", lambda found: chr(int(found[1], 16)), roff)
    return shown.replace("\\-", "-").replace("\\e", "\\").replace("\\&", "")


def section(text: str, name: str) -> str:
    found = re.search(rf"^\.SS {re.escape(name)}\n(.*?)(?=^\.S[SH] |\Z)", text, re.M | re.S)
    assert found is not None, f"{name} is not in the page"
    return found[1]


@pytest.mark.parametrize("page", ["reeve"], indirect=True)
def test_every_command_is_there_with_its_options_and_examples(page: str) -> None:
    text = plain(page)
    app = ReeveApp()
    app.options, _ = app.parser.parse_known_args([])
    output = text[text.index("\n.SH OUTPUT") :]
    for option in completion.options(app.parser):
        assert option in text[text.index("\n.SH OPTIONS") : text.index("\n.SH COMMANDS")] or option == "--help"
    for name, command in COMMANDS.items():
        found = section(text, name)
        for option in completion.options(command(app, app.options).get_parser(f"reeve {name}")):
            assert option in found or f".B {option}" in output or f", {option}" in output or option == "--help"
        for line, about in command.examples:
            assert line in found and about in found


@pytest.mark.parametrize("page", ["reeve-agent"], indirect=True)
def test_every_option_of_the_agent_is_there_as_it_is_given(page: str) -> None:
    text = plain(page)
    for group, options in conf.list_opts():
        found = section(text, f"[{group}]")
        for option in options:
            flag = f"--{group}-{option.name}".replace("_", "-")
            assert f".B {option.dest}, {flag}\n" in found, option.name
            assert " ".join((option.help or "").split())[:40] in found
    assert "reeve-agent --driver-name fake" in text


@pytest.mark.skipif(GROFF is None, reason="no groff on this machine")
@pytest.mark.parametrize("page", PAGES, indirect=True)
def test_it_is_roff_without_a_mistake(page: str) -> None:
    assert GROFF is not None
    done = subprocess.run(
        [GROFF, "-man", "-Tutf8", "-ww", "-z"], input=page, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stderr == ""


def test_what_looks_like_a_request_is_text() -> None:
    parser = argparse.ArgumentParser(prog="reeve", description=".SH not a heading\n'nor this")
    parser.add_argument("--back", help=r"C:\path 100%%")
    text = command_page(parser, {"do it": parser})
    assert "\n.SH not" not in text and "\n'nor" not in text and r"C:\epath 100%" in text
    assert escaped("a-b…\n.c") == "a\\-b\\[u2026]\n\\&.c"
    assert agent_page({"x": []}).startswith(".TH REEVE-AGENT 8 ")
