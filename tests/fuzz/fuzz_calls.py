"""Hypercalls that make sense nearly always, with values where it hurts.

`Generator` knows the sub-operations and the layouts of their arguments (public headers of Xen). It draws from a
`random.Random`, a plain one for speed or hypothesis' own, which shrinks what it finds.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Callable

from fuzz_calls_cpu import CpuCalls
from fuzz_calls_memory import MemoryCalls
from fuzz_machine import (
    AND8,
    COMPARE_EXCHANGE,
    EXCHANGE,
    FILL,
    HYPERCALL,
    OR8,
    TOUCH,
    WRITE1,
    WRITE4,
    WRITE8,
    Call,
    FuzzMachine,
)
from fuzz_values import ALL, DESCRIPTORS

from hypervisor import abi

DEADLY = frozenset((abi.HYPERVISOR_set_trap_table, abi.HYPERVISOR_set_callbacks, abi.HYPERVISOR_stack_switch))
"""With arguments that were not meant for them these end most guests, and that is all they do."""


class Generator(MemoryCalls, CpuCalls):
    """Calls for one machine."""

    def __init__(self, fuzz: FuzzMachine, rng: random.Random, *, calm: bool = False) -> None:
        super().__init__(fuzz, rng, calm=calm)
        self.makers: tuple[Callable[[int], Call], ...] = (
            *[self.mmu_update, self.update_va, self.mmuext] * 4,
            *[self.memory_op, self.grant, self.event, self.access] * 3,
            *[self.multicall, self.descriptor_tables, self.vcpu, self.information, self.sched, self.processor],
            self.raw,
        )

    def call(self, number: int) -> Call:
        """A call for line `number` of a program."""
        call = self.rng.choice(self.makers)(number)
        deadly = call.kind == HYPERCALL and (call.number in DEADLY or call.number == abi.HYPERVISOR_multicall)
        if deadly and self.rng.randrange(100):
            return call
        if self.rng.randrange(40) == 0:
            arguments = list(call.arguments) + [0] * (6 - len(call.arguments))
            arguments[self.rng.randrange(6)] = self.number()
            call.arguments = tuple(arguments)
        if self.rng.randrange(64) == 0:
            call.delay = self.rng.randrange(2000)
        return call

    def event(self, number: int) -> Call:
        rng = self.rng
        command = rng.randrange(16) if rng.randrange(16) else self.number()
        if command in (10, 14) and rng.randrange(4):
            command = 4
        first, second = (
            self.one_of(self.port(), self.domid() | self.domid() << 16, rng.randrange(24)),
            self.one_of(self.port(), 0, 1),
        )
        data = struct.pack("<4I", first, second, self.port(), 0)
        if command in (11, 12):
            offset = rng.choice((0, 8, 64, 4096 - 72, 4096 - 8, 3))
            data = struct.pack("<Q2IQ", self.frame() & ALL, offset, rng.randrange(3), 0)
        if rng.randrange(16) == 0:
            return Call(
                abi.HYPERVISOR_event_channel_op_compat,
                (self.fuzz.image(number),),
                image=struct.pack("<I", command & 15) + data,
            )
        return self._own(number, abi.HYPERVISOR_event_channel_op, command, data)

    def multicall(self, number: int) -> Call:
        rng = self.rng
        entries = b""
        many = rng.randrange(1, 6)
        image = self.fuzz.image(number)
        for at in range(many):
            inner = rng.choice(self.makers)(number)
            no_use = inner.number in DEADLY or inner.number in (abi.HYPERVISOR_multicall, abi.HYPERVISOR_callback_op)
            if inner.kind != HYPERCALL or (no_use and rng.randrange(50)):
                inner = self.update_va(number)
            if inner.image:  # there is room for one: most read what another call left in place
                inner.arguments = tuple(image + 320 if a == image else a for a in inner.arguments)
                entries = entries.ljust(at * self.ENTRY_SIZE, b"\0")
            entries += self._entry_of(inner)
        tail = self.mmu_update(number).image
        # What lies behind the last entry reads as set_trap_table(NULL).
        count = many if rng.randrange(60) else rng.choice((0, 1, many + 1))
        return Call(
            abi.HYPERVISOR_multicall,
            (self.pointer(image) if not rng.randrange(20) else image, count),
            image=entries.ljust(320, b"\0") + tail,
        )

    ENTRY_SIZE = 64

    def _entry_of(self, inner: Call) -> bytes:
        six = (*inner.arguments, 0, 0, 0, 0, 0, 0)[:6]
        return struct.pack("<8Q", inner.number, 0, *(a & ALL for a in six))

    def descriptor_tables(self, number: int) -> Call:
        rng = self.rng
        if rng.randrange(2):
            many = rng.randrange(3)
            frames = b"".join(struct.pack("<Q", self.frame() & ALL) for _ in range(many))
            entries = self.count(512 * many)
            return Call(abi.HYPERVISOR_set_gdt, (self.pointer(self.fuzz.image(number)), entries), image=frames)
        address = (self.frame() << 12 | rng.randrange(512) << 3) & ALL
        return Call(abi.HYPERVISOR_update_descriptor, (address, rng.choice((*DESCRIPTORS, rng.getrandbits(64)))))

    def access(self, _number: int) -> Call:
        rng = self.rng
        what = rng.choice((WRITE8, WRITE8, WRITE4, WRITE1, EXCHANGE, COMPARE_EXCHANGE, OR8, AND8, FILL, TOUCH))
        l1 = self.virt_base + (self.l1 << 12) + rng.randrange(24) * 8
        at = self.one_of(l1, l1, l1, self.arena_va() + rng.randrange(8) * 8, l1 + rng.randrange(8), l1 + 4096)
        if what == TOUCH:
            first = self.arena_va()
            return Call(
                0, (first, first + (rng.randrange(1, 9) << 12), rng.randrange(512) * 8, self.number()), kind=TOUCH
            )
        third = rng.randrange(8) if what == FILL else self.entry()
        return Call(0, (at, self.entry(), third), kind=what)

    def raw(self, number: int) -> Call:
        rng = self.rng
        op = rng.choice(
            [n for n in range(64) if n != abi.HYPERVISOR_iret and (n not in DEADLY or not rng.randrange(30))]
        )
        image = self.fuzz.image(number)
        arguments = tuple(
            rng.choice((self.number(), image, self.frame() & ALL, self.pointer(image), self.entry())) & ALL
            for _ in range(6)
        )
        if op == abi.HYPERVISOR_multicall:
            arguments = (image, rng.randrange(3), *arguments[2:])
        return Call(op, arguments, image=rng.getrandbits(512).to_bytes(64, "little"))

    def values(self) -> list[int]:
        """64 values for raw mode."""
        makers = (
            lambda: self.frame() & ALL,
            lambda: self.frame() << 12 & ALL,
            self.entry,
            self.arena_va,
            lambda: self.pointer(self.fuzz.big),
            lambda: self.fuzz.big,
            self.domid,
        )
        return [self.rng.choice(makers)() & ALL for _ in range(64)]
