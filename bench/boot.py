"""How long from the create message to userspace, and QEMU TCG with the same kernel and ramdisk.

Reeve: from sending ``create`` to its queue (an agent, its journal, the driver, the host process and
a domain process are all on the way) to the line REEVE-GUEST-READY on the guest's console. QEMU: from the
start of its process to the same line. One guest at a time, in turn; medians. A first, uncounted boot of
each fills caches: Reeve's has to unpack the kernel.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from common import READY, Result, compare, count, median, parser, plain_image, qemu_version, rounded, run, say
from sides import Node, QemuGuest, describe

from agent.images import Image


def boot_reeve(node: Node, image: Image, options: argparse.Namespace) -> tuple[float, dict[str, float]]:
    """Seconds to userspace, and of the instruction's steps."""
    guest = node.create(image, options.memory)
    replied = time.monotonic() - guest.started
    guest.terminal.until(READY, options.timeout)
    taken = time.monotonic() - guest.started
    node.destroy(guest)
    steps = {str(step["name"]): rounded(float(step["seconds"])) for step in guest.reply.steps}
    return taken, {"reply": rounded(replied), **steps}


def boot_qemu(image: Image, options: argparse.Namespace) -> float:
    with QemuGuest(image, options.memory) as guest:
        guest.terminal.until(READY, options.timeout)
        return time.monotonic() - guest.started


def measure(options: argparse.Namespace, folder: Path) -> Result:
    version = qemu_version()
    image = plain_image(options.images_dir)
    reeve: list[float] = []
    qemu: list[float] = []
    steps: list[dict[str, float]] = []
    with Node(folder, options.images_dir, options.timeout) as node:
        about = describe(node, image)
        for number in range(options.runs + 1):
            taken, parts = boot_reeve(node, image, options)
            reeve.append(taken)
            steps.append(parts)
            qemu.append(boot_qemu(image, options))
            say(f"boot {number or 'without caches'}: Reeve {reeve[-1]:.2f} s, QEMU TCG {qemu[-1]:.2f} s")
    ours, theirs = median(reeve[1:]), median(qemu[1:])
    return {
        "reeve_s": ours,
        "qemu_tcg_s": theirs,
        "ratio": compare(ours, theirs),
        "ratio_means": "reeve_s / qemu_tcg_s: above 1, Reeve is slower",
        "runs": options.runs,
        "memory_mib": options.memory,
        "reeve_runs_s": [rounded(value) for value in reeve[1:]],
        "qemu_tcg_runs_s": [rounded(value) for value in qemu[1:]],
        "without_caches": {"reeve_s": rounded(reeve[0]), "qemu_tcg_s": rounded(qemu[0])},
        "reeve_steps_s": {name: median([parts[name] for parts in steps[1:]]) for name in steps[0]},
        "with": about | {"qemu": version},
    }


def table(result: Result) -> list[list[object]]:
    rows: list[list[object]] = [["", "Reeve", "QEMU TCG", "ratio"]]
    rows.append(["create message to userspace, s", result["reeve_s"], result["qemu_tcg_s"], result["ratio"]])
    first = result["without_caches"]
    rows.append(["first boot, s", first["reeve_s"], first["qemu_tcg_s"], ""])
    rows += [[f"of Reeve's: {name}, s", seconds, "", ""] for name, seconds in result["reeve_steps_s"].items()]
    return rows


def main(argv: list[str] | None = None) -> int:
    options = parser(__doc__)
    options.add_argument(
        "--runs", type=count, default=3, help="boots of each, of which the median counts (%(default)s)"
    )
    options.add_argument("--memory", type=count, default=256, metavar="MIB", help="of each guest (%(default)s)")
    return run(options.parse_args(argv), "boot", measure, table)


if __name__ == "__main__":
    sys.exit(main())
