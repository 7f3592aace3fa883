"""What idle domains cost: memory beyond their own, and CPU.

Makes N domains over the queue, waits until the last is up and all are quiet, then looks. Twice: with guests
of Debian's kernel and a shell, and with micro-guests that block for ever (tests/guests/idle.c), which show what the
hypervisor alone takes. The figures at the top of the result are those of the Debian guests. They have 96 MiB,
for Debian's kernel does not fit into 64 MiB: it fills 58 MiB from 16 MiB on.

``mib_per_domain``: of each domain process its proportional share (PSS) of every mapping but the guest's memory,
plus those of the pages behind the guest's memory that are Xen's and not the guest's (shared pages, its view
of the M2P). Not in it, because it is the guest's own: what the guest has touched of its memory
(``guest_touched_mib_per_domain``). Beside it: page tables of the domain process, and by how much the host process,
the zygote and the agent grew (``growth_mib_per_domain``).

``cpu_percent_total``: CPU time of all domain processes, the host process and the zygote over an interval, in per
cent of one core; the agent's is shown beside it.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib
import os
import re
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from common import BenchFailed, Result, count, parser, plain_image, positive, rounded, run, say
from sides import Node, cpu_seconds, describe

from agent.images import Image

MIB = 1 << 20
MEMFD = "/memfd:reeve-"
DAEMONS = ("hypervisor", "zygote", "agent")


@dataclasses.dataclass(frozen=True, slots=True)
class Memory:
    """Of one process, bytes; all but the last are PSS.

    :ivar guest: mappings of guest memory.
    :ivar translations: what the engine made of the guest's code: anonymous and executable.
    :ivar anonymous: heap, stacks and the rest without a file.
    :ivar files: the interpreter, libraries.
    :ivar tables: its page tables, which PSS does not count.
    """

    guest: int
    translations: int
    anonymous: int
    files: int
    tables: int

    @property
    def own(self) -> int:
        """PSS of what is not guest memory."""
        return self.translations + self.anonymous + self.files

    @classmethod
    def of(cls, pid: int) -> Memory:
        """:raises OSError: it is gone, or another user's."""
        folder = Path(f"/proc/{pid}")
        found = re.search(r"^VmPTE:\s*(\d+) kB", (folder / "status").read_text(), re.M)
        return cls(**parse_smaps((folder / "smaps").read_text()), tables=int(found[1]) * 1024 if found else 0)


def parse_smaps(text: str) -> dict[str, int]:
    """PSS by kind of mapping, bytes, from /proc/PID/smaps (proc_pid_smaps(5))."""
    sums = {"guest": 0, "translations": 0, "anonymous": 0, "files": 0}
    kind = "anonymous"
    for line in text.splitlines():
        if head := re.match(r"[0-9a-f]+-[0-9a-f]+ (\S{4}) \S+ \S+ \d+\s*(.*)", line):
            rights, name = head[1], head[2]
            if name.startswith(MEMFD):
                kind = "guest"
            elif name.startswith("/"):
                kind = "files"
            else:
                kind = "translations" if "x" in rights and not name else "anonymous"
        elif found := re.match(r"Pss:\s*(\d+) kB", line):
            sums[kind] += int(found[1]) * 1024
    return sums


def allocated(fd: int, start: int, end: int) -> int:
    """Bytes between two offsets of a sparse file that are really there."""
    total = 0
    while start < end:
        try:
            data = os.lseek(fd, start, os.SEEK_DATA)
        except OSError:  # ENXIO: nothing but a hole up to the end
            break
        hole = os.lseek(fd, data, os.SEEK_HOLE)
        total += max(0, min(hole, end) - min(data, end))
        start = hole
    return total


def extent(pid: int, guest_bytes: int) -> tuple[int, int]:
    """(what is there of the guest's memory, of Xen's frames behind it), bytes, of a domain process.

    :raises BenchFailed: it holds no guest memory.
    """
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            if os.readlink(entry).startswith(MEMFD):
                fd = os.open(entry, os.O_RDONLY | os.O_CLOEXEC)  # a new open file: its offset is ours
                try:
                    size = os.fstat(fd).st_size
                    return allocated(fd, 0, guest_bytes), allocated(fd, guest_bytes, size)
                finally:
                    os.close(fd)
    raise BenchFailed(f"process {pid} holds no guest memory: is it a domain process?")


@dataclasses.dataclass(frozen=True, slots=True)
class Guest:
    """A kind of guest.

    :ivar boot: the arguments of ``create`` that name it.
    :ivar ready: what it prints when it is up.
    """

    name: str
    boot: dict[str, str]
    memory_mib: int
    ready: bytes
    image: Image | None = None


def debian_guest(options: argparse.Namespace) -> Guest:
    image = plain_image(options.images_dir)
    return Guest("debian", {"image": image.name}, options.memory, b"REEVE-GUEST-READY", image)


def micro_guest(options: argparse.Namespace) -> Guest:
    """:raises BenchFailed: it cannot be built."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "guests"))
    build: Any = importlib.import_module("build")

    if (why := build.available()) is not None:
        raise BenchFailed(f"the micro-guest cannot be built: {why}; leave it out with --guest debian")
    kernel = str(build.build_guest("idle"))
    return Guest("micro", {"kernel": kernel}, options.micro_memory, b"idle: blocking")


GUESTS = {"debian": debian_guest, "micro": micro_guest}


def start_domains(node: Node, guest: Guest, options: argparse.Namespace) -> None:
    """Make them all at once; returns when each is up."""
    say(f"making {options.domains} domains of {guest.memory_mib} MiB ({guest.name})")
    sent = [node.send_create(guest.boot, guest.memory_mib) for _ in range(options.domains)]
    waiting = set()
    for instruction, ident in sent:
        node.reply(instruction)
        waiting.add(ident)
    say("all made; waiting for the last to be up")
    deadline = time.monotonic() + options.timeout * max(1, options.domains // 4)
    while waiting := {ident for ident in waiting if guest.ready not in node.toolstack.console_log(ident, MIB)}:
        if time.monotonic() > deadline:
            raise BenchFailed(f"{len(waiting)} of {options.domains} domains did not come up in time")
        time.sleep(0.2)


def cpu_shares(pids: dict[str, int], domains: list[int], seconds: float) -> dict[str, float]:
    """Per cent of one core by ``domains`` and by each daemon, over an interval."""

    def now() -> dict[str, float]:
        return {"domains": sum(map(cpu_seconds, domains))} | {name: cpu_seconds(pids[name]) for name in DAEMONS}

    before, started = now(), time.monotonic()
    time.sleep(seconds)
    after, taken = now(), time.monotonic() - started
    return {name: 100.0 * (after[name] - before[name]) / taken for name in after}


def mean_mib(values: Iterable[int], number: int) -> float:
    return rounded(sum(values) / number / MIB)


def look(guest: Guest, folder: Path, options: argparse.Namespace) -> Result:
    """Make, wait, look, destroy."""
    folder.mkdir()
    with Node(folder, options.images_dir, options.timeout) as node:
        about = describe(node, guest.image)
        pids = node.pids()
        before = {name: Memory.of(pids[name]) for name in DAEMONS}
        began = time.monotonic()
        start_domains(node, guest, options)
        up = time.monotonic() - began
        say(f"all up after {up:.0f} s; waiting {options.settle:g} s, then looking for {options.interval:g} s")
        time.sleep(options.settle)
        domains = node.domain_pids()
        if len(domains) != options.domains:
            raise BenchFailed(f"{len(domains)} domain processes run where {options.domains} should")
        cpu = cpu_shares(pids, domains, options.interval)
        memory = [Memory.of(pid) for pid in domains]
        extents = [extent(pid, guest.memory_mib * MIB) for pid in domains]
        after = {name: Memory.of(pids[name]) for name in DAEMONS}
    number = options.domains
    growth = {name: mean_mib([after[name].own - before[name].own], number) for name in DAEMONS}
    return {
        "domains": number,
        "memory_mib": guest.memory_mib,
        "mib_per_domain": mean_mib([item.own for item in memory] + [xen for _, xen in extents], number),
        "of_which_mib": {
            "translations": mean_mib([item.translations for item in memory], number),
            "anonymous": mean_mib([item.anonymous for item in memory], number),
            "files": mean_mib([item.files for item in memory], number),
            "xen_frames": mean_mib([xen for _, xen in extents], number),
        },
        "page_tables_mib_per_domain": mean_mib([item.tables for item in memory], number),
        "growth_mib_per_domain": growth,
        "guest_touched_mib_per_domain": mean_mib([own for own, _ in extents], number),
        "daemon_mib": {name: rounded(after[name].own / MIB) for name in DAEMONS},
        "cpu_percent_total": rounded(cpu["domains"] + cpu["hypervisor"] + cpu["zygote"]),
        "cpu_percent": {name: rounded(share) for name, share in cpu.items()},
        "cpu_interval_s": options.interval,
        "all_up_s": rounded(up),
        "with": about,
    }


def measure(options: argparse.Namespace, folder: Path) -> Result:
    names = [options.guest] if options.guest else list(GUESTS)
    found = {name: look(GUESTS[name](options), folder / name, options) for name in names}
    first = found[names[0]]
    top = {key: first[key] for key in ("domains", "memory_mib", "mib_per_domain", "cpu_percent_total")}
    return {"guest": names[0], **top, "guests": found}


ROWS: list[tuple[str, tuple[str, ...]]] = [
    ("number", ("domains",)),
    ("memory of each, MiB", ("memory_mib",)),
    ("beyond its own memory (PSS), MiB each", ("mib_per_domain",)),
    ("  translated guest code", ("of_which_mib", "translations")),
    ("  heap and the like", ("of_which_mib", "anonymous")),
    ("  program and libraries", ("of_which_mib", "files")),
    ("  Xen's frames", ("of_which_mib", "xen_frames")),
    ("page tables of its process, MiB each", ("page_tables_mib_per_domain",)),
    ("touched of its own memory, MiB each", ("guest_touched_mib_per_domain",)),
    *((f"{name}, MiB", ("daemon_mib", name)) for name in DAEMONS),
    *((f"growth of {name}, MiB for each domain", ("growth_mib_per_domain", name)) for name in DAEMONS),
    ("CPU of domains, hypervisor, zygote, % of a core", ("cpu_percent_total",)),
    *((f"  {name}", ("cpu_percent", name)) for name in ("domains", *DAEMONS)),
]


def table(result: Result) -> list[list[object]]:
    rows: list[list[object]] = [["idle domains", *result["guests"]]]
    for text, keys in ROWS:
        cells: list[Any] = list(result["guests"].values())
        for key in keys:
            cells = [cell[key] for cell in cells]
        rows.append([text, *cells])
    return rows


def interval(text: str) -> float:
    value = positive(text)
    if value < 10:
        raise argparse.ArgumentTypeError(f"{text}: give at least 10 s, for idle domains wake rarely")
    return value


def main(argv: list[str] | None = None) -> int:
    options = parser(__doc__)
    options.add_argument("--domains", type=count, default=20, metavar="N", help="how many (%(default)s)")
    options.add_argument("--guest", choices=list(GUESTS), help="only with these guests")
    options.add_argument("--memory", type=count, default=96, metavar="MIB", help="of a Debian guest (%(default)s)")
    options.add_argument("--micro-memory", type=count, default=64, metavar="MIB", help="of a micro-guest (%(default)s)")
    options.add_argument("--interval", type=interval, default=20.0, metavar="SECONDS", help="of CPU time (%(default)s)")
    options.add_argument("--settle", type=positive, default=5.0, metavar="SECONDS", help="before it (%(default)s)")
    return run(options.parse_args(argv), "density", measure, table)


if __name__ == "__main__":
    sys.exit(main())
