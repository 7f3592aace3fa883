"""`reeve domain resize`: the plugin's plan, on this machine, with a progress bar."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

from agent.api import Step
from agent.cli.base import Show, Table, UsageError, find_domain, plain
from agent.cli.local import carry_out
from agent.cli.values import memory_mib, pair, seconds, size_bytes

_SIZES = ("vcpus", "memory", "max_vcpus", "max_memory", "weight", "cap", "disk")


class DomainResize(Show):
    """Change a domain's vCPUs, memory, disks and share of the CPU; while it runs, or by a restart."""

    examples = (
        ("reeve domain resize web --vcpus 4 --memory 768M", "while it runs, up to the maxima it was started with"),
        ("reeve domain resize web --disk xvda=20G", "a larger disk; disks are never made smaller"),
        ("reeve domain resize web --weight 512 --cap 150", "twice the usual share, at most one and a half CPUs"),
        ("reeve domain resize web --memory 8G --mode auto", "restart it if that is what it takes"),
        ("reeve domain resize web --confirm", "keep what a restart changed"),
        ("reeve domain resize web --revert", "or restart it with the old size"),
    )
    notes = (
        "Live, a guest that does not follow within --wait is put back to what it had: exit code 1 (domain.timeout).\n"
        "By a restart the old size is kept until --confirm or --revert. Memory that the guest cannot do without is\n"
        "refused (domain.memory_too_small). The same as an instruction: `reeve instruct resize`."
    )

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        add = parser.add_argument
        add("domain", metavar="NAME|UUID", help="which domain")
        add("--vcpus", type=int, metavar="N", help="vCPUs online")
        add("--memory", type=memory_mib, metavar="SIZE", help="MiB, or with a unit: 768M, 2G")
        add("--max-vcpus", type=int, metavar="N", help="most it may ever have; needs a restart")
        add("--max-memory", type=memory_mib, metavar="SIZE", help="likewise")
        add("--disk", action="append", default=[], metavar="ID=SIZE", help="for example xvda=20G; repeatable")
        add("--weight", type=int, metavar="N", help="1 to 65535, 256 being usual")
        add("--cap", type=int, metavar="PERCENT", help="most CPU it gets, percent of one CPU; 0: no cap")
        add(
            "--mode",
            choices=["live", "cold", "auto"],
            help="live (default): no restart; cold: restart; auto: if need be",
        )
        add("--wait", type=seconds, default=60.0, metavar="SECONDS", help="for the guest, each thing (default 60)")
        add("--force", action="store_true", help="end a guest that does not stop for a restart, or that is paused")
        add("--no-confirm", action="store_true", help="keep no way back from a restart")
        group = parser.add_mutually_exclusive_group()
        group.add_argument("--confirm", action="store_true", help="keep the size after a restart")
        group.add_argument("--revert", action="store_true", help="restart it with the size before")

    def take_action(self, parsed_args: argparse.Namespace) -> tuple[tuple[str, ...], tuple[object, ...]]:
        verb, args = _instruction(parsed_args)
        with self.toolstack() as toolstack:
            info = find_domain(toolstack, parsed_args.domain)
            with progress_bar() as tell:
                result = carry_out(verb, {"uuid": info.uuid, **args}, toolstack, info, tell)
        domain = plain(result["domain"])
        names = ("uuid", "name", "domid", "state", "vcpus", "max_vcpus", "memory_mib", "max_memory_mib")
        data = {name: domain[name] for name in names}
        data |= {"mode": result.get("mode", "cold"), "pending": Table(result.get("pending"))}
        data["disks"] = Table(result.get("disks", {}))
        return tuple(data), tuple(data.values())


def _instruction(parsed_args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """The verb and its arguments. :raises UsageError: nothing asked for, or what excludes another thing."""
    asked = [name for name in _SIZES if getattr(parsed_args, name) not in (None, [])]
    waits = {"wait_seconds": parsed_args.wait}
    if parsed_args.confirm or parsed_args.revert:
        if asked:
            raise UsageError(f"--{asked[0].replace('_', '-')} does not go with --confirm or --revert")
        return (
            ("confirm_resize", {}) if parsed_args.confirm else ("revert_resize", waits | {"force": parsed_args.force})
        )
    if not asked:
        raise UsageError("nothing to change: give --vcpus, --memory, --disk, --weight or --cap")
    values = {
        "vcpus": parsed_args.vcpus,
        "memory_mib": parsed_args.memory,
        "max_vcpus": parsed_args.max_vcpus,
        "max_memory_mib": parsed_args.max_memory,
        "weight": parsed_args.weight,
        "cap": parsed_args.cap,
        "mode": parsed_args.mode,
        "disks": _disks(parsed_args.disk) or None,
        "force": parsed_args.force,
        "confirm": not parsed_args.no_confirm,
    }
    return "resize", waits | {name: value for name, value in values.items() if value is not None}


def _disks(texts: list[str]) -> dict[str, int]:
    found: dict[str, int] = {}
    for text in texts:
        ident, size = pair(text)
        if ident in found:
            raise UsageError(f"--disk {ident} is given twice")
        try:
            found[ident] = size_bytes(size)
        except argparse.ArgumentTypeError as exc:
            raise UsageError(str(exc)) from None
    return found


@contextlib.contextmanager
def progress_bar() -> Iterator[Callable[[Step, dict[str, Any]], None]]:
    """What hears of progress: a bar on standard error, nothing when that is no terminal."""
    if not sys.stderr.isatty():
        yield lambda step, data: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[what]}"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=None, what="")

        def tell(step: Step, data: dict[str, Any]) -> None:
            if data:
                what = f"{data['done']:g} of {data['total']:g} {data['unit']}"
                bar.update(task, completed=data["done"], total=data["total"], what=what)
            else:
                bar.reset(task, description=step.title, total=None, what="")

        yield tell
