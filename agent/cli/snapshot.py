"""`reeve domain snapshot` and `reeve domain revert`: the agent is asked, for it has the folder of guests' disks."""

from __future__ import annotations

import argparse
from typing import Any

from agent.cli.asking import ask
from agent.cli.base import Show, Table, find_domain, plain
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


def _add_wait(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--wait", type=seconds, default=60.0, metavar="SECONDS", help="for the guest (default 60)")


def _shown(result: dict[str, Any]) -> tuple[tuple[str, ...], tuple[object, ...]]:
    domain = plain(result["domain"])
    data = {name: domain[name] for name in ("uuid", "name", "domid", "state")}
    data |= {name: result[name] for name in ("snapshot", "kept_as") if name in result}
    data["disks"] = Table(result["disks"])
    return tuple(data), tuple(data.values())
