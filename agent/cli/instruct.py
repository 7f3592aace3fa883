"""`reeve instruct`: send an instruction through the broker, as a scheduler would."""

from __future__ import annotations

import argparse
import time
from typing import Any

from cliff.columns import FormattableColumn

from agent.cli.asking import InstructionFailed, failure
from agent.cli.base import Seconds, Show, Table, UsageError, progress
from agent.cli.values import arguments, read_json_object, seconds


class Steps(FormattableColumn[list[dict[str, Any]]]):
    """The steps of an instruction, one a line for a human."""

    def human_readable(self) -> str:
        lines = []
        for step in self._value:
            took = f"{step['seconds']:8.3f} s" if isinstance(step.get("seconds"), (int, float)) else " " * 10
            lines.append(f"{took}  {step.get('state', '')!s:<8} {step.get('title') or step.get('name', '')}")
        return "\n".join(lines)


class Instruct(Show):
    """Send an instruction over the message broker and wait for the answer."""

    examples = (
        ("reeve instruct list", "every domain, as the agent sees it"),
        ("reeve instruct create --json web.json --timeout 60", "arguments from a file; - reads standard input"),
        ("reeve instruct shutdown --arg uuid=5f1c6f0e-…", "arguments one by one"),
        (
            "reeve instruct create --arg name=web --arg image=demo --arg memory_mib=256 --arg metadata.project=p1",
            "dots nest",
        ),
        ("reeve instruct show --arg uuid=5f1c6f0e-… -f json", "the reply for a program"),
    )
    notes = (
        'A value that is JSON (a number, true, null, [..], {..}, "text") is taken as that, anything else as a string.\n'
        "Exit code 0 when the instruction was carried out; 1 when it was refused, failed or not answered in time\n"
        "(code reply.timeout: it may still be carried out; ask again with --id to get its reply)."
    )

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        add = parser.add_argument
        add("verb", metavar="VERB", help="create, destroy, shutdown, reboot, pause, unpause, list, show, …")
        add(
            "--arg", action="append", default=[], metavar="KEY=VALUE", help="one argument; repeatable, wins over --json"
        )
        add("--json", metavar="FILE", help="a JSON object with the arguments; - reads standard input")
        add("--host", help="the host whose agent is addressed (default: this one's name in the configuration)")
        add("--broker", metavar="URL", help="amqp://… or filesystem:///… (default: the agent's)")
        add("--id", metavar="UUID", help="the instruction's id; sending one again asks for its reply again")
        add("--timeout", type=seconds, default=60.0, metavar="SECONDS", help="to wait (default 60)")
        add("--no-deadline", action="store_true", help="the instruction stays valid after the timeout")

    def run(self, parsed_args: argparse.Namespace) -> int:
        self.failure: InstructionFailed | None = None
        code = super().run(parsed_args)
        if self.failure is not None:
            raise self.failure
        return int(code)

    def take_action(self, parsed_args: argparse.Namespace) -> tuple[tuple[str, ...], tuple[object, ...]]:
        args = read_json_object(parsed_args.json) if parsed_args.json else {}
        args.update(arguments(parsed_args.arg))
        data = self._ask(parsed_args, args)
        error = data["error"]
        if error is not None:
            self.failure = failure(error)
        columns = {
            "id": data["id"],
            "host": data["host"],
            "verb": data["verb"],
            "ok": data["ok"],
            "result": Table(data["result"]),
            "error": Table(error),
            "steps": Steps(data["steps"]),
            "accepted": Seconds(data["accepted"]),
            "finished": Seconds(data["finished"]),
        }
        return tuple(columns), tuple(columns.values())

    def _ask(self, parsed_args: argparse.Namespace, args: dict[str, Any]) -> dict[str, Any]:
        from agent.rpc.client import Client  # here: kombu takes its time

        broker = parsed_args.broker or self.connection.broker_url
        host = parsed_args.host or self.connection.host
        if not broker:
            raise UsageError("no broker known: give --broker URL, or --config-file with the agent's configuration")
        timeout = parsed_args.timeout
        with (
            Client(
                broker,
                host,
                tls=self.connection.broker_tls,
                signer=self.connection.signer,
                quorum=self.connection.broker_quorum,
            ) as client,
            progress(f"{host} carries out {parsed_args.verb}"),
        ):
            deadline = None if parsed_args.no_deadline else time.time() + timeout
            ident = client.send(parsed_args.verb, args, instruction_id=parsed_args.id, deadline=deadline)
            return client.wait(ident, timeout).to_json()
