"""What operations cost inside a guest: in Reeve and in QEMU TCG, and on the host for scale.

Boots one guest in each with the same kernel and the same ramdisk, in which bench/guestbench.c is a
static program, and types its name on the guests' consoles: each benchmark first in Reeve, then in QEMU,
then on the host, while the other guest is idle. guestbench measures with the guest's own monotonic clock and
takes the median of five batches. Every figure is a time for one operation.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from common import (
    PROMPT,
    READY,
    BenchFailed,
    Result,
    compare,
    compile_guestbench,
    count,
    guest_image,
    median,
    parser,
    positive,
    qemu_version,
    run,
    say,
)
from sides import Node, QemuGuest, Terminal, describe

BENCHMARKS = {
    "syscall": "getppid, entered and left",
    "fork": "fork, exit in the child, wait",
    "exec": "vfork, exec of a static program, exit, wait",
    "page_fault": "first write to a page of anonymous memory",
    "pipe": "one byte to another process and back",
    "cpu_loop": "1000 instructions of register arithmetic",
    "mem_loop": "1000 words of 1 MiB read, changed, written",
}
LONGEST = 60
"""Batches are found by doubling: how many times the asked-for seconds a benchmark may take at the very worst."""


@dataclasses.dataclass(frozen=True, slots=True)
class Figure:
    """:ivar unit: ``us`` or ``ms``, for one operation."""

    value: float
    unit: str


def parse(name: str, text: str) -> Figure:
    """What guestbench printed for one benchmark. The guest is not trusted to print what was asked for.

    :raises BenchFailed: it failed, or printed something else.
    """
    if failed := re.search(r"BENCH-ERROR (.*)", text):
        raise BenchFailed(f"{name} failed in the guest: {failed[1].strip()[:200]}")
    for line in re.findall(r"^BENCH (\{.*\})\s*$", text, re.M):
        try:
            data: Any = json.loads(line)
            figure = Figure(float(data["value"]), str(data["unit"]))
        except (ValueError, KeyError, TypeError):
            continue
        if data["name"] == name and figure.unit in ("us", "ms") and 0 < figure.value < 1e12:
            return figure
    raise BenchFailed(f"{name}: the guest printed no figure, but {text[-200:]!r}")


def in_guest(terminal: Terminal, name: str, options: argparse.Namespace) -> Figure:
    terminal.type(f"guestbench --time {options.time:g} {name}\r".encode())
    seconds = options.timeout + LONGEST * options.time
    text = terminal.until(rb"BENCH-DONE|BENCH-ERROR[^\n]*\n", seconds).decode(errors="replace")
    terminal.until(PROMPT, options.timeout)
    return parse(name, text)


def on_host(program: Path, name: str, options: argparse.Namespace) -> Figure:
    command = [str(program), "--time", f"{options.time:g}", name]
    seconds = options.timeout + LONGEST * options.time
    done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
    return parse(name, done.stdout)


def login(terminal: Terminal, options: argparse.Namespace) -> Terminal:
    terminal.until(READY, options.timeout)
    terminal.until(PROMPT, options.timeout)
    return terminal


def one(name: str, reeve: Terminal, qemu: Terminal, host: Path, options: argparse.Namespace) -> Result:
    figures: dict[str, list[Figure]] = {"reeve": [], "qemu_tcg": [], "host": []}
    for _ in range(options.rounds):
        figures["reeve"].append(in_guest(reeve, name, options))
        figures["qemu_tcg"].append(in_guest(qemu, name, options))
        figures["host"].append(on_host(host, name, options))
    medians = {side: median([figure.value for figure in found]) for side, found in figures.items()}
    units = {figure.unit for found in figures.values() for figure in found}
    if len(units) != 1:
        raise BenchFailed(f"{name}: units differ ({', '.join(sorted(units))}): is it the same program everywhere?")
    unit = units.pop()
    ratio = compare(medians["reeve"], medians["qemu_tcg"])
    say(f"{name}: Reeve {medians['reeve']:g}, QEMU TCG {medians['qemu_tcg']:g} {unit}, ratio {ratio:g}")
    return {**medians, "unit": unit, "ratio": ratio, "what": BENCHMARKS[name]}


def measure(options: argparse.Namespace, folder: Path) -> Result:
    version = qemu_version()
    host = compile_guestbench(folder)
    image = guest_image(options.images_dir, folder)
    with Node(folder, options.images_dir, options.timeout) as node:
        say("booting a guest in Reeve, then one in QEMU")
        guest = node.create(image, options.memory)
        reeve = login(guest.terminal, options)
        with QemuGuest(image, options.memory) as other:
            qemu = login(other.terminal, options)
            results = {name: one(name, reeve, qemu, host, options) for name in options.only or BENCHMARKS}
        about = describe(node, image)
        node.destroy(guest)
    return {
        "results": results,
        "ratio_means": "reeve / qemu_tcg, both times for one operation: above 1, Reeve is slower",
        "rounds": options.rounds,
        "seconds_each": options.time,
        "memory_mib": options.memory,
        "with": about | {"qemu": version},
    }


def table(result: Result) -> list[list[object]]:
    rows: list[list[object]] = [["", "unit", "Reeve", "QEMU TCG", "host", "ratio"]]
    for name, found in result["results"].items():
        rows.append([name, found["unit"], found["reeve"], found["qemu_tcg"], found["host"], found["ratio"]])
    return rows


def main(argv: list[str] | None = None) -> int:
    options = parser(__doc__)
    options.add_argument("--only", action="append", choices=list(BENCHMARKS), help="measure this; may be repeated")
    options.add_argument("--time", type=positive, default=1.0, metavar="SECONDS", help="for each figure (%(default)s)")
    options.add_argument("--rounds", type=count, default=1, help="figures of each, of which the median counts")
    options.add_argument("--memory", type=count, default=256, metavar="MIB", help="of each guest (%(default)s)")
    return run(options.parse_args(argv), "guest", measure, table)


if __name__ == "__main__":
    sys.exit(main())
