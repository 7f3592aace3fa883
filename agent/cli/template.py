"""`reeve template`: suspended guests from which domains begin."""

from __future__ import annotations

import argparse
import dataclasses
import uuid
from typing import Any

from agent.cli.base import List, Seconds, Show, Table, UsageError, find_domain, plain, progress
from agent.cli.devices import disk_of, nic_of
from agent.cli.values import pair, seconds
from agent.from_template import missing_disks, missing_nics
from hypervisor.toolstack.api import DomainSpec, OnEvent, TemplateInfo
from hypervisor.toolstack.devices import DiskSpec, NicSpec

GIVEN = (
    "spec",
    "image",
    "kernel",
    "ramdisk",
    "cmdline",
    "loader",
    "memory",
    "max_memory",
    "vcpus",
    "max_vcpus",
    "type",
)

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


def spec_of(template: TemplateInfo, parsed_args: argparse.Namespace, owner: str) -> DomainSpec:
    """Of a domain that `reeve domain create --from-checkpoint` makes.

    :raises UsageError: an option that says what the template says, or a disk is missing. :raises SpecInvalid.
    """
    if said := [name for name in GIVEN if getattr(parsed_args, name) is not None]:
        option = said[0].replace("_", "-")
        raise UsageError(f"--{option} and --from-checkpoint: the guest has one already, leave it out")
    if not parsed_args.name:
        raise UsageError("no name given: reeve domain create NAME …")
    disks = [DiskSpec.from_json(disk_of(text)) for text in parsed_args.disk or ()]
    read, written = missing_disks(template, {disk.id for disk in disks})
    if written:
        disk = written[0]
        raise UsageError(
            f"the guest writes to its disk {disk.id}: give this domain its own, with --disk {disk.id}=NEW,format=qcow2,"
            f" after `qemu-img create -f qcow2 -F {disk.format} -b {disk.path} NEW`"
        )
    nics = [NicSpec.from_json(nic_of(text, number)) for number, text in enumerate(parsed_args.nic or ())]
    events = {f"on_{name}": getattr(parsed_args, f"on_{name}") for name in ("poweroff", "reboot", "crash")}
    changes: dict[str, Any] = {name: OnEvent(value) for name, value in events.items() if value is not None}
    numbers = {name: getattr(parsed_args, name) for name in ("weight", "cap")}
    changes |= {name: value for name, value in numbers.items() if value is not None}
    made = dataclasses.replace(
        template.spec,
        uuid=parsed_args.uuid or str(uuid.uuid4()),
        name=parsed_args.name,
        owner=owner,
        metadata=tuple(sorted(pair(item) for item in parsed_args.metadata)),
        disks=tuple(sorted((*disks, *read), key=lambda disk: disk.id)),
        nics=(*nics, *missing_nics(template, {nic.id for nic in nics})),
        **changes,
    )
    made.validate()
    return made


def _shown(info: TemplateInfo) -> tuple[tuple[str, ...], tuple[object, ...]]:
    data = plain(info.to_json())
    data.update(created_at=Seconds(info.created_at), spec=Table(info.spec.to_json()))
    return tuple(data), tuple(data.values())
