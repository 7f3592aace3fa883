"""`reeve manual`: man pages, made from the commands' own parsers and the agent's own options.

They are made where Reeve is installed, so they are always those of what is installed, other distributions' commands
included.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import re
from collections.abc import Iterable, Mapping

from oslo_config import cfg

from agent import conf, usage
from agent.cli.base import CliError, Common

PAGES = {"reeve": 1, "reeve-agent": 8}
_MAIN = ("positional arguments", "options")


def escaped(text: str) -> str:
    """Any text as roff shows it: neither a request nor an escape of it counts, and a hyphen is one to copy."""
    shown = text.replace("\\", "\\e").replace("-", "\\-")
    lines = "".join(c if c.isascii() else f"\\[u{ord(c):04X}]" for c in shown).splitlines()
    return "\n".join(f"\\&{line}" if line.startswith((".", "'")) else line for line in lines)


def _paragraphs(text: str) -> str:
    """Lines that are indented or follow a colon stay as they are; others are filled."""
    parts = []
    for part in re.split(r"\n\s*\n", text.strip("\n")):
        shown = escaped(part)
        parts.append(f".PP\n.nf\n{shown}\n.fi" if "\n " in f"\n{part}" else f".PP\n{shown}")
    return "\n".join(parts)


def _entry(names: str, about: str) -> str:
    shown = escaped(" ".join(about.split())) or "\\&"
    return f".TP\n.B {escaped(names)}\n{shown}"


def _action(parser: argparse.ArgumentParser, action: argparse.Action) -> str:
    formatter = parser._get_formatter()
    about = formatter._expand_help(action) if action.help else ""
    return _entry(formatter._format_action_invocation(action), about)


def _groups(parser: argparse.ArgumentParser, *, main: bool) -> Iterable[str]:
    """The arguments that are this command's own, or else (`main` false) those of cliff's formatters."""
    for group in parser._action_groups:
        formatter = group.title is not None and group.title.lower().endswith((" formatter", " formatters"))
        shown = [item for item in group._group_actions if item.help != argparse.SUPPRESS and item.dest != "help"]
        if formatter is main or not shown:
            continue
        if group.title not in _MAIN:
            yield f".PP\n{escaped(group.title or '')}:"
        yield from (_action(parser, action) for action in shown)


def _usage(parser: argparse.ArgumentParser) -> str:
    own = [
        item
        for group in parser._action_groups
        if not (group.title or "").lower().endswith((" formatter", " formatters"))
        for item in group._group_actions
    ]
    formatter = argparse.HelpFormatter(parser.prog, width=4096)
    formatter.add_usage(None, own, parser._mutually_exclusive_groups, "")
    return escaped(" ".join(formatter.format_help().split()))


def _head(name: str, summary: str) -> str:
    version = importlib.metadata.version("reeve")
    return f'.TH {name.upper()} {PAGES[name]} "" "Reeve {version}"\n.SH NAME\n{escaped(name)} \\- {escaped(summary)}'


def command_page(parser: argparse.ArgumentParser, commands: Mapping[str, argparse.ArgumentParser]) -> str:
    """:param parser: of what stands before a command. :param commands: the parser of each."""
    about = (parser.description or "").strip()
    parts = [
        _head("reeve", "look after a Reeve node"),
        f".SH SYNOPSIS\n.B reeve\n{escaped('[option ...] command [argument ...]')}",
        f".SH DESCRIPTION\n{_paragraphs(about)}",
        ".SH OPTIONS",
        *_groups(parser, main=True),
        ".SH COMMANDS",
    ]
    forms: dict[str, None] = {}
    for name, found in sorted(commands.items()):
        parts += [f".SS {escaped(name)}", f".B {_usage(found)}", _paragraphs(found.description or "")]
        parts += _groups(found, main=True)
        parts.append(_paragraphs(re.sub(r"\n*See `reeve --help`[^\n]*$", "", found.epilog or "")))
        forms |= dict.fromkeys(_groups(found, main=False))
    parts += [".SH OUTPUT", ".PP\nCommands whose result is a table or an object take further:", *forms]
    parts.append(".SH SEE ALSO\n.BR reeve-agent (8)")
    return "\n".join(part for part in parts if part) + "\n"


def agent_page(groups: Mapping[str, Iterable[cfg.Opt]]) -> str:
    """:param groups: the options by group, as in the configuration file."""
    parts = [
        _head("reeve-agent", "carry out a scheduler's instructions on this node"),
        ".SH SYNOPSIS\n.B reeve\\-agent\n[\\-\\-config\\-file FILE] [\\-\\-GROUP\\-OPTION VALUE ...]",
        f".SH DESCRIPTION\n{_paragraphs(usage.DESCRIPTION)}",
        ".SH OPTIONS\n.PP\nEach stands in the configuration file under its group, or on the command line.",
    ]
    for group, options in groups.items():
        parts.append(f".SS {escaped(f'[{group}]')}")
        for option in options:
            default = "" if option.default in (None, "", [], {}) or option.secret else f" Default: {option.default}."
            about = f"{(option.help or '').strip().rstrip('.')}.{default}"
            flag = f"--{group}-{option.name}".replace("_", "-")
            parts.append(_entry(f"{option.dest}, {flag}", about))
    parts += [f".SH EXAMPLES\n{_paragraphs(usage.EPILOG)}", ".SH SEE ALSO\n.BR reeve (1)"]
    return "\n".join(parts) + "\n"


class Manual(Common):
    """Print a man page, in roff."""

    examples = (
        ("reeve manual reeve | sudo tee /usr/local/share/man/man1/reeve.1", "then `man reeve` shows it"),
        ("reeve manual reeve-agent | man -l -", "read the agent's without storing it"),
    )

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("page", choices=PAGES, help="of which program")

    def take_action(self, parsed_args: argparse.Namespace) -> int:
        if parsed_args.page == "reeve-agent":
            self.app.stdout.write(agent_page(dict(conf.list_opts())))
            return 0
        commands = {}
        for name, found in self.app.command_manager:
            try:
                commands[name] = found.load()(self.app, self.app.options).get_parser(f"reeve {name}")
            except CliError as exc:  # another distribution's
                self.say(f"left out: {exc}")
        self.app.stdout.write(command_page(self.app.parser, commands))
        return 0
