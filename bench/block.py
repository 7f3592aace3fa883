"""What a guest's disk does: in Reeve and in QEMU TCG with virtio-blk, with the same kernel.

One guest on each side with a disk that is a raw file in the same folder. A small C program reads and writes it with
O_DIRECT, so past the guest's page cache, and with one or 32 requests under way. The host's page cache is used on both
sides (QEMU: cache=writeback): the question is what the way costs, not what the host's disk does.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from common import (
    PROMPT,
    READY,
    BenchFailed,
    Result,
    count,
    median,
    packaged_image,
    parser,
    positive,
    qemu_version,
    rounded,
    run,
    say,
)
from sides import Meter, Node, QemuGuest, Terminal, describe

from agent.images import Image
from hypervisor.toolstack.devices import DiskFormat, DiskSpec

SOURCE = Path(__file__).resolve().parents[1] / "tests" / "guests" / "block" / "blockload.c"
MODULES = (
    "drivers/virtio/virtio_ring.ko",
    "drivers/virtio/virtio.ko",
    "drivers/virtio/virtio_pci_legacy_dev.ko",
    "drivers/virtio/virtio_pci_modern_dev.ko",
    "drivers/virtio/virtio_pci.ko",
    "drivers/block/virtio_blk.ko",
    "drivers/block/xen-blkfront.ko",
)
"""In the order in which they depend on each other; those of the other side load and find nothing."""
START = "#!/bin/busybox sh\n" + "".join(
    f"/bin/busybox insmod /lib/bench/{Path(module).name} 2>/dev/null\n" for module in MODULES
)
MIB = 1 << 20


@dataclasses.dataclass(frozen=True, slots=True)
class Question:
    """:ivar pattern: ``seq``: 128 KiB one after the other; ``rand``: 4 KiB anywhere."""

    pattern: str
    direction: str
    depth: int

    @property
    def name(self) -> str:
        return f"{self.pattern}_{self.direction}_{self.depth}"

    @property
    def unit(self) -> str:
        return "MiB/s" if self.pattern == "seq" else "IOPS"


QUESTIONS = [
    Question(pattern, direction, depth)
    for pattern in ("seq", "rand")
    for direction in ("read", "write")
    for depth in (1, 32)
]


@dataclasses.dataclass(frozen=True, slots=True)
class Side:
    """:ivar device: the disk's name in the guest."""

    terminal: Terminal
    device: str
    meter: Meter


def parse(question: Question, text: str) -> tuple[float, float]:
    """In the question's unit, and how many MiB or requests it were in all. The guest is not trusted to print what was
    asked for. :raises BenchFailed."""
    found = re.search(r"^BENCH (\{.*\})\s*$", text, re.M)
    try:
        data: Any = json.loads(found[1]) if found else {}
        operations, size, seconds = int(data["operations"]), int(data["bytes"]), float(data["seconds"])
    except (ValueError, KeyError, TypeError):
        raise BenchFailed(f"{question.name}: the guest printed no figure, but {text[-200:]!r}") from None
    if operations <= 0 or size <= 0 or seconds <= 0:
        raise BenchFailed(f"{question.name}: the guest did {operations} operations in {seconds:g} s")
    amount = size / MIB if question.pattern == "seq" else float(operations)
    return amount / seconds, amount


def in_guest(side: Side, question: Question, options: argparse.Namespace) -> tuple[float, float]:
    """(the figure, us of CPU time for each MiB or request)."""
    words = f"{question.pattern} {question.direction} {question.depth} {options.time:g}"
    side.meter.start()
    side.terminal.type(f"blockload bench /dev/{side.device} {words}\r".encode())
    text = side.terminal.until(rb"BENCH \{[^\n]*\}\r?\n|BLOCK FAIL[^\n]*\n", options.timeout + options.time)
    used = side.meter.stop()
    side.terminal.until(PROMPT, options.timeout)
    found, amount = parse(question, text.decode(errors="replace").replace("\r", ""))
    return found, used * 1e6 / amount


def guest_image(images: Path, folder: Path) -> Image:
    """:raises ImageError: it cannot be made. :raises BenchFailed: the program cannot be compiled."""
    digest = hashlib.sha256(SOURCE.read_bytes() + START.encode()).hexdigest()[:8]
    program, start = folder / "blockload", folder / "start"
    if shutil.which("gcc") is None:
        raise BenchFailed("gcc is not installed, and the program to measure with is in C: apt-get install gcc")
    command = ["gcc", "-static", "-O2", "-o", str(program), str(SOURCE)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    if done.returncode != 0:
        raise BenchFailed(f"gcc refuses {SOURCE.name}: {done.stderr[:300]}")
    start.write_text(START)
    start.chmod(0o755)
    add = [(program, "/bin/blockload"), (start, "/etc/init.d/block")]
    return packaged_image(images, f"bench-block-{digest}", MODULES, add, folder)


def new_disk(folder: Path, name: str, options: argparse.Namespace) -> Path:
    """Filled, so that nobody reads holes; qcow2 on request."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    with path.open("wb") as file:
        for _ in range(options.size):
            file.write(b"\xa5" * MIB)
    if options.format == "qcow2":
        made = path.with_suffix(".qcow2")
        command = ["qemu-img", "convert", "-q", "-f", "raw", "-O", "qcow2", str(path), str(made)]
        if subprocess.run(command, check=False).returncode:
            raise BenchFailed("qemu-img fails: apt-get install qemu-utils")
        path = made
    return path


def measure(options: argparse.Namespace, folder: Path) -> Result:
    version = qemu_version()
    image = guest_image(options.images_dir, folder)
    mine, theirs = (new_disk(folder / "images", f"{side}.img", options) for side in ("reeve", "qemu"))
    drive = f"file={theirs},if=none,id=disk,format={options.format},cache=writeback,aio=threads"
    devices = ["-drive", drive, "-device", "virtio-blk-pci,drive=disk"]
    with Node(folder, options.images_dir, options.timeout) as node:
        say("booting a guest in Reeve, then one in QEMU")
        guest = node.create(image, options.memory)
        reeve = login(guest.terminal, options)
        disk = DiskSpec(id="xvda", path=str(mine), format=DiskFormat(options.format))
        node.toolstack.attach_disk(guest.uuid, disk)
        wait_for(reeve, "xvda", options)
        with QemuGuest(image, options.memory, devices=devices) as other:
            qemu = login(other.terminal, options)
            wait_for(qemu, "vda", options)
            results = {}
            sides = (Side(reeve, "xvda", node.meter()), Side(qemu, "vda", Meter(lambda: [other.pid])))
            for question in QUESTIONS:
                if not options.only or question.name in options.only:
                    results[question.name] = one(question, sides, options)
        about = describe(node, image)
        node.destroy(guest)
    return {
        "results": results,
        "ratio": min(found["ratio"] for found in results.values()),
        "ratio_means": "reeve / qemu_tcg, both work done in a second: below 1, Reeve is slower; at the top the worst",
        "rounds": options.rounds,
        "seconds_each": options.time,
        "memory_mib": options.memory,
        "disk": {"format": options.format, "mib": options.size},
        "with": about | {"qemu": version},
    }


def login(terminal: Terminal, options: argparse.Namespace) -> Terminal:
    terminal.until(READY, options.timeout)
    terminal.until(PROMPT, options.timeout)
    return terminal


def wait_for(terminal: Terminal, device: str, options: argparse.Namespace) -> None:
    terminal.type(f"until [ -b /dev/{device} ]; do usleep 50000; done\r".encode())
    terminal.until(PROMPT, options.timeout)


def one(question: Question, sides: tuple[Side, Side], options: argparse.Namespace) -> Result:
    figures: dict[str, list[float]] = {"reeve": [], "qemu_tcg": []}
    cpu: dict[str, list[float]] = {"reeve": [], "qemu_tcg": []}
    for _ in range(options.rounds):
        for name, side in zip(figures, sides, strict=True):
            found, cost = in_guest(side, question, options)
            figures[name].append(found)
            cpu[name].append(cost)
    medians = {name: median(found) for name, found in figures.items()}
    costs = {name: median(found) for name, found in cpu.items()}
    ratio, cpu_ratio = rounded(medians["reeve"] / medians["qemu_tcg"]), rounded(costs["qemu_tcg"] / costs["reeve"])
    say(f"{question.name}: Reeve {medians['reeve']:g}, QEMU TCG {medians['qemu_tcg']:g} {question.unit}, {ratio:g}")
    unit = "us/MiB" if question.pattern == "seq" else "us/request"
    return {**medians, "unit": question.unit, "ratio": ratio, "cpu": {**costs, "unit": unit, "ratio": cpu_ratio}}


def table(result: Result) -> list[list[object]]:
    rows: list[list[object]] = [["", "unit", "Reeve", "QEMU TCG", "ratio", "CPU", "Reeve", "QEMU TCG", "ratio"]]
    for name, found in result["results"].items():
        times = [found["cpu"][column] for column in ("unit", "reeve", "qemu_tcg", "ratio")]
        rows.append([name, found["unit"], found["reeve"], found["qemu_tcg"], found["ratio"], *times])
    return rows


def main(argv: list[str] | None = None) -> int:
    options = parser(__doc__)
    names = [question.name for question in QUESTIONS]
    options.add_argument("--only", action="append", choices=names, help="measure this; may be repeated")
    options.add_argument("--time", type=positive, default=3.0, metavar="SECONDS", help="for each figure (%(default)s)")
    options.add_argument("--rounds", type=count, default=3, help="figures of each, of which the median counts")
    options.add_argument("--memory", type=count, default=256, metavar="MIB", help="of each guest (%(default)s)")
    options.add_argument("--size", type=count, default=256, metavar="MIB", help="of each disk (%(default)s)")
    options.add_argument("--format", choices=["raw", "qcow2"], default="raw", help="of both images (%(default)s)")
    return run(options.parse_args(argv), "block", measure, table)


if __name__ == "__main__":
    sys.exit(main())
