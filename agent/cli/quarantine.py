"""`reeve quarantine`: messages that the agent refused. It is asked over the broker, as a scheduler would."""

from __future__ import annotations

import argparse

from agent.cli.asking import AgentCommand
from agent.cli.base import List, Seconds, Show, Table, UsageError

COLUMNS = ("seq", "received", "code", "size", "dialect", "reply_to", "whole", "reason")


class OneMessage(AgentCommand, Show):
    """A command about one of them."""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        super().add_arguments(parser)
        parser.add_argument("seq", type=int, metavar="NUMBER", help="as `reeve quarantine list` shows it")


class QuarantineList(AgentCommand, List):
    """List the messages that the agent refused, oldest first."""

    examples = (
        ("reeve quarantine list", "which, when, why"),
        ("reeve quarantine list --json", "the same for a program; times are seconds since the epoch"),
    )

    def take_action(self, parsed_args: argparse.Namespace) -> tuple[tuple[str, ...], list[tuple[object, ...]]]:
        messages = self.ask("quarantine_list", {})["messages"]
        shown = [item | {"received": Seconds(item["received"])} for item in messages]
        return COLUMNS, [tuple(item[column] for column in COLUMNS) for item in shown]


class QuarantineShow(OneMessage):
    """Show a refused message as it came: headers and body, too."""

    examples = (
        ("reeve quarantine show 12", "everything that is known of it"),
        ("reeve quarantine show 12 -f value -c body", "its body; base64 where body_encoding says so"),
    )

    def take_action(self, parsed_args: argparse.Namespace) -> tuple[tuple[str, ...], tuple[object, ...]]:
        (message,) = self.ask("quarantine_list", {"seq": parsed_args.seq})["messages"]
        data = message | {"received": Seconds(message["received"]), "headers": Table(message["headers"])}
        return tuple(data), tuple(data.values())


class QuarantineRetry(OneMessage):
    """Have the agent take a refused message in as if it came now."""

    examples = (("reeve quarantine retry 12", "after the configuration, or the agent, is another one"),)
    notes = (
        "It takes the way of every message: an id that was carried out before is not carried out again, a deadline\n"
        "that has passed is expired, the reply goes to its sender. What is refused again stays, with the new reason."
    )

    def take_action(self, parsed_args: argparse.Namespace) -> tuple[tuple[str, ...], tuple[object, ...]]:
        data = self.ask("quarantine_retry", {"seq": parsed_args.seq})
        return tuple(data), tuple(data.values())


class QuarantineDrop(AgentCommand, Show):
    """Forget a refused message, or all of them."""

    examples = (
        ("reeve quarantine drop 12", "one"),
        ("reeve quarantine drop --all", "every one"),
    )

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        super().add_arguments(parser)
        parser.add_argument("seq", type=int, nargs="?", metavar="NUMBER", help="as `reeve quarantine list` shows it")
        parser.add_argument("--all", action="store_true", help="every message")

    def take_action(self, parsed_args: argparse.Namespace) -> tuple[tuple[str, ...], tuple[object, ...]]:
        if (parsed_args.seq is None) != parsed_args.all:
            raise UsageError("give either a number or --all")
        data = self.ask("quarantine_drop", {"all": True} if parsed_args.all else {"seq": parsed_args.seq})
        return tuple(data), tuple(data.values())
