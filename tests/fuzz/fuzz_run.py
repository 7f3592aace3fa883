"""Runs machine after machine for a given time and sums up."""

from __future__ import annotations

import collections
import dataclasses
import gc
import os
import random
import time
from collections.abc import Callable
from pathlib import Path

import fuzz_checks
from fuzz_calls import Generator
from fuzz_calls32 import Generator32
from fuzz_machine import FuzzMachine

SECONDS = float(os.environ.get("REEVE_FUZZ_SECONDS", "4"))
"""How long each of the two fuzzers runs."""
SEED = int(os.environ.get("REEVE_FUZZ_SEED", "0")) or random.SystemRandom().getrandbits(31)
MOST_GROWTH = 300 << 20
"""Bytes by which the process may be larger than after its first machines."""
CALLS_PER_MACHINE = 60_000
GENERATORS: dict[int, type[Generator]] = {64: Generator, 32: Generator32}
Fill = Callable[[FuzzMachine, Generator], None]


@dataclasses.dataclass(slots=True)
class Summary:
    """:ivar calls: carried out; `ends` how machines ended, by the first words; `slowest` (ns, what)."""

    seed: int
    calls: int = 0
    machines: int = 0
    ends: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    faults: list[str] = dataclasses.field(default_factory=list)
    slowest: tuple[int, str] = (0, "")
    grown: int = 0

    def __str__(self) -> str:
        ends = ", ".join(f"{count} {what!r}" for what, count in self.ends.most_common(6))
        return (
            f"seed {self.seed}: {self.calls} calls on {self.machines} machines ({ends}); slowest "
            f"{self.slowest[0] / 1e6:.1f} ms: {self.slowest[1]}; grown by {self.grown >> 20} MiB"
        )


def resident() -> int:
    """Bytes of memory this process has."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def run_machines(
    seconds: float,
    seed: int,
    fill: Fill,
    *,
    calm: bool | None = None,
    public: bool = False,
    bits: int = 64,
    more: Callable[[], list[str]] = list,
) -> Summary:
    """Fresh machines with programs by `fill`, until the time is over or something is wrong.

    :param calm: see `Generator`; None for either. `public`: the engine's public path. `bits`: the guests' word size.
    :param more: further faults, asked for after each machine.
    """
    summary = Summary(seed)
    end = time.monotonic() + seconds
    base = 0
    while time.monotonic() < end and not summary.faults:
        # Each machine has a seed of its own: one that found something runs again alone.
        machine_seed = seed + summary.machines
        _run_one(summary, machine_seed, fill, calm, end, public=public, bits=bits)
        summary.machines += 1
        summary.faults += more()
        if summary.machines == 8:
            base = resident()
        elif base and not summary.machines % 32:
            summary.grown = resident() - base
            if summary.grown > MOST_GROWTH:
                summary.faults.append(f"the process grew by {summary.grown >> 20} MiB")
    return summary


def _run_one(
    summary: Summary, seed: int, fill: Fill, calm: bool | None, end: float, *, public: bool, bits: int
) -> None:
    rng = random.Random(seed)
    linear = bool(rng.randrange(2))
    is_calm = bool(rng.randrange(3)) if calm is None else calm
    generator: Generator | None = None

    def next_program(fuzz: FuzzMachine) -> bool:
        nonlocal generator
        generator = generator or GENERATORS[bits](fuzz, rng, calm=is_calm)
        # Someone waits, now and then.
        fuzz.domain.preempt = not rng.randrange(8)
        fill(fuzz, generator)
        return time.monotonic() < end and fuzz.calls < CALLS_PER_MACHINE

    fuzz = FuzzMachine(next_program, public=public, bits=bits, linear=linear)
    fuzz.check = lambda machine: fuzz_checks.faults(machine.domain)
    ended = fuzz.run()
    summary.calls += fuzz.calls
    summary.ends[" ".join(ended.detail.split()[:4]) or ended.reason.name] += 1
    summary.slowest = max(summary.slowest, fuzz.slowest)
    summary.faults += [f"machine with seed {seed}: {fault}" for fault in fuzz.faults]


def programs(fuzz: FuzzMachine, generator: Generator) -> None:
    """Structured calls."""
    fuzz.load([generator.call(number) for number in range(32)])


def raw(fuzz: FuzzMachine, generator: Generator) -> None:
    """Calls that the guest draws."""
    fuzz.load_raw(256, generator.rng.getrandbits(63), generator.values())
