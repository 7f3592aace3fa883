"""`reeve domain migrate`, `reeve host evacuate` and `reeve migration …`.

What moves domains goes through the agents, which know each other; to look and to cancel needs this host's driver alone.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

from agent.cli.asking import ask
from agent.cli.base import CliError, List, Show, Table, find_domain, plain, progress
from agent.cli.values import rate_bytes, seconds
from agent.migrating import commands, described
from hypervisor.errors import MigrationNotFound
from hypervisor.toolstack.api import MigrationPhase, MigrationStatus, Toolstack

Tell = Callable[[dict[str, Any]], None]

COLUMNS = ("ident", "uuid", "name", "role", "peer", "phase", "mode", "rounds", "bytes_sent", "dirty_pages")
ROWS = ("uuid", "name", "outcome", "downtime_ms", "total_s", "error", "migration")
CANCEL_SECONDS = 30.0


class DomainMigrate(Show):
    """Move a domain to another host while it runs."""

    examples = (
        ("reeve domain migrate web node2", "live if that can be, else as an image; with a progress bar"),
        ("reeve domain migrate web node2 --live", "live or not at all"),
        ("reeve domain migrate web node2 --bandwidth 100M --downtime 10", "bytes a second, milliseconds"),
        ("reeve domain migrate web node2 -f json", "the figures for a program"),
    )
    notes = (
        "The agents of both hosts carry it out, over one broker: the same as `reeve instruct migrate`. Ctrl-C ends\n"
        "the command and not the migration; `reeve migration cancel` does that. Until the domain has left, a failure\n"
        "leaves it running here (exit code 1); the error migration.unresolved names the command that decides."
    )

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("domain", metavar="NAME|UUID", help="which domain; one that the agent made")
        parser.add_argument("target", metavar="HOST", help="the other host, as instructions address it")
        _add_options(parser)

    def take_action(self, parsed_args: argparse.Namespace) -> tuple[tuple[str, ...], tuple[object, ...]]:
        with self.toolstack() as toolstack:
            info = find_domain(toolstack, parsed_args.domain)
        args = {"uuid": info.uuid, "target": parsed_args.target, **_asked(parsed_args)}
        ident = str(uuid.uuid4())
        with migration_bar(f"{info.name} to {parsed_args.target}") as tell:
            result = ask(self.connection, "migrate", args, parsed_args.timeout, tell, ident)
        data = {"migration": ident, "uuid": info.uuid, "name": info.name, **plain(result)}
        domain = data.pop("domain") or {}
        data["state"] = domain.get("state", "")
        return tuple(data), tuple(data.values())


class HostEvacuate(List):
    """Move every domain that this host's agent made to another host."""

    examples = (
        ("reeve host evacuate node2", "two at a time; one line for each domain"),
        ("reeve host evacuate node2 --at-once 4 --timeout 600", "what is not begun after ten minutes stays"),
        ("reeve host evacuate node2 -f json", "for a program"),
    )
    notes = (
        "Exit code 1 (cli.incomplete) when one has failed or was not begun; run it again for those. Foreign and\n"
        "ended domains are skipped. The same as `reeve instruct evacuate`."
    )

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("target", metavar="HOST", help="where they go")
        parser.add_argument("--at-once", type=int, default=2, metavar="N", help="side by side, 1 to 8 (default 2)")
        _add_options(parser)

    def run(self, parsed_args: argparse.Namespace) -> int:
        self.failure: CliError | None = None
        code = super().run(parsed_args)
        if self.failure is not None:
            raise self.failure
        return int(code)

    def take_action(self, parsed_args: argparse.Namespace) -> tuple[tuple[str, ...], list[tuple[object, ...]]]:
        args = {"target": parsed_args.target, "at_once": parsed_args.at_once, **_asked(parsed_args)}
        with migration_bar(f"domains to {parsed_args.target}") as tell:
            result = ask(self.connection, "evacuate", args, parsed_args.timeout, tell)
        if left := result["failed"] + result["not_begun"]:
            text = (
                f"{left} of {len(result['domains'])} domains are still here, {result['moved']} have moved: run it again"
            )
            self.failure = EvacuationIncomplete(text)
        rows = [{**row, "error": Table(row["error"]) if "error" in row else ""} for row in result["domains"]]
        return ROWS, [tuple(row.get(name, "") for name in ROWS) for row in rows]


class EvacuationIncomplete(CliError):
    code = "cli.incomplete"
    retryable = True


class MigrationList(List):
    """List the migrations that are under way, or wait for a decision, with this host as source or target."""

    examples = (
        ("reeve migration list", "what moves just now"),
        ("reeve migration list -f json", "with every figure, for a program"),
    )

    def take_action(self, parsed_args: argparse.Namespace) -> tuple[tuple[str, ...], list[tuple[object, ...]]]:
        with self.toolstack() as toolstack:
            found = [plain(status.to_json()) for status in toolstack.migration_list()]
        return COLUMNS, [tuple(data[name] for name in COLUMNS) for data in found]


class MigrationShow(Show):
    """Show one migration: how far it is, what it costs, and how to decide if it waits for that."""

    examples = (
        ("reeve migration show 5f1c6f0e-…", "by its ident"),
        ("reeve migration show web", "or by its domain"),
        ("reeve migration show web -f value -c resolve", "the commands that decide, or nothing"),
    )

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        _add_which(parser)

    def take_action(self, parsed_args: argparse.Namespace) -> tuple[tuple[str, ...], tuple[object, ...]]:
        with self.toolstack() as toolstack:
            return _shown(_find(toolstack, parsed_args.migration))


class MigrationCancel(Show):
    """End a migration before the domain has left: it runs on here, and nothing is left on the target."""

    examples = (("reeve migration cancel web", "on the source"),)
    notes = "Too late is domain.wrong_state, exit code 1: the domain is on its way or there."

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        _add_which(parser)

    def take_action(self, parsed_args: argparse.Namespace) -> tuple[tuple[str, ...], tuple[object, ...]]:
        with self.toolstack() as toolstack:
            status = _find(toolstack, parsed_args.migration)
            toolstack.migration_cancel(status.ident)
            end = time.monotonic() + CANCEL_SECONDS
            # The agent forgets it as soon as it has ended.
            with progress("waiting for its end"), contextlib.suppress(MigrationNotFound):
                while not (status := toolstack.migration_status(status.ident)).phase.ended and time.monotonic() < end:
                    time.sleep(0.05)
            return _shown(status)


class MigrationResolve(Show):
    """Decide where a domain runs whose migration is paused on both sides."""

    examples = (
        ("reeve migration resolve 5f1c6f0e-… --keep", "it runs here, the other half is dropped"),
        ("reeve migration resolve 5f1c6f0e-… --drop", "the other way round"),
        ("reeve migration resolve 5f1c6f0e-… --keep --force", "when the other host is gone for good"),
    )
    notes = (
        "The agents ask each other first, and refuse what would run the domain twice or nowhere (migration.refused).\n"
        "--force asks nobody and needs no agent: a domain that runs on the other host, too, destroys its disks."
    )

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        _add_which(parser)
        group = parser.add_mutually_exclusive_group(required=True)
        group.add_argument("--keep", action="store_true", help="it runs here")
        group.add_argument("--drop", action="store_true", help="it does not")
        parser.add_argument("--peer", metavar="HOST", help="the other host (default: as the record says)")
        parser.add_argument("--force", action="store_true", help="do not ask the other host")
        parser.add_argument("--timeout", type=seconds, default=120.0, metavar="SECONDS", help="to wait (default 120)")

    def take_action(self, parsed_args: argparse.Namespace) -> tuple[tuple[str, ...], tuple[object, ...]]:
        with self.toolstack() as toolstack:
            status = _find(toolstack, parsed_args.migration)
            if parsed_args.force:
                toolstack.migration_resolve(status.ident, keep=parsed_args.keep)
                return _shown(toolstack.migration_status(status.ident))
        args: dict[str, Any] = {"ident": status.ident, "keep": parsed_args.keep}
        if parsed_args.peer:
            args["peer"] = parsed_args.peer
        with progress("asking the other host"):
            found = ask(self.connection, "resolve_migration", args, parsed_args.timeout)["migration"]
        found.pop("resolve", None)
        return _shown(MigrationStatus.from_json(found))


def _add_which(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("migration", metavar="IDENT|NAME|UUID", help="its ident, or its domain's name or UUID")


def _add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--live", action="store_true", help="the guest does not notice, or it is not moved")
    group.add_argument("--image", action="store_true", help="the guest suspends here and resumes there")
    add("--bandwidth", type=rate_bytes, metavar="SIZE", help="bytes a second, for example 100M; 0: no limit")
    add("--downtime", type=float, metavar="MS", help="what the switch may cost, milliseconds (default 30)")
    add("--compress", choices=["none", "zstd"], help="default none")
    add("--max-rounds", type=int, metavar="N", help="of copying, before the switch is made in any case")
    add("--no-throttle", action="store_true", help="never slow the guest down")
    add("--copy-disks", action="store_true", help="copy disks that both hosts see, too")
    add("--flatten-disks", action="store_true", help="copied disks have no backing files afterwards")
    add("--timeout", type=seconds, default=3600.0, metavar="SECONDS", help="given up after so long (default 3600)")


def _asked(parsed_args: argparse.Namespace) -> dict[str, Any]:
    options = {
        "bandwidth_bytes": parsed_args.bandwidth,
        "downtime_ms": parsed_args.downtime,
        "compress": parsed_args.compress,
        "max_rounds": parsed_args.max_rounds,
        "throttle": False if parsed_args.no_throttle else None,
        "copy_disks": parsed_args.copy_disks or None,
        "flatten_disks": parsed_args.flatten_disks or None,
    }
    given = {name: value for name, value in options.items() if value is not None}
    mode = "live" if parsed_args.live else "image" if parsed_args.image else "auto"
    return {"mode": mode, **({"options": given} if given else {})}


def _find(toolstack: Toolstack, which: str) -> MigrationStatus:
    """:raises MigrationNotFound: with those there are."""
    found = toolstack.migration_list()
    for status in reversed(found):
        if which.lower() in (status.ident, status.uuid) or which == status.name:
            return status
    there = ", ".join(status.ident for status in found[:5]) or "none"
    raise MigrationNotFound(f"no migration of that ident or domain, {which!r}, on this host: there are {there}")


def _shown(status: MigrationStatus) -> tuple[tuple[str, ...], tuple[object, ...]]:
    data = plain(described(status))
    data["error"] = Table(data["error"]) if data["error"] else ""
    data["resolve"] = Table(commands(status))
    return tuple(data), tuple(data.values())


@contextlib.contextmanager
def migration_bar(what: str) -> Iterator[Tell]:
    """What hears of progress: a bar on standard error, nothing when that is no terminal."""
    if not sys.stderr.isatty():
        yield lambda data: None
        return
    from rich.console import Console  # here: its import costs more than most commands
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[how]}"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None, how="")

        def tell(data: dict[str, Any]) -> None:
            bar.update(task, completed=data["done"], total=data["total"], how=progress_text(data))

        yield tell


def progress_text(data: dict[str, Any]) -> str:
    """A progress report in one line."""
    text = f"{data['done']:g} of {data['total']:g} {data['unit']}"
    if "phase" not in data:
        return text
    if data["phase"] != MigrationPhase.COPYING:
        return f"{text}, {data['phase']}"
    return (
        f"{text}, round {data['rounds']}, {data['rate_bytes'] / 1e6:.0f} MB/s, dirtied "
        f"{data['dirty_rate_pages'] * 4096 / 1e6:.1f} MB/s, downtime about {data['downtime_estimate_ms']:.1f} ms"
    )
