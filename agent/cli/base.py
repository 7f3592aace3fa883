"""What every command shares: help with examples, errors with codes, results in any of cliff's formats.

Exit codes: 0 it worked, 1 it failed, 2 the command line is wrong. A failure is one line on standard
error, ``error: CODE: TEXT``; with ``-f json`` it is the JSON object ``{"error": {"code", "message", "retryable"}}``.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NoReturn

from cliff import _argparse as cliff_argparse
from cliff.columns import FormattableColumn
from cliff.command import Command
from cliff.lister import Lister
from cliff.show import ShowOne

from agent.cli.settings import Connection
from agent.errors import AgentError
from hypervisor.errors import DomainNotFound, ToolstackError
from hypervisor.toolstack.api import DomainInfo, Toolstack

EXIT_OK, EXIT_FAILED, EXIT_USAGE = 0, 1, 2


class CliError(AgentError):
    """A failure the command line itself finds: codes ``cli.…``.

    :ivar exit_code: what the process returns.
    """

    code = "cli.failed"
    exit_code = EXIT_FAILED


class UsageError(CliError):
    code = "cli.usage"
    exit_code = EXIT_USAGE


class HelpFormatter(cliff_argparse.SmartHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the line breaks of descriptions and examples."""


class Common(Command):
    """Help that teaches: subclasses give `examples`, one command line each with what it is for.

    :cvar examples: pairs of (command line, what it does).
    :cvar notes: further paragraphs of the help.
    """

    examples: Sequence[tuple[str, str]] = ()
    notes: str = ""

    def get_parser(self, prog_name: str) -> argparse.ArgumentParser:
        parser = super().get_parser(prog_name)
        parser.formatter_class = HelpFormatter
        parser.error = usage_error  # type: ignore[method-assign]
        self.add_arguments(parser)
        return parser

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """What this command takes."""

    def get_epilog(self) -> str:
        parts = []
        if self.examples:
            parts.append("examples:\n" + "\n".join(f"  {line}\n      {text}" for line, text in self.examples))
        if self.notes:
            parts.append(self.notes)
        parts.append("See `reeve --help` for the options every command takes (--driver, --socket, --config-file …).")
        return "\n\n".join(parts)

    @property
    def connection(self) -> Connection:
        """The settings that say which host this is about."""
        found = getattr(self.app, "connection", None)
        assert isinstance(found, Connection)
        return found

    @contextlib.contextmanager
    def toolstack(self) -> Iterator[Toolstack]:
        """The local driver, for the length of a ``with``."""
        toolstack = self.connection.toolstack()
        try:
            yield toolstack
        finally:
            toolstack.close()

    def say(self, text: str) -> None:
        """One line for a human on standard error; nothing with --quiet."""
        if self.app.options.verbose_level > 0:
            self.app.stderr.write(text + "\n")
            self.app.stderr.flush()


class Show(Common, ShowOne):
    """A command whose result is one object."""


class List(Common, Lister):
    """A command whose result is a table."""


class Table(FormattableColumn[Any]):
    """A mapping or list: itself for a program, ``key: value`` lines for a human."""

    def human_readable(self) -> str:
        value = self._value
        if isinstance(value, Mapping):
            return "\n".join(f"{key}: {_text(item)}" for key, item in value.items())
        if isinstance(value, (list, tuple)):
            return ", ".join(_text(item) for item in value)
        return _text(value)


class Seconds(FormattableColumn[float]):
    """Seconds since the epoch: the number for a program, local time for a human."""

    def human_readable(self) -> str:
        if not self._value:
            return ""
        return datetime.datetime.fromtimestamp(self._value).astimezone().isoformat(sep=" ", timespec="seconds")


def plain(value: Any) -> Any:
    """Only what JSON has: enum members become their text (YAML writes nothing else)."""
    return json.loads(json.dumps(value))


def _text(value: object) -> str:
    return "" if value is None else str(value)


def show_domain(info: DomainInfo) -> tuple[tuple[str, ...], tuple[object, ...]]:
    """A domain as cliff's columns; names and types are those of `DomainInfo.to_json`."""
    data = plain(info.to_json())
    data["created_at"] = Seconds(info.created_at)
    data["metadata"] = Table(data["metadata"])
    return tuple(data), tuple(data.values())


def find_domain(toolstack: Toolstack, name_or_uuid: str) -> DomainInfo:
    """The domain with this UUID or, if there is none, with this name.

    :raises DomainNotFound: with the names there are.
    """
    domains = toolstack.list_domains()
    wanted = name_or_uuid.lower()
    for info in domains:
        if info.uuid == wanted:
            return info
    for info in domains:
        if info.name == name_or_uuid:
            return info
    names = ", ".join(info.name for info in domains[:5]) + (" …" if len(domains) > 5 else "")
    there = f"there are: {names}" if names else "there are none"
    raise DomainNotFound(f"no domain has the name or UUID {name_or_uuid!r}: {there}")


def usage_error(message: str) -> NoReturn:
    """What replaces argparse's two-line answer."""
    raise UsageError(f"{message} (see --help)")


def error_json(error: BaseException) -> dict[str, Any]:
    """Any exception as code, message (one line) and retryable."""
    if isinstance(error, (ToolstackError, AgentError)):
        data: dict[str, Any] = error.to_json()
    else:
        data = {"code": "cli.failed", "message": f"{error}" or type(error).__name__, "retryable": False}
    data["message"] = " ".join(str(data["message"]).split())
    return data


def progress(text: str) -> contextlib.AbstractContextManager[Any]:
    """A spinner on standard error while something takes long; nothing when that is no terminal."""
    if not sys.stderr.isatty():
        return contextlib.nullcontext()
    from rich.console import Console  # here: its import costs more than most commands

    return Console(stderr=True).status(text)
