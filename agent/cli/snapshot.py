"""`reeve domain snapshot`, `revert` and `clone`: the agent is asked, for it has the folder of guests' disks."""

from __future__ import annotations

import argparse
from typing import Any

from agent.cli.asking import ask
from agent.cli.base import List, Show, Table, find_domain, plain
from agent.cli.values import seconds

_ANSWER_S = 600.0
"""For the guest's memory to be written, besides what the guest may take."""


class DomainSnapshot(Show):
    """Keep a domain as it is now, memory and disks together; it goes on, with overlays on its disks."""

    examples = (
        ("reeve domain snapshot web before-upgrade", "`reeve template list` shows it"),
        ("reeve domain snapshot web nightly --wait 300", "a guest that takes its time"),
    )
    notes = (
        "`reeve domain revert` goes back to it.\n"
        "The images that the guest wrote to stay as they are from now on, and must not be written to by others.\n"
        "A guest that does not suspend within --wait runs on: exit code 1 (domain.timeout)."
    )

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("domain", metavar="NAME|UUID", help="which domain")
        parser.add_argument("name", metavar="SNAPSHOT", help="of the snapshot, a new one")
        _add_wait(parser)

    def take_action(self, parsed_args: argparse.Namespace) -> tuple[tuple[str, ...], tuple[object, ...]]:
        with self.toolstack() as toolstack:
            info = find_domain(toolstack, parsed_args.domain)
        args = {"uuid": info.uuid, "name": parsed_args.name, "wait_seconds": parsed_args.wait}
        return _shown(ask(self.connection, "snapshot", args, parsed_args.wait + _ANSWER_S))


class DomainRevert(Show):
    """Have a domain go on from a snapshot of it, memory and disks; what it is now is kept as another snapshot."""

    examples = (
        ("reeve domain revert before-upgrade", "kept_as: the snapshot by which to come back"),
        ("reeve domain revert before-upgrade --force", "a guest that does not answer, or has crashed"),
    )
    notes = "No image is removed: `disks` shows which the domain has now, those of before are in the snapshots."

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("name", metavar="SNAPSHOT", help="a snapshot that `reeve domain snapshot` made")
        parser.add_argument("--keep-as", default="", metavar="NAME", help="of the snapshot of what it is now")
        parser.add_argument("--force", action="store_true", help="give up its memory as it is now; its disks stay")
        _add_wait(parser)

    def take_action(self, parsed_args: argparse.Namespace) -> tuple[tuple[str, ...], tuple[object, ...]]:
        with self.toolstack() as toolstack:
            domain = toolstack.template_get(parsed_args.name).spec.uuid
        args = {"uuid": domain, "name": parsed_args.name, "wait_seconds": parsed_args.wait, "force": parsed_args.force}
        if parsed_args.keep_as:
            args["keep_as"] = parsed_args.keep_as
        return _shown(ask(self.connection, "revert", args, parsed_args.wait + _ANSWER_S))


class DomainClone(List):
    """Begin new domains from a running one, which goes on; they share its memory and disks until they write to them."""

    examples = (
        ("reeve domain clone web web-2 web-3", "two more, with UUIDs, MACs and xenstores of their own"),
        ("reeve domain clone web web-2 --paused", "`reeve domain unpause` lets it run"),
    )
    notes = (
        "A guest with disks that it writes to goes on with overlays on them, as after `reeve domain snapshot`.\n"
        "The guest is told by the xenstore node clone/generation: it should make new keys and numbers then."
    )

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("domain", metavar="NAME|UUID", help="which domain")
        parser.add_argument("names", nargs="+", metavar="NEW", help="name of a new domain")
        parser.add_argument("--paused", action="store_true", help="do not let them run yet")
        _add_wait(parser)

    def take_action(self, parsed_args: argparse.Namespace) -> tuple[tuple[str, ...], list[tuple[object, ...]]]:
        with self.toolstack() as toolstack:
            info = find_domain(toolstack, parsed_args.domain)
        args = {"uuid": info.uuid, "names": parsed_args.names, "wait_seconds": parsed_args.wait}
        result = ask(self.connection, "clone", args | {"start": not parsed_args.paused}, parsed_args.wait + _ANSWER_S)
        columns = ("uuid", "name", "domid", "state")
        return columns, [tuple(plain(domain[name]) for name in columns) for domain in result["domains"]]


def _add_wait(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--wait", type=seconds, default=60.0, metavar="SECONDS", help="for the guest (default 60)")


def _shown(result: dict[str, Any]) -> tuple[tuple[str, ...], tuple[object, ...]]:
    domain = plain(result["domain"])
    data = {name: domain[name] for name in ("uuid", "name", "domid", "state")}
    data |= {name: result[name] for name in ("snapshot", "kept_as") if name in result}
    data["disks"] = Table(result["disks"])
    return tuple(data), tuple(data.values())
