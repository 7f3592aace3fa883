"""`reeve domain save` and `reeve domain restore`."""

from __future__ import annotations

import argparse
import os

from agent.cli import firstboot
from agent.cli.base import Show, find_domain, plain, progress, show_domain
from agent.cli.domain import OPERATOR
from agent.cli.values import seconds


class DomainSave(Show):
    """Have a guest suspend and write it to a new file, memory and all; the domain is gone then."""

    examples = (
        ("reeve domain save web web.save", "the file has mode 0600: it holds all that the guest knows"),
        ("reeve domain save web web.save --keep-running", "a checkpoint: the guest goes on"),
    )
    notes = (
        "A guest that does not suspend within --wait runs on: exit code 1 (domain.timeout). Disks are not in the file."
    )

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("domain", metavar="NAME|UUID", help="which domain")
        parser.add_argument("path", metavar="FILE", help="a new file, on the host that runs the domain")
        parser.add_argument("--keep-running", action="store_true", help="let the guest go on afterwards")
        parser.add_argument("--wait", type=seconds, default=60.0, metavar="SECONDS", help="for the guest (default 60)")

    def take_action(self, parsed_args: argparse.Namespace) -> tuple[tuple[str, ...], tuple[object, ...]]:
        with self.toolstack() as toolstack:
            info, path = find_domain(toolstack, parsed_args.domain), os.path.abspath(parsed_args.path)
            firstboot.keep_drive(info.uuid, path, self.connection.config_drive_dir)
            with progress(f"saving {info.memory_mib} MiB"):
                saved = toolstack.save(
                    info.uuid,
                    path,
                    keep_running=parsed_args.keep_running,
                    timeout=parsed_args.wait,
                )
        data = plain(saved.to_json())
        return tuple(data), tuple(data.values())


class DomainRestore(Show):
    """Build a domain from a saved file and let it run on."""

    examples = (
        ("reeve domain restore web.save", "as it was"),
        ("reeve domain restore web.save --name web2 --uuid $(uuidgen)", "beside the one that was kept running"),
        ("reeve domain restore web.save --paused", "`reeve domain unpause` lets it run"),
    )

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("path", metavar="FILE", help="a file that `reeve domain save` made")
        parser.add_argument("--name", default="", help="another name than the saved one's")
        parser.add_argument("--uuid", default="", help="another UUID")
        parser.add_argument("--paused", action="store_true", help="leave it paused")

    def take_action(self, parsed_args: argparse.Namespace) -> tuple[tuple[str, ...], tuple[object, ...]]:
        with self.toolstack() as toolstack, progress(f"reading {parsed_args.path}"):
            info = toolstack.restore(
                os.path.abspath(parsed_args.path), owner=OPERATOR, name=parsed_args.name, uuid=parsed_args.uuid
            )
            if not parsed_args.paused:
                toolstack.unpause(info.uuid)
            return show_domain(toolstack.get_domain(info.uuid))
