"""Where the processor time of a disk's or network's work goes, by process and by kind of code.

One of the questions of `block.py` or `net.py`, asked of Reeve's side only, while `perf record` takes samples of the
host process and all that it has started. The shares are of these processes' time; with what one request, MiB or
round trip costs they are microseconds for each. Unlike a rate, shares mean something on a busy machine, too.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import block
import net
from common import BenchFailed, Result, count, parser, positive, rounded, run, say
from sides import Node, describe

from hypervisor.toolstack.devices import DiskFormat, DiskSpec, NicSpec

PROCESSES = {
    "reeve-dom": "domain",
    "reeve-nic": "net driver",
    "reeve-disk": "disk driver",
    "slirp4netns": "slirp4netns",
}
CODE = {
    "libunicorn": "engine",
    "[JIT]": "guest code",
    "//anon": "guest code",
    "libpython": "python",
    "[kernel": "kernel",
}
RATE = 997  # a prime: in step with nothing
Ask = Callable[[], tuple[float, float]]


def sort_out(report: str) -> dict[str, dict[str, float]]:
    """The lines ``percent;command;file`` of ``perf report`` as per cent by process and kind of code, largest first.

    :raises BenchFailed: there are none.
    """
    found: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for line in report.splitlines():
        fields = [field.strip() for field in line.split(";")]
        if len(fields) != 3 or not fields[0].endswith("%"):
            continue
        process = next((name for start, name in PROCESSES.items() if fields[1].startswith(start)), "host and switch")
        kind = next((name for start, name in CODE.items() if fields[2].startswith(start)), "other")
        found[process][kind] += float(fields[0][:-1])
    whole = sum(sum(kinds.values()) for kinds in found.values())
    if not whole:
        raise BenchFailed(f"perf has no samples, it says {report[-200:]!r}")
    ordered = sorted(found.items(), key=lambda item: -sum(item[1].values()))
    return {process: {kind: rounded(100 * n / whole) for kind, n in kinds.most_common()} for process, kinds in ordered}


def sampled(node: Node, folder: Path, ask: Ask) -> Result:
    """One question, watched."""
    data = folder / "perf.data"
    pids = ",".join(map(str, node.processes()))
    command = ["perf", "record", "-q", "-e", "cpu-clock", "-F", str(RATE), "-o", str(data), "-p", pids]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as watching:
        try:
            figure, cost = ask()
        finally:
            watching.terminate()
            _, told = watching.communicate(timeout=60)
    report = ["perf", "report", "-i", str(data), "--sort", "comm,dso", "-t", ";", "--stdio"]
    done = subprocess.run(report, capture_output=True, text=True, timeout=120, check=False)
    if done.returncode:
        raise BenchFailed(f"perf report fails: {(told or done.stderr).strip()[-200:]}")
    return {"figure": figure, "cpu_us_each": cost, "percent": sort_out(done.stdout)}


@contextlib.contextmanager
def of_disk(name: str, options: argparse.Namespace, folder: Path) -> Iterator[tuple[Node, Ask]]:
    question = next(each for each in block.QUESTIONS if each.name == name)
    image = block.guest_image(options.images_dir, folder)
    path = block.new_disk(folder / "images", "reeve.img", options)
    with Node(folder, options.images_dir, options.timeout) as node:
        guest = node.create(image, options.memory)
        terminal = block.login(guest.terminal, options)
        node.toolstack.attach_disk(guest.uuid, DiskSpec(id="xvda", path=str(path), format=DiskFormat.RAW))
        block.wait_for(terminal, "xvda", options)
        side = block.Side(terminal, "xvda", node.meter())
        yield node, lambda: block.in_guest(side, question, options)
        node.destroy(guest)


@contextlib.contextmanager
def of_network(name: str, options: argparse.Namespace, folder: Path) -> Iterator[tuple[Node, Ask]]:
    program = net.compile_netload(folder)
    image = net.net_image(options.images_dir, program, folder)
    with Node(folder, options.images_dir, options.timeout, net.NETWORKS) as node:
        guests = [node.create(image, options.memory) for _ in range(2)]
        for number, guest in enumerate(guests):
            node.toolstack.attach_nic(guest.uuid, NicSpec(0, f"00:16:3e:00:00:0{number}", "lan"))
            node.toolstack.attach_nic(guest.uuid, NicSpec(1, f"00:16:3e:00:01:0{number}", "default"))
        side = net.Side(guests[0].terminal, guests[1].terminal, node.meter(), program, options)
        side.set_up()
        yield node, lambda: side.measure(name)
        for guest in guests:
            node.destroy(guest)


def measure(options: argparse.Namespace, folder: Path) -> Result:
    if shutil.which("perf") is None:
        raise BenchFailed("perf is not installed: apt-get install linux-perf")
    results = {}
    for name in options.of:
        inner = folder / name
        inner.mkdir()
        say(f"{name}: booting")
        with (of_network if name in net.NAMES else of_disk)(name, options, inner) as (node, ask):
            ask()  # what is translated once and for all is not what is asked for
            results[name] = sampled(node, inner, ask)
            about = describe(node, None)
    return {"results": results, "percent_of": "the processor time of Reeve's processes", "with": about}


def table(result: Result) -> list[list[object]]:
    rows: list[list[object]] = [["", "process", "code", "%", "us each"]]
    for name, found in result["results"].items():
        for process, kinds in found["percent"].items():
            rows += [[name, process, kind, n, rounded(n * found["cpu_us_each"] / 100)] for kind, n in kinds.items()]
    return rows


def main(argv: list[str] | None = None) -> int:
    options = parser(__doc__)
    names = [*net.NAMES, *(question.name for question in block.QUESTIONS)]
    options.add_argument("of", nargs="+", choices=names, metavar="QUESTION", help=f"what to ask: {', '.join(names)}")
    options.add_argument("--time", type=positive, default=5.0, metavar="SECONDS", help="for each rate (%(default)s)")
    options.add_argument("--count", type=count, default=1000, help="round trips (%(default)s)")
    options.add_argument("--memory", type=count, default=256, metavar="MIB", help="of each guest (%(default)s)")
    options.add_argument("--size", type=count, default=256, metavar="MIB", help="of the disk (%(default)s)")
    options.set_defaults(format="raw")
    return run(options.parse_args(argv), "where", measure, table)


if __name__ == "__main__":
    sys.exit(main())
