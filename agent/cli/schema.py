"""`reeve schema`: what the messages look like, for programs."""

from __future__ import annotations

import argparse
import json

from agent import schemas
from agent.cli.base import Common, UsageError
from agent.loader import load_verbs


class Schema(Common):
    """Print the JSON Schema of instructions, replies and reports.

    With a VERB that of its instruction, the message as a whole; what a caller by oslo.messaging gives is its property
    `args`. Without one all there are, plugins of other distributions included.
    """

    examples = (
        ("reeve schema", "every schema: instructions by verb, reply, report"),
        ("reeve schema create", "of the instruction create"),
        ("reeve schema --reply", "of the answers"),
    )
    notes = "The output is always JSON."

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        which = parser.add_mutually_exclusive_group()
        which.add_argument("verb", nargs="?", metavar="VERB", help="only the instruction of this verb")
        which.add_argument("--reply", action="store_true", help="only the reply")
        which.add_argument("--report", action="store_true", help="only the reports")

    def take_action(self, parsed_args: argparse.Namespace) -> int:
        self.app.stdout.write(json.dumps(self._wanted(parsed_args), indent=2, ensure_ascii=False) + "\n")
        return 0

    def _wanted(self, parsed_args: argparse.Namespace) -> dict[str, object]:
        if parsed_args.reply:
            return schemas.reply()
        if parsed_args.report:
            return schemas.report()
        verbs, _broken = load_verbs()
        plugins = {name: verb.plugin for name, verb in verbs.items()}
        if parsed_args.verb is None:
            return schemas.everything(plugins)
        if parsed_args.verb not in plugins:
            raise UsageError(f"there is no verb {parsed_args.verb!r}: give one of {', '.join(sorted(plugins))}")
        return schemas.instruction(plugins[parsed_args.verb])
