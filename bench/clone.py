"""How long from a create message with ``from_checkpoint`` to a shell that answers, and what an idle clone costs.

One Debian guest boots to its shell and becomes a template. Then domains begin from it, one after the other: from
sending ``create`` to its queue (agent, journal, driver, host process and domain process are on the way) to the shell's
answer to a command that was typed on the console as soon as there was one. The first ones are not counted: they fill
caches.

Memory when all are there and idle: of each domain process its proportional share (PSS), what is its alone (USS), and
its page tables. ``mib_per_clone`` is what all added: PSS and page tables of the domain processes and what the PSS of
host process, zygote and agent changed by (less than nothing where they share more than before), for each clone. The
host is told that it has memory for all of them, as if each would write all of its own.
"""

from __future__ import annotations

import argparse
import queue
import re
import sys
import time
from pathlib import Path

import clonewhere
from common import PROMPT, READY, BenchFailed, Result, count, median, parser, plain_image, positive, rounded, run, say
from sides import Node, cpu_seconds, describe

from hypervisor.toolstack.api import DomainEvent

MIB = 1 << 20
DAEMONS = ("hypervisor", "zygote", "agent")
TEMPLATE = "bench"
UNCOUNTED = 2


def smaps(pid: int) -> dict[str, int]:
    """Of one process, bytes: ``pss``, ``uss`` and ``tables`` (proc_pid_smaps(5))."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text() + Path(f"/proc/{pid}/status").read_text()
    found = {name: int(value) * 1024 for name, value in re.findall(r"^(\w+):\s*(\d+) kB", text, re.M)}
    own = found["Private_Clean"] + found["Private_Dirty"]
    return {"pss": found["Pss"], "uss": own, "tables": found["VmPTE"]}


def make_template(node: Node, options: argparse.Namespace) -> Result:
    image = plain_image(options.images_dir)
    guest = node.create(image, options.memory)
    guest.terminal.until(READY, options.timeout)
    guest.terminal.until(PROMPT, options.timeout)
    started = time.monotonic()
    reply = node.reply(node.client.send("template_create", {"uuid": guest.uuid, "name": TEMPLATE}))
    taken = time.monotonic() - started
    guest.console.close()
    made = (reply.result or {})["template"]
    say(f"template of {options.memory} MiB: {made['bytes'] >> 20} MiB on disk after {taken:.2f} s")
    return {"seconds": rounded(taken), "disk_mib": rounded(made["bytes"] / MIB), "pages": made["pages"]}


def clone(
    node: Node, events: queue.Queue[DomainEvent], timeout: float
) -> tuple[dict[str, float], list[clonewhere.Stage]]:
    """Seconds after the message until the domain was there and the shell answered; and of the steps. And its stages."""
    while not events.empty():
        events.get()
    number = time.monotonic_ns()
    started = time.monotonic()
    instruction = node.client.send("create", {"name": f"clone-{number}", "from_checkpoint": TEMPLATE})
    created, at = _until(events, "created", timeout)
    console = node.toolstack.open_console(created.uuid)
    try:
        console.write(b"echo clone''-answers\n")
        seen = b""
        while b"clone-answers" not in seen:
            if time.monotonic() - started > timeout:
                raise BenchFailed(f"the shell does not answer: {seen[-300:]!r}")
            seen += console.read(timeout=timeout)
        taken = time.monotonic() - started
        used = cpu_seconds(max(node.domain_pids(), key=_started_at))
    finally:
        console.close()
    reply = node.reply(instruction)
    steps = {f"step_{step['name']}": float(step["seconds"]) for step in reply.steps}
    state = node.folder / "hypervisor"
    logs = {"host": node.folder / "hypervisor.log", "domain": state / "domains" / created.uuid / "domain.log"}
    stages = clonewhere.stages(logs, started, started + taken)
    stages.append(("domain: answers", taken, used))
    return {"there": at - started, "shell": taken, **steps}, stages


def _started_at(pid: int) -> int:
    """In ticks since boot (proc_pid_stat(5))."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])


def _until(events: queue.Queue[DomainEvent], kind: str, timeout: float) -> tuple[DomainEvent, float]:
    while True:
        try:
            event = events.get(timeout=timeout)
        except queue.Empty:
            raise BenchFailed(f"no domain was {kind} within {timeout:g} s") from None
        if event.kind == kind:
            return event, time.monotonic()


def measure(options: argparse.Namespace, folder: Path) -> Result:
    image = plain_image(options.images_dir)
    most = (options.clones + 2) * (options.memory + 32)
    settings = f"memory_mib = {most}" + ("\nlog_level = debug" if options.where else "")
    with Node(folder, options.images_dir, options.timeout, settings) as node:
        about = describe(node, image)
        template = make_template(node, options)
        pids = node.pids()
        before = {name: smaps(pids[name]) for name in DAEMONS}
        events: queue.Queue[DomainEvent] = queue.Queue()
        stop = node.toolstack.subscribe(events.put)
        times, stages = [], []
        try:
            for number in range(1, options.clones + 1):
                took, passed = clone(node, events, options.timeout)
                times.append(took)
                stages.append(passed)
                if number in (1, options.clones) or not number % 10:
                    say(f"clone {number}: a shell after {times[-1]['shell'] * 1000:.0f} ms")
        finally:
            stop()
        say(f"waiting {options.settle:g} s")
        time.sleep(options.settle)
        domains = [smaps(pid) for pid in node.domain_pids()]
        kinds = clonewhere.memory(node.domain_pids())
        after = {name: smaps(pids[name]) for name in DAEMONS}
    if len(domains) != options.clones:
        raise BenchFailed(f"{len(domains)} domain processes run where {options.clones} should")
    each = {name: sum(domain[name] for domain in domains) / options.clones / MIB for name in ("pss", "uss", "tables")}
    growth = sum(after[name]["pss"] - before[name]["pss"] for name in DAEMONS) / options.clones / MIB
    counted = times[UNCOUNTED:] or times
    shells = sorted(item["shell"] for item in counted)
    return {
        "shell_ms": rounded(median(shells) * 1000),
        "shell_ms_range": [rounded(shells[0] * 1000), rounded(shells[-1] * 1000)],
        "mib_per_clone": rounded(each["pss"] + each["tables"] + growth),
        "of_which_mib": {**{name: rounded(value) for name, value in each.items()}, "daemons_growth": rounded(growth)},
        "clones": options.clones,
        "memory_mib": options.memory,
        "memory_mib_by_kind": kinds,
        **({"stages": clonewhere.summed(stages[UNCOUNTED:] or stages)} if options.where else {}),
        "steps_ms": {name: rounded(median([item[name] for item in counted]) * 1000) for name in counted[0]},
        "template": template,
        "with": about,
    }


def table(result: Result) -> list[list[object]]:
    rows: list[list[object]] = [["clones of one guest", result["clones"]]]
    rows.append(["memory of each, MiB", result["memory_mib"]])
    rows.append(["create message to a shell that answers, ms (median)", result["shell_ms"]])
    rows.append(["  least and most", "{} to {}".format(*result["shell_ms_range"])])
    rows += [[f"  {name}", value] for name, value in result["steps_ms"].items()]
    rows.append(["added by an idle one, MiB", result["mib_per_clone"]])
    rows += [[f"  {name}", value] for name, value in result["of_which_mib"].items()]
    for name, value in result["memory_mib_by_kind"].items():
        rows.append([f"  {name}: share, of which its alone", "{pss:g}, {dirty:g}".format(**value)])
    for stage in result.get("stages", ()):
        rows.append(["  {stage}".format(**stage), "after {after_ms:g} ms, {cpu_ms:g} ms of CPU".format(**stage)])
    return rows


def main(argv: list[str] | None = None) -> int:
    options = parser(__doc__)
    options.add_argument("--clones", type=count, default=50, metavar="N", help="how many (%(default)s)")
    options.add_argument("--memory", type=count, default=256, metavar="MIB", help="of each guest (%(default)s)")
    options.add_argument("--where", action="store_true", help="and the stages of each, from the logs")
    options.add_argument("--settle", type=positive, default=10.0, metavar="SECONDS", help="before memory is looked at")
    return run(options.parse_args(argv), "clone", measure, table)


if __name__ == "__main__":
    sys.exit(main())
