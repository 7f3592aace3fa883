"""What the benchmarks share: options, images, noise, one JSON object on standard output, one line for a failure.

A benchmark prints exactly one JSON object on standard output: on one line with ``--json``, indented
without, when a table for people goes to standard error too. Progress goes to standard error. Exit
codes: 0 measured; 1 not, with one line that says why; 2 the command line is wrong; 130 interrupted.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from agent.errors import AgentError
from agent.images import Image, build_image, load_image
from agent.images.debian import KERNEL_META_PACKAGE, Apt, read_members
from agent.images.errors import ImageError
from hypervisor.errors import ToolstackError

QEMU = "qemu-system-x86_64"
READY = rb"REEVE-GUEST-READY [0-9.]+"
"""What the image's init prints when userspace runs."""

PROMPT = rb"/ # "
BENCH_SOURCE = Path(__file__).with_name("guestbench.c")
BUSY_PERCENT = 10.0
"""A machine that does more than this before the benchmark starts gets a warning."""

Result = dict[str, Any]


class BenchFailed(Exception):
    """Nothing was measured; the text says why and what would help, in one line."""


def say(text: str) -> None:
    """Progress, for people."""
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


# -- command line and result


def parser(description: str | None) -> argparse.ArgumentParser:
    """A parser with the options that all have."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "reeve" / "images"
    made = argparse.ArgumentParser(description=(description or "").partition("\n")[0])
    made.add_argument("--json", action="store_true", help="the result on one line and no table")
    made.add_argument(
        "--images-dir", type=Path, default=cache, help="where guest images are kept (default %(default)s)"
    )
    made.add_argument("--timeout", type=positive, default=120.0, metavar="SECONDS", help="for each boot (%(default)s)")
    made.add_argument("--keep", action="store_true", help="keep the state folder with the logs")
    return made


def positive(text: str) -> float:
    """An option's value: a number above 0."""
    value = float(text)
    if not 0 < value < 1e6:
        raise argparse.ArgumentTypeError(f"{text}: give a number above 0")
    return value


def count(text: str) -> int:
    """An option's value: a whole number from 1 to 1000."""
    value = int(text)
    if not 1 <= value <= 1000:
        raise argparse.ArgumentTypeError(f"{text}: give 1 to 1000")
    return value


def run(
    options: argparse.Namespace,
    name: str,
    measure: Callable[[argparse.Namespace, Path], Result],
    table: Callable[[Result], Sequence[Sequence[object]]],
) -> int:
    """Measure, print, clean up; returns the exit code.

    :param measure: gets the options and a private folder that is removed afterwards.
    :param table: rows of what it returned; the first holds the headings.
    """
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupted)
    folder = Path(tempfile.mkdtemp(prefix="reeve-bench-"))
    try:
        before = noise()
        result = {"bench": name} | measure(options, folder) | {"machine": machine(), "noise": before}
    except (BenchFailed, AgentError, ToolstackError, ImageError) as exc:
        say(f"{name}: {' '.join(str(exc).split())}")
        return 1
    except KeyboardInterrupt:
        say(f"{name}: interrupted")
        return 130
    finally:
        if options.keep:
            say(f"kept: {folder}")
        else:
            shutil.rmtree(folder, ignore_errors=True)
    if not options.json:
        say(render(table(result)))
    if before["cpu_busy_percent"] > BUSY_PERCENT:
        say(f"note: the machine was {before['cpu_busy_percent']:g}% busy before the benchmark: figures are too high")
    sys.stdout.write(json.dumps(result, indent=None if options.json else 2) + "\n")
    return 0


def _interrupted(number: int, _frame: object) -> None:
    raise KeyboardInterrupt(signal.Signals(number).name)


def render(rows: Sequence[Sequence[object]]) -> str:
    """Columns under their headings; numbers to the right."""
    texts = [[f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in texts) for i in range(len(texts[0]))]
    lines = []
    for row, cells in zip(texts, rows, strict=True):
        parts = [
            text.rjust(width) if isinstance(cell, int | float) else text.ljust(width)
            for text, width, cell in zip(row, widths, cells, strict=True)
        ]
        lines.append("  ".join(parts).rstrip())
    return "\n".join(lines)


# -- numbers


def rounded(value: float) -> float:
    """Four significant digits: more would pretend."""
    return float(f"{value:.4g}")


def median(values: Sequence[float]) -> float:
    return rounded(statistics.median(values))


def compare(reeve: float, qemu: float) -> float:
    """The ratio of two times: above 1, Reeve is slower. :raises BenchFailed: the second is no time."""
    if qemu <= 0:
        raise BenchFailed(f"QEMU's figure is {qemu:g}: nothing to compare with")
    return rounded(reeve / qemu)


# -- the machine


@dataclasses.dataclass(frozen=True, slots=True)
class CpuTimes:
    """Time of all processors since boot, in ticks."""

    busy: int
    total: int

    @classmethod
    def now(cls) -> CpuTimes:
        return cls.parse(Path("/proc/stat").read_text())

    @classmethod
    def parse(cls, text: str) -> CpuTimes:
        """From the first line of /proc/stat: user nice system idle iowait irq softirq steal (proc_stat(5))."""
        values = [int(word) for word in text.splitlines()[0].split()[1:9]]
        return cls(sum(values) - values[3] - values[4], sum(values))

    def busy_percent(self, later: CpuTimes) -> float:
        """Of all processors together, 0 to 100, between this and `later`."""
        return round(100.0 * (later.busy - self.busy) / max(1, later.total - self.total), 1)


def noise(seconds: float = 1.0) -> Result:
    """What else the machine does, seen before the benchmark starts."""
    load = os.getloadavg()[0]
    before = CpuTimes.now()
    time.sleep(seconds)
    busy = before.busy_percent(CpuTimes.now())
    return {"load_average": round(load, 2), "cpu_busy_percent": busy}


def machine() -> Result:
    """What was measured on."""
    found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.M)
    return {"cpu": found[1] if found else "unknown", "cpus": os.cpu_count(), "kernel": os.uname().release}


def qemu_version() -> str:
    """:raises BenchFailed: there is no QEMU."""
    path = shutil.which(QEMU)
    if path is None:
        raise BenchFailed(f"{QEMU} is not installed, and Reeve is compared with it: apt-get install qemu-system-x86")
    output = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=30, check=False).stdout
    found = re.search(r"version (\S+)", output)
    return found[1] if found else "unknown"


# -- images


def plain_image(images: Path) -> Image:
    """Debian's kernel and our busybox ramdisk. :raises ImageError: it cannot be made."""
    return _image(images, "bench")


def guest_image(images: Path, folder: Path) -> Image:
    """The same with /bin/guestbench. The name carries a hash of the source, so that a change makes a new image.

    :raises ImageError: it cannot be made. :raises BenchFailed: the program cannot be compiled.
    """
    digest = hashlib.sha256(BENCH_SOURCE.read_bytes()).hexdigest()[:8]
    name = f"bench-guest-{digest}"
    if (images / name).exists():
        return load_image(images / name)
    kernel = plain_image(images).kernel
    return _image(images, name, kernel=kernel, add=[(compile_guestbench(folder), "/bin/guestbench")])


def packaged_image(
    images: Path, name: str, members: Sequence[str], add: Sequence[tuple[Path, str]], folder: Path
) -> Image:
    """Debian's kernel and our ramdisk with files of the kernel's package under /lib/bench, and further ones.

    :param members: ends of paths in the package. :raises ImageError: it cannot be made.
    """
    if (images / name).exists():
        return load_image(images / name)
    kernel = plain_image(images).kernel
    _, package = Apt(images / ".cache").fetch(KERNEL_META_PACKAGE)
    wanted = tuple(members)
    added = list(add)
    for path, content in read_members(package, lambda path: path.endswith(wanted), len(wanted)):
        file = folder / Path(path).name
        file.write_bytes(content)
        added.append((file, f"/lib/bench/{file.name}"))
    return _image(images, name, kernel=kernel, add=added)


def _image(images: Path, name: str, **arguments: Any) -> Image:
    if (images / name).exists():
        return load_image(images / name)
    return build_image(images, name=name, progress=say, **arguments)


def compile_guestbench(folder: Path) -> Path:
    """A static program for guest and host. :raises BenchFailed: there is no compiler, or it refuses."""
    target = folder / "guestbench"
    if shutil.which("gcc") is None:
        raise BenchFailed(
            "gcc is not installed, and the program to measure with is in C: apt-get install gcc libc6-dev"
        )
    command = ["gcc", "-static", "-O2", "-o", str(target), str(BENCH_SOURCE)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    if done.returncode != 0:
        raise BenchFailed(f"gcc refuses {BENCH_SOURCE.name}: {done.stderr[:300]}")
    return target
