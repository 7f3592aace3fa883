"""`reeve domain standby …`. To look needs this host's driver alone; the rest goes through the agents of both hosts."""

from __future__ import annotations

import argparse
import uuid
from typing import Any

from agent.cli.asking import ask
from agent.cli.base import List, Show, find_domain, plain, progress
from agent.cli.migration import migration_bar
from agent.cli.values import rate_bytes, seconds
from hypervisor.errors import MigrationNotFound
from hypervisor.toolstack.api import MigrationMode, MigrationStatus, Toolstack

COLUMNS = ("ident", "uuid", "name", "role", "peer", "phase", "epochs", "pause_ms", "lost_ms", "detail")


class StandbyStart(Show):
    """Keep a running domain on a second host as well; returns when that host holds the first whole epoch."""

    examples = (
        ("reeve domain standby start web node2", "five epochs a second"),
        ("reeve domain standby start web node2 --interval 1000", "one a second: less traffic, more to lose"),
    )
    notes = (
        "What the domain sends to a network leaves when the other host holds what led to it: up to an interval later.\n"
        "The other host gets disks of its own, copied first. It goes on until `reeve domain standby stop` here or\n"
        "`reeve domain standby takeover` there; verbs that would change the domain are refused meanwhile."
    )

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        add = parser.add_argument
        add("domain", metavar="NAME|UUID", help="which domain; one that the agent made")
        add("target", metavar="HOST", help="the other host, as instructions address it")
        add("--interval", type=float, metavar="MS", help="between two epochs, milliseconds, 10 to 60000 (default 200)")
        add("--bandwidth", type=rate_bytes, metavar="SIZE", help="bytes a second, for example 100M; 0: no limit")
        add("--compress", choices=["none", "zstd"], help="default none")
        add("--timeout", type=seconds, default=3600.0, metavar="SECONDS", help="given up after so long (default 3600)")

    def take_action(self, parsed_args: argparse.Namespace) -> tuple[tuple[str, ...], tuple[object, ...]]:
        with self.toolstack() as toolstack:
            info = find_domain(toolstack, parsed_args.domain)
        asked = {
            "interval_ms": parsed_args.interval,
            "bandwidth_bytes": parsed_args.bandwidth,
            "compress": parsed_args.compress,
        }
        options = {name: value for name, value in asked.items() if value is not None}
        args = {"uuid": info.uuid, "target": parsed_args.target, **({"options": options} if options else {})}
        with migration_bar(f"{info.name} to {parsed_args.target}") as tell:
            result = ask(self.connection, "standby", args, parsed_args.timeout, tell, str(uuid.uuid4()))
        return _row(plain(result["standby"]))


class StandbyStatus(List):
    """Show the standbys that this host keeps, or has on another host: how whole, how late, and what was lost."""

    examples = (
        ("reeve domain standby status", "all of this host"),
        ("reeve domain standby status web -f json", "one domain's, for a program"),
    )
    notes = (
        "phase standby: the target holds a whole epoch. kept: it has ended, the domain runs on here without a copy.\n"
        "complete: the source is silent and the copy here waits; its detail names the command that decides."
    )

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("domain", metavar="NAME|UUID", nargs="?", help="only of this domain")

    def take_action(self, parsed_args: argparse.Namespace) -> tuple[tuple[str, ...], list[tuple[object, ...]]]:
        with self.toolstack() as toolstack:
            found = _standbys(toolstack, parsed_args.domain)
        return COLUMNS, [_row(plain(status.to_json()))[1] for status in found]


class StandbyStop(List):
    """End a domain's standby: it runs on here, and the other host keeps nothing of it."""

    examples = (("reeve domain standby stop web", "on the host where it runs"),)
    notes = (
        "Also clears away one that has ended by itself (phase kept). `dropped` is False when the other host's agent\n"
        "does not answer: it drops its half when it is there. A domain that was taken over there is not touched."
    )

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("domain", metavar="NAME|UUID", help="which domain")
        parser.add_argument("--timeout", type=seconds, default=120.0, metavar="SECONDS", help="to wait (default 120)")

    def take_action(self, parsed_args: argparse.Namespace) -> tuple[tuple[str, ...], list[tuple[object, ...]]]:
        with self.toolstack() as toolstack:
            wanted = _standbys(toolstack, parsed_args.domain)[-1].uuid
        with progress("ending it on both hosts"):
            found = ask(self.connection, "standby_stop", {"uuid": wanted}, parsed_args.timeout)["standbys"]
        columns = (*COLUMNS[:-1], "dropped")
        return columns, [tuple(plain(half).get(name, "") for name in columns) for half in found]


class StandbyTakeover(Show):
    """Let a domain run here that this host keeps as a standby."""

    examples = (
        ("reeve domain standby takeover web", "the source hands it over: nothing is lost"),
        ("reeve domain standby takeover web --force", "the source is dead, and known to be"),
    )
    notes = (
        "--force runs the last whole epoch, and does not wait for the source. If the domain runs there as well, it\n"
        "runs twice: be sure that the machine is off. lost_ms says how much of its run is lost at most."
    )

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("domain", metavar="NAME|UUID", help="which domain")
        parser.add_argument("--force", action="store_true", help="do not wait for the source")
        parser.add_argument("--timeout", type=seconds, default=300.0, metavar="SECONDS", help="to wait (default 300)")

    def take_action(self, parsed_args: argparse.Namespace) -> tuple[tuple[str, ...], tuple[object, ...]]:
        with self.toolstack() as toolstack:
            wanted = _standbys(toolstack, parsed_args.domain)[-1]
        args: dict[str, Any] = {"uuid": wanted.uuid, **({"force": True} if parsed_args.force else {})}
        with progress("taking it over"):
            result = ask(self.connection, "standby_takeover", args, parsed_args.timeout)
        domain, source = result["domain"] or {}, result["source"]
        data = {
            "uuid": wanted.uuid,
            "name": wanted.name,
            "state": domain.get("state", ""),
            "epochs": result.get("epochs", 0),
            "lost_ms": result.get("lost_ms", 0.0),
            "source": result.get("peer", ""),
            "source_dropped": source["dropped"],
            "source_error": source["error"]["message"] if "error" in source else "",
        }
        return tuple(data), tuple(data.values())


def _standbys(toolstack: Toolstack, which: str | None) -> list[MigrationStatus]:
    """Oldest first. :raises MigrationNotFound: one was named that is not there."""
    found = [status for status in toolstack.migration_list() if status.mode is MigrationMode.STANDBY]
    if which is None:
        return found
    ours = [status for status in found if which.lower() in (status.ident, status.uuid) or which == status.name]
    if not ours:
        there = ", ".join(status.name for status in found[:5]) or "none"
        raise MigrationNotFound(f"no standby of a domain {which!r} on this host: there are {there}")
    return ours


def _row(data: dict[str, Any]) -> tuple[tuple[str, ...], tuple[object, ...]]:
    return COLUMNS, tuple(data[name] for name in COLUMNS)
