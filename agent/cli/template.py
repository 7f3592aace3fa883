"""`reeve template`: suspended guests from which domains begin."""

from __future__ import annotations

import argparse
import uuid

from agent.cli.base import List, Seconds, Show, Table, find_domain, plain, progress
from agent.cli.values import seconds
from hypervisor.toolstack.api import TemplateInfo

LIST_COLUMNS = ("name", "memory_mib", "vcpus", "bytes", "created_at", "users")


class TemplateCreate(Show):
    """Have a guest suspend and keep it as a template, memory and all; the domain is gone then."""

    examples = (
        ("reeve template create web --from-domain web-1", "its memory, from which `reeve domain create` begins"),
        (
            "reeve template create web --from-domain web-1 --keep-running",
            "the guest goes on; it must not write to disks",
        ),
    )
    notes = (
        "A guest that does not suspend within --wait runs on: exit code 1 (domain.timeout). What the guest knows is in"
        " the template: keys and passwords too."
    )

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("name", metavar="NAME", help="of the template, a new one")
        parser.add_argument("--from-domain", required=True, metavar="NAME|UUID", help="which domain")
        parser.add_argument("--keep-running", action="store_true", help="let the guest go on afterwards")
        parser.add_argument("--wait", type=seconds, default=60.0, metavar="SECONDS", help="for the guest (default 60)")

    def take_action(self, parsed_args: argparse.Namespace) -> tuple[tuple[str, ...], tuple[object, ...]]:
        with self.toolstack() as toolstack:
            info = find_domain(toolstack, parsed_args.from_domain)
            with progress(f"keeping {info.memory_mib} MiB"):
                made = toolstack.template_create(
                    info.uuid,
                    parsed_args.name,
                    ident=str(uuid.uuid4()),
                    keep_running=parsed_args.keep_running,
                    timeout=parsed_args.wait,
                )
        return _shown(made)


class TemplateList(List):
    """List the templates of this host."""

    examples = (("reeve template list", "all of them"), ("reeve template list -f json", "for a program"))

    def take_action(self, parsed_args: argparse.Namespace) -> tuple[tuple[str, ...], list[tuple[object, ...]]]:
        with self.toolstack() as toolstack:
            found = toolstack.template_list()
        rows: list[tuple[object, ...]] = [
            (t.name, t.spec.memory_mib, t.spec.vcpus, t.bytes, Seconds(t.created_at), len(t.users)) for t in found
        ]
        return LIST_COLUMNS, rows


class TemplateShow(Show):
    """Show one template: what its guest was made from, and the domains that run on its memory."""

    examples = (("reeve template show web -f json", "for a program"),)

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("name", metavar="NAME", help="which template")

    def take_action(self, parsed_args: argparse.Namespace) -> tuple[tuple[str, ...], tuple[object, ...]]:
        with self.toolstack() as toolstack:
            return _shown(toolstack.template_get(parsed_args.name))


class TemplateRemove(Show):
    """Remove a template that no domain runs on."""

    examples = (("reeve template remove web", "exit code 1 (template.in_use) while domains run on its memory"),)

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("name", metavar="NAME", help="which template")
        parser.add_argument("--force", action="store_true", help="also when domains run on it; they go on")

    def take_action(self, parsed_args: argparse.Namespace) -> tuple[tuple[str, ...], tuple[object, ...]]:
        with self.toolstack() as toolstack:
            toolstack.template_remove(parsed_args.name, force=parsed_args.force)
        return ("name", "state"), (parsed_args.name, "gone")


def _shown(info: TemplateInfo) -> tuple[tuple[str, ...], tuple[object, ...]]:
    data = plain(info.to_json())
    data.update(created_at=Seconds(info.created_at), spec=Table(info.spec.to_json()))
    return tuple(data), tuple(data.values())
