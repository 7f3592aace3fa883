"""A domain's weight, as far as the host's kernel lets an unprivileged process put it in force.

Each domain process is a session of its own, and so, where the kernel has autogroups, a group whose nice value
sets its share against the others (sched(7), "The autogroup feature"); else it is the nice value of the thread that
runs vCPUs. One step is a quarter more or less. Half of the usual weight and less is possible for everybody; more than
the usual weight needs CAP_SYS_NICE.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
from pathlib import Path

LOG = logging.getLogger(__name__)

USUAL_WEIGHT = 256
STEP = 1.25
"""Ratio of shares between two neighbouring nice values (kernel/sched/core.c, sched_prio_to_weight)."""
RETRIES, RETRY_AFTER = 5, 0.12
"""The kernel changes an autogroup ten times a second at most."""


def nice_of(weight: int) -> int:
    return max(-20, min(19, round(math.log(USUAL_WEIGHT / weight, STEP))))


async def apply(pid: int, weight: int, proc: Path = Path("/proc")) -> bool:
    """Give process `pid` its share; whether that could be done."""
    nice = nice_of(weight)
    try:
        if (proc / "sys/kernel/sched_autogroup_enabled").read_text().strip() == "1":
            return await _autogroup(proc / str(pid) / "autogroup", nice)
    except OSError:
        LOG.debug("this kernel has no autogroups")
    try:
        os.setpriority(os.PRIO_PROCESS, pid, nice)
    except OSError as exc:
        LOG.warning("process %d keeps its nice value, %d was asked for: %s", pid, nice, exc.strerror)
        return False
    return True


async def _autogroup(file: Path, nice: int) -> bool:
    try:
        if _nice_in(file.read_text()) == nice:
            return True
        for _ in range(RETRIES):
            try:
                file.write_text(str(nice))
                return True
            except BlockingIOError:
                await asyncio.sleep(RETRY_AFTER)
    except OSError as exc:
        LOG.warning("%s keeps its nice value, %d was asked for: %s", file, nice, exc.strerror)
    return False


def _nice_in(text: str) -> int | None:
    """Of ``/autogroup-182 nice 0``."""
    word = text.rpartition(" ")[2].strip()
    return int(word) if word.removeprefix("-").isdecimal() else None
