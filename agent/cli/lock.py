"""`reeve lock` and `reeve cancel`: which instruction has which domain, and how it ends. The agent is asked."""

from __future__ import annotations

import argparse

from agent.cli.asking import AgentCommand
from agent.cli.base import List, Seconds, Show, Table
from agent.cli.values import seconds

COLUMNS = ("domain", "instruction", "verb", "step", "state", "since", "seconds", "waiting")


class LockList(AgentCommand, List):
    """List the domains that an instruction has to itself: which one, since when, and which ones wait."""

    examples = (
        ("reeve lock list", "the oldest first"),
        ("reeve lock list --json", "the same for a program"),
    )
    notes = "state: queued (it waits for a worker), running, abandoned (whoever carried it out has ended)."

    def take_action(self, parsed_args: argparse.Namespace) -> tuple[tuple[str, ...], list[tuple[object, ...]]]:
        locks = self.ask("locks", {})["locks"]
        shown = [lock | {"since": Seconds(lock["since"]), "waiting": Table(lock["waiting"])} for lock in locks]
        return COLUMNS, [tuple(lock[column] for column in COLUMNS) for lock in shown]


class LockBreak(AgentCommand, Show):
    """Let the next instruction of a domain begin although the one before it has not ended."""

    examples = (
        ("reeve lock break 5f1c6f0e-…", "where whoever carried it out is gone"),
        ("reeve lock break 5f1c6f0e-… --force", "also beside one that works; `reeve cancel` is nearly always better"),
    )

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        super().add_arguments(parser)
        parser.add_argument("domain", metavar="UUID", help="as `reeve lock list` shows it")
        parser.add_argument("--force", action="store_true", help="also from an instruction that works: it goes on")

    def take_action(self, parsed_args: argparse.Namespace) -> tuple[tuple[str, ...], tuple[object, ...]]:
        lock = self.ask("break_lock", {"domain": parsed_args.domain, "force": parsed_args.force})
        lock |= {"since": Seconds(lock["since"]), "waiting": Table(lock["waiting"])}
        return tuple(lock), tuple(lock.values())


class Cancel(AgentCommand, Show):
    """End an instruction: one that is queued at once, one that runs at its next step."""

    examples = (
        ("reeve cancel 0b0ea4c8-…", "and wait 5 s for what becomes of it"),
        ("reeve cancel 0b0ea4c8-… --wait 0 --json", "only say it"),
    )
    notes = (
        "outcome: cancelled (it was not begun), undone, finished (it ended by itself, or was past taking back),\n"
        "cancelling (not yet: it gives way at its next step), too_late (it had ended before)."
    )

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        super().add_arguments(parser)
        parser.add_argument("id", metavar="UUID", help="of the instruction, as `reeve lock list` shows it")
        parser.add_argument("--wait", type=seconds, default=5.0, metavar="SECONDS", help="at most 10 (default 5)")

    def take_action(self, parsed_args: argparse.Namespace) -> tuple[tuple[str, ...], tuple[object, ...]]:
        found = self.ask("cancel", {"id": parsed_args.id, "wait": parsed_args.wait})
        found |= {"error": Table(found["error"]), "steps": Table([step["name"] for step in found["steps"]])}
        return tuple(found), tuple(found.values())
