"""The fuzzers' parts, for guests of either word size; the tests beside this file run them."""

from __future__ import annotations

import logging
import random
import time

import fuzz_checks
import fuzz_run
from fuzz_calls import Generator
from fuzz_machine import NOTHING, TOUCH, Call, FuzzMachine
from fuzz_neighbour import Neighbour
from fuzz_tables import Steps, TableRig
from fuzz_tables32 import Steps32, TableRig32

LOG = logging.getLogger(__name__)
STEPS = 400
"""Steps with one domain: then most of its frames are pinned or given away, and a fresh one finds more."""


def hostile_calls(fill: fuzz_run.Fill, share: float, neighbour: Neighbour, bits: int) -> None:
    """No exception but XenError and GuestFault, exact counts, no slow call, a neighbour that notices nothing."""
    seconds = fuzz_run.SECONDS * share
    summary = fuzz_run.run_machines(seconds, fuzz_run.SEED, fill, bits=bits, more=neighbour.faults)
    report(summary, neighbour)
    assert summary.calls > 100 * seconds, str(summary)


def report(summary: fuzz_run.Summary, neighbour: Neighbour) -> None:
    beats, _, worst, _ = neighbour.pulse()
    asleep = neighbour.bystander_worst_ns / 1e6
    heart = f"the neighbour's heart beat {beats} times, {worst / 1e6:.0f} ms late at most, a sleeper {asleep:.0f} ms"
    LOG.warning("%s; %s", summary, heart)
    assert not summary.faults, f"{summary}\n" + "\n".join(summary.faults[:5])


LINES = 24


def short_sequences(seed: int, masks: list[int], *, calm: bool, linear: bool, bits: int) -> None:
    """Programs on a fresh machine, drawn from `seed`: of `LINES` calls those whose bit is set in the program's mask.

    The calls depend on what the guest has done, so hypothesis may choose among them, but not draw them itself.
    """
    rng = random.Random(seed)
    rounds = iter(masks)

    def next_program(fuzz: FuzzMachine) -> bool:
        mask = next(rounds, None)
        if mask is None:
            return False
        generator = fuzz_run.GENERATORS[bits](fuzz, rng, calm=calm)
        drawn = [generator.call(number) for number in range(LINES)]
        fuzz.load([call if mask >> number & 1 else Call(0, (), kind=NOTHING) for number, call in enumerate(drawn)])
        return True

    fuzz = FuzzMachine(next_program, bits=bits, linear=linear)
    fuzz.check = lambda machine: fuzz_checks.faults(machine.domain)
    fuzz.run()
    assert fuzz.faults == []
    assert fuzz.beats > 0


def table_steps(bits: int, rng: random.Random, *, linear: bool) -> Steps:
    if bits == 32:
        return Steps32(TableRig32(linear=linear), rng)
    return Steps(TableRig(linear=linear), rng)


def greedy_tables(share: float, bits: int) -> None:
    """On the domain alone, with translations that never go by themselves: thousands of steps a second."""
    end = time.monotonic() + fuzz_run.SECONDS * share
    domains = 0
    while time.monotonic() < end:
        seed = fuzz_run.SEED + domains
        steps = table_steps(bits, random.Random(seed), linear=bool(seed & 1))
        for _ in range(STEPS):
            assert steps.step() == [], f"seed {seed}"
        domains += 1
    LOG.warning("seed %d: %d steps on %d domains", fuzz_run.SEED, domains * STEPS, domains)
    assert domains >= 1


def tables(fuzz: FuzzMachine, generator: Generator) -> None:
    """Changes of page tables, and writes through what the TLB still holds after each."""
    makers = (
        *[generator.mmu_update, generator.update_va, generator.mmuext, generator.access] * 3,
        *[generator.memory_op, generator.grant, generator.descriptor_tables],
    )
    program: list[Call] = []
    while len(program) < 30:
        program.append(generator.rng.choice(makers)(len(program)))
        if generator.rng.randrange(3):
            program.append(_touch_all(fuzz, generator))
    fuzz.load(program)


def _touch_all(fuzz: FuzzMachine, generator: Generator) -> Call:
    """A write through each mapping that the guest may think it has, of a value that no table may hold."""
    if generator.rng.randrange(2):
        first = fuzz.where["arena"]
        last = first + (fuzz.where["arena_pages"] << 12)
    else:
        first = fuzz.where["window"]
        last = first + (24 << 12)
    return Call(0, (first, last, generator.rng.randrange(512) * 8, fuzz_checks.POISON), kind=TOUCH)


def engine_tables(share: float, neighbour: Neighbour, bits: int, *, public: bool = False) -> None:
    """The engine's own TLB and code: whatever the guest writes, no table and no descriptor changes by it."""
    seconds = fuzz_run.SECONDS * share
    summary = fuzz_run.run_machines(
        seconds, fuzz_run.SEED, tables, calm=True, public=public, bits=bits, more=neighbour.faults
    )
    report(summary, neighbour)
    assert summary.calls > 20 * seconds, str(summary)
