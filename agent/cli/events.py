"""`reeve domain events`: what happens to the domains of this host, as it happens."""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import queue
import time

from agent.cli.base import Common, find_domain
from agent.cli.values import seconds
from hypervisor.errors import ToolstackError
from hypervisor.toolstack.api import DomainEvent, Toolstack

LOOK = 0.2
"""Seconds between looks for Ctrl-C, which a wait without end would not see."""


class DomainEvents(Common):
    """Follow what happens to the domains: created, paused, shutdown, crashed, rebooted, destroyed …"""

    examples = (
        ("reeve domain events", "until Ctrl-C, of every domain"),
        ("reeve domain events web --count 1 --timeout 60", "wait for the next thing that happens to one domain"),
        ("reeve domain events -f json", "one JSON object a line, for a program"),
    )
    notes = (
        "Exit code 0 after --count events or --timeout seconds. Events that happen while the host process restarts\n"
        "are not told: a program looks at `reeve domain list -f json` as well."
    )

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        add = parser.add_argument
        add("domain", nargs="?", metavar="NAME|UUID", help="only of this domain")
        add("-f", "--format", choices=["text", "json"], default="text", help="default text; json: one object a line")
        add("--count", type=int, default=0, metavar="N", help="end after so many")
        add("--timeout", type=seconds, metavar="SECONDS", help="end after so long")

    def take_action(self, parsed_args: argparse.Namespace) -> int:
        heard: queue.SimpleQueue[DomainEvent] = queue.SimpleQueue()
        with self.toolstack() as toolstack:
            uuid = find_domain(toolstack, parsed_args.domain).uuid if parsed_args.domain else ""
            names = {info.uuid: info.name for info in toolstack.list_domains()}
            unsubscribe = toolstack.subscribe(heard.put)
            self.say("following; Ctrl-C ends")
            try:
                end = None if parsed_args.timeout is None else time.monotonic() + parsed_args.timeout
                self._follow(toolstack, heard, names, uuid, parsed_args, end)
            finally:
                unsubscribe()
        return 0

    def _follow(
        self,
        toolstack: Toolstack,
        heard: queue.SimpleQueue[DomainEvent],
        names: dict[str, str],
        uuid: str,
        parsed_args: argparse.Namespace,
        end: float | None,
    ) -> None:
        told = 0
        while not parsed_args.count or told < parsed_args.count:
            left = LOOK if end is None else min(LOOK, end - time.monotonic())
            if left < 0:
                return
            try:
                event = heard.get(timeout=left)
            except queue.Empty:
                continue
            if uuid and event.uuid != uuid:
                continue
            told += 1
            name = names.get(event.uuid) or _name(toolstack, event.uuid)
            names[event.uuid] = name
            self.app.stdout.write(_line(event, name, parsed_args.format) + "\n")
            self.app.stdout.flush()


def _name(toolstack: Toolstack, uuid: str) -> str:
    try:
        return toolstack.get_domain(uuid).name
    except ToolstackError:
        return ""  # it is gone already


def _line(event: DomainEvent, name: str, form: str) -> str:
    if form == "json":
        return json.dumps({**dataclasses.asdict(event), "name": name})
    when = datetime.datetime.fromtimestamp(event.time).astimezone().isoformat(sep=" ", timespec="milliseconds")
    detail = " ".join(event.detail.split())
    return f"{when}  {name or event.uuid}  {event.kind}{'  ' + detail if detail else ''}"
