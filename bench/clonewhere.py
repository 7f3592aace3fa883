"""Where the milliseconds and the memory of a clone go: stages from the logs, memory by kind of mapping from smaps."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from common import median, rounded

MIB = 1 << 20
_STAGE = re.compile(r"stage (\w+) ([0-9.]+) ([0-9.]+)$", re.M)
_HEAD = re.compile(r"^[0-9a-f]+-[0-9a-f]+ (\S{4}) \S+ \S+ \S+ *(.*)$")

Stage = tuple[str, float, float]
"""Process and name, seconds after the message, seconds of CPU time of its thread until then."""


def stages(logs: Mapping[str, Path], began: float, ended: float) -> list[Stage]:
    """Between two times of the monotonic clock, in order. :param logs: by name of the process."""
    found = []
    for process, path in logs.items():
        for name, at, cpu in _STAGE.findall(path.read_text(errors="replace")):
            if began <= float(at) <= ended:
                found.append((f"{process}: {name}", float(at) - began, float(cpu)))
    return sorted(found, key=lambda stage: stage[1])


def summed(clones: Sequence[Sequence[Stage]]) -> list[dict[str, object]]:
    """Medians over the clones, of the stages that each has: when it was over, and the CPU time since its process's
    stage before."""
    rows = []
    for name, _, _ in clones[-1]:
        times, costs = [], []
        for clone in clones:
            before = 0.0
            for other, at, cpu in clone:
                if other == name:
                    times.append(at)
                    costs.append(cpu - before)
                    break
                if other.partition(":")[0] == name.partition(":")[0]:
                    before = cpu
        rows.append({"stage": name, "after_ms": rounded(median(times) * 1000), "cpu_ms": rounded(median(costs) * 1000)})
    return rows


def kind(rights: str, name: str) -> str:
    """What a mapping of a domain process is."""
    if "x" in rights and "w" in rights:
        return "translations"
    if name.startswith("/memfd:reeve-"):
        return "memfd"
    if name.endswith("/memory"):
        return "guest_private"
    if name.startswith("/"):
        return "files"
    return "heap" if name == "[heap]" else "anonymous"


def areas(lines: Iterable[str]) -> Iterator[tuple[str, dict[str, int]]]:
    """Of /proc/PID/smaps: kind and bytes by name, of each mapping."""
    what, found = "", dict[str, int]()
    for line in lines:
        if head := _HEAD.match(line):
            if what:
                yield what, found
            what, found = kind(head[1], head[2]), {}
        elif line.endswith("kB\n"):
            name, value = line.split()[:2]
            found[name.rstrip(":")] = int(value) * 1024
    if what:
        yield what, found


def memory(pids: Sequence[int]) -> dict[str, dict[str, float]]:
    """MiB by kind, the mean over the processes: ``pss``, and of that ``dirty``, which is a process's alone."""
    total: dict[str, dict[str, float]] = {}
    for pid in pids:
        with open(f"/proc/{pid}/smaps", encoding="ascii", errors="replace") as lines:
            for what, found in areas(lines):
                row = total.setdefault(what, {"pss": 0.0, "dirty": 0.0})
                row["pss"] += found["Pss"] / MIB / len(pids)
                row["dirty"] += found["Private_Dirty"] / MIB / len(pids)
    return {what: {name: rounded(value) for name, value in row.items()} for what, row in sorted(total.items())}
