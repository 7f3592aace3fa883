"""Compare the sample configuration with the options that the code registers.

``etc/reeve/NAME.conf`` belongs to the entry point ``reeve.NAME`` of group
``oslo.config.opts`` (what ``oslo-config-generator`` uses too). Every option must
be in its sample, commented out with its default or set, and every line of a
sample must be an option.
"""

from __future__ import annotations

import importlib.metadata
import re
from pathlib import Path

NAMESPACE = "oslo.config.opts"
Option = tuple[str, str]


def registered() -> dict[str, set[Option]]:
    """Sample's name → (group, option) pairs."""
    found: dict[str, set[Option]] = {}
    for point in importlib.metadata.entry_points(group=NAMESPACE):
        if point.name.startswith("reeve."):
            groups = point.load()()
            found[point.name.removeprefix("reeve.")] = {
                (str(group or "DEFAULT"), option.dest) for group, options in groups for option in options
            }
    return found


def mentioned(text: str) -> dict[Option, int]:
    """(group, option) → line, of options that a sample sets or shows commented out as ``#name = value``."""
    group, found = "DEFAULT", {}
    for number, line in enumerate(text.splitlines(), 1):
        if header := re.fullmatch(r"\[(\S+)\]", line.strip()):
            group = header[1]
        elif option := re.match(r"#?([a-z][a-z0-9_]*) ?=", line):
            found[group, option[1]] = number
    return found


def sample_problems(etc: Path) -> list[str]:
    """One line for each option without a sample and each sample line without an option."""
    problems = []
    options = registered()
    if not options:
        problems.append(f"no entry point reeve.* in group {NAMESPACE}: nothing to check the sample configuration with")
    for name, wanted in sorted(options.items()):
        path = etc / "reeve" / f"{name}.conf"
        if not path.exists():
            problems.append(f"{path}: no such file, but its options are registered")
            continue
        shown = mentioned(path.read_text())
        problems += [f"{path}: [{group}] {option} is not shown" for group, option in sorted(wanted - set(shown))]
        problems += [
            f"{path}:{shown[item]}: [{item[0]}] {item[1]} is no option" for item in sorted(set(shown) - wanted)
        ]
    return problems
