"""`reeve placement …`: what OpenStack's Placement says of this host, what of it is wrong, and mending that."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator
from typing import Any

from agent.cli.base import CliError, List, Show, Table, UsageError, progress
from agent.cli.fetched import json_argument
from agent.journal import Journal
from agent.placement import audit
from agent.placement.allocations import Allocations
from agent.placement.build import make_allocations, make_client
from agent.placement.client import Client
from agent.placement.errors import PlacementError
from agent.resources import ResourceClaims

COLUMNS = ("consumer", "name", "kind", "own", "found", "wanted")


class Incomplete(CliError):
    code = "cli.incomplete"
    retryable = True


class _Placement:
    """What the three commands share; mixed into one of cliff's."""

    @contextlib.contextmanager
    def parts(self) -> Iterator[tuple[Client, str, Allocations, ResourceClaims, dict[str, str]]]:
        """Client, the provider's UUID, its allocations, this host's claims, and its domains' names."""
        settings = self.connection.agent_settings  # type: ignore[attr-defined]
        if not settings.placement.enabled:
            raise CliError("Placement is not told of this host: set [placement] enabled and the rest")
        if not settings.journal_path.is_file():
            raise CliError(f"there is no journal {settings.journal_path}: start reeve-agent, or run this as its user")
        with contextlib.ExitStack() as stack:
            toolstack = stack.enter_context(self.toolstack())  # type: ignore[attr-defined]
            journal = Journal(settings.journal_path)
            stack.callback(journal.close)
            http, client = make_client(settings.placement, lambda seconds: False)
            stack.callback(http.close)
            uuid = settings.placement.provider_uuid or journal.node_id()
            claims = ResourceClaims(
                toolstack, journal, vcpu_ratio=settings.vcpu_ratio, reserved_mib=settings.reserved_memory_mib
            )
            names = {info.uuid: info.name for info in toolstack.list_domains()}
            yield client, uuid, make_allocations(settings.placement, client, uuid), claims, names


class PlacementShow(_Placement, Show):
    """Show this host's resource provider as Placement has it."""

    examples = (
        ("reeve placement show", "inventory with what is used, traits, aggregates, how many allocations are wrong"),
        ("reeve placement show --json", "the same for a program"),
    )

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        json_argument(parser)

    def take_action(self, parsed_args: argparse.Namespace) -> tuple[tuple[str, ...], tuple[object, ...]]:
        with self.parts() as (client, uuid, allocations, claims, _names):
            provider = client.provider(uuid)
            if provider is None:
                raise PlacementError(
                    "placement.no_provider",
                    f"Placement has no resource provider {uuid}: start reeve-agent and look at its log",
                )
            rows = allocations.found()
            used: dict[str, int] = {}
            for resources in rows.values():
                for name, amount in resources.items():
                    used[name] = used.get(name, 0) + amount
            data: dict[str, Any] = {
                "uuid": uuid,
                "name": provider.name,
                "generation": provider.generation,
                "inventories": {
                    name: {**found, "used": used.get(name, 0)} for name, found in client.inventories(uuid)[1].items()
                },
                "traits": sorted(client.traits(uuid)[1]),
                "aggregates": sorted(client.aggregates(uuid)[1]),
                "allocations": len(rows),
                "differences": len(audit.audit(allocations, claims)),
            }
        columns = {name: Table(value) if isinstance(value, dict | list) else value for name, value in data.items()}
        return tuple(columns), tuple(columns.values())


class PlacementAudit(_Placement, List):
    """List the allocations of this host that are wrong: orphans, missing ones, wrong amounts."""

    examples = (
        ("reeve placement audit", "an empty table: all is right"),
        ("reeve placement audit --json", "for a program"),
    )
    notes = (
        "kind is orphan (an allocation and no domain), missing (a domain and no allocation) or amount. own says\n"
        "whether the agents may write it: what they may not is a scheduler's to mend. It is looked twice, a second\n"
        "apart, so that what is only just changing is not listed."
    )

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        json_argument(parser)

    def take_action(self, parsed_args: argparse.Namespace) -> tuple[tuple[str, ...], list[tuple[object, ...]]]:
        with self.parts() as (_client, _uuid, allocations, claims, names), progress("Placement and domains compared"):
            found = audit.audit(allocations, claims)
        return COLUMNS, [_row(item, names) for item in found]


class PlacementRepair(_Placement, List):
    """Mend the allocations of this host that are wrong and provably its own, and say what was done."""

    examples = (
        ("reeve placement repair", "one line for each that was wrong"),
        ("reeve placement repair --json", "for a program"),
    )
    notes = (
        "result is written, removed, foreign (not ours: left alone), right or changed (it had changed meanwhile), or\n"
        "failed, with the reason; then the exit code is 1 (cli.incomplete). An agent that runs with [placement]\n"
        "allocations = write does the same by itself. Which domains there are is what the configured driver says:\n"
        "--driver, --socket and --driver-setting are not taken here."
    )

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        json_argument(parser)

    def run(self, parsed_args: argparse.Namespace) -> int:
        self.failure: CliError | None = None
        code = super().run(parsed_args)
        if self.failure is not None:
            raise self.failure
        return int(code)

    def take_action(self, parsed_args: argparse.Namespace) -> tuple[tuple[str, ...], list[tuple[object, ...]]]:
        if self.connection.overridden:
            # Another host's domains would make orphans of all of ours.
            raise UsageError("placement repair takes the configured driver only: leave --driver and the like out")
        with self.parts() as (_client, _uuid, allocations, claims, names), progress("allocations mended"):
            found = audit.repair(allocations, claims)
        failed = [item for item in found if item.error is not None]
        if failed:
            self.failure = Incomplete(f"{len(failed)} of {len(found)} allocations are still wrong: see their errors")
        rows = [
            (*_row(item, names), item.result, Table(item.error.to_json()) if item.error is not None else "")
            for item in found
        ]
        return (*COLUMNS, "result", "error"), rows


def _row(item: audit.Finding, names: dict[str, str]) -> tuple[object, ...]:
    difference = item.difference
    return (
        difference.consumer,
        names.get(difference.consumer, ""),
        difference.kind.value,
        item.own,
        Table(dict(difference.found)),
        Table(dict(difference.wanted)),
    )
