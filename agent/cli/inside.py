"""`reeve domain sysrq` and `reeve domain dump-core`."""

from __future__ import annotations

import argparse
import os

from agent.cli.base import Show, find_domain, progress


class DomainSysrq(Show):
    """Send a magic SysRq key to the guest's kernel. See its answer with console-log."""

    examples = (
        ("reeve domain sysrq web h", "the guest prints what the other keys do"),
        ("reeve domain sysrq web t && reeve domain console-log web", "what every task waits for"),
        ("reeve domain sysrq web c", "crash it, for its own crash dump"),
    )

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("domain", metavar="NAME|UUID", help="which domain")
        parser.add_argument("key", metavar="KEY", help="one letter or digit")

    def take_action(self, parsed_args: argparse.Namespace) -> tuple[tuple[str, ...], tuple[object, ...]]:
        with self.toolstack() as toolstack:
            info = find_domain(toolstack, parsed_args.domain)
            toolstack.sysrq(info.uuid, parsed_args.key)
        return ("uuid", "name", "key"), (info.uuid, info.name, parsed_args.key)


class DomainDumpCore(Show):
    """Write a guest's memory and registers to a new file."""

    examples = (
        ("reeve domain dump-core web web.core", "the file has mode 0600: it holds all that the guest knows"),
        ("reeve domain pause web && reeve domain dump-core web web.core", "of one moment"),
    )

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("domain", metavar="NAME|UUID", help="which domain")
        parser.add_argument("path", metavar="FILE", help="a new file, on the host that runs the domain")

    def take_action(self, parsed_args: argparse.Namespace) -> tuple[tuple[str, ...], tuple[object, ...]]:
        path = os.path.abspath(parsed_args.path)
        with self.toolstack() as toolstack:
            info = find_domain(toolstack, parsed_args.domain)
            with progress(f"writing {info.memory_mib} MiB"):
                toolstack.dump_core(info.uuid, path)
        return ("uuid", "name", "path", "bytes"), (info.uuid, info.name, path, os.stat(path).st_size)
