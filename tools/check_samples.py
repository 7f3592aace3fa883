"""Compare the sample configuration with the options that the code registers.

``etc/reeve/NAME.conf.sample`` (or ``NAME.conf``) belongs to the entry point
``reeve.NAME`` of group ``oslo.config.opts``, which ``oslo-config-generator``
uses too. Every option must be in its sample, either set or commented out with its
default as ``#name = value``, and every such line must be an option.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import re
from pathlib import Path
from typing import Any

NAMESPACE = "oslo.config.opts"
Key = tuple[str, str]


@dataclasses.dataclass(frozen=True, slots=True)
class Line:
    """An option as a sample shows it; `number` counts from 1."""

    number: int
    value: str
    commented: bool


def default_text(option: Any) -> str:
    """An oslo.config option's default, as a sample writes it."""
    value = option.sample_default if option.sample_default is not None else option.default
    if value is None:
        return "<None>"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return ",".join(str(item) for item in value)
    if isinstance(value, dict):
        return ",".join(f"{key}:{item}" for key, item in value.items())
    return str(value)


def registered() -> dict[str, dict[Key, str]]:
    """Sample's name → (group, option) → default."""
    found: dict[str, dict[Key, str]] = {}
    for point in importlib.metadata.entry_points(group=NAMESPACE):
        if point.name.startswith("reeve."):
            found[point.name.removeprefix("reeve.")] = {
                (str(group or "DEFAULT"), option.dest): default_text(option)
                for group, options in point.load()()
                for option in options
            }
    return found


def mentioned(text: str) -> dict[Key, Line]:
    """(group, option) → where and how a sample shows it. Prose comments begin with ``# ``."""
    group, found = "DEFAULT", {}
    for number, line in enumerate(text.splitlines(), 1):
        if header := re.fullmatch(r"\[(\S+)\]", line.strip()):
            group = header[1]
        elif option := re.match(r"(#?)([a-z][a-z0-9_]*) ?=\s*(.*)", line):
            found[group, option[2]] = Line(number, option[3].strip(), bool(option[1]))
    return found


def compare(path: Path, wanted: dict[Key, str]) -> list[str]:
    """One line for each option that `path` lacks, has too many or shows with another default."""
    shown = mentioned(path.read_text())
    problems = [f"{path}: [{group}] {option} is not shown" for group, option in sorted(set(wanted) - set(shown))]
    for (group, option), line in shown.items():
        place = f"{path}:{line.number}: [{group}] {option}"
        if (group, option) not in wanted:
            problems.append(f"{place} is no option")
        elif line.commented and line.value != wanted[group, option]:
            problems.append(f"{place} is shown as {line.value!r}, but its default is {wanted[group, option]!r}")
    return problems


def sample_problems(etc: Path) -> list[str]:
    """All that is wrong with the samples under `etc`."""
    options = registered()
    if not options:
        return [f"no entry point reeve.* in group {NAMESPACE}: nothing to check the sample configuration with"]
    problems = []
    for name, wanted in sorted(options.items()):
        candidates = [etc / "reeve" / f"{name}.conf.sample", etc / "reeve" / f"{name}.conf"]
        path = next((candidate for candidate in candidates if candidate.exists()), None)
        problems += (
            compare(path, wanted) if path else [f"{candidates[0]}: no such file, but its options are registered"]
        )
    return problems
