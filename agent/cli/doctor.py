"""`reeve doctor`: what this host can do and what is missing."""

from __future__ import annotations

import argparse
import dataclasses

from agent.cli import checks, xen_checks
from agent.cli.base import EXIT_FAILED, List, progress

COLUMNS = tuple(field.name for field in dataclasses.fields(checks.Finding))


class Doctor(List):
    """Say what this host can do, what is missing, and how to cure it."""

    examples = (
        ("reeve doctor", "a table: check, status, detail, cure"),
        ("reeve doctor -f json", "the same for a program"),
        ("reeve doctor --strict", "warnings count as failures"),
    )
    notes = (
        "Status: ok; warn (this host can do without, or nothing is running yet); missing (needed).\n"
        "Exit code 1 when something is missing."
    )

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--strict", action="store_true", help="exit code 1 for warnings, too")

    def run(self, parsed_args: argparse.Namespace) -> int:
        self.bad = False
        code = super().run(parsed_args)
        return EXIT_FAILED if self.bad else int(code)

    def take_action(self, parsed_args: argparse.Namespace) -> tuple[tuple[str, ...], list[tuple[object, ...]]]:
        with progress("looking at this host"):
            findings = checks.run_all(self.connection)
            if self.connection.driver == "xl":
                findings += xen_checks.run_all(self.connection.settings)
        bad = {checks.Status.MISSING} | ({checks.Status.WARN} if parsed_args.strict else set())
        self.bad = any(finding.status in bad for finding in findings)
        return COLUMNS, [(f.check, f.status.value, f.detail, f.cure) for f in findings]
