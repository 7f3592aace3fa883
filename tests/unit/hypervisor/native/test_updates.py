"""Updates of page tables by the compiled code and by Python: the same entries, counts and errors on random tables."""

from __future__ import annotations

import os
import random
import struct
from collections.abc import Iterator

import pytest
from native_rig import COMPILED, EPOCH, SYSCALL, Rig, compare

from hypervisor import abi
from hypervisor.engines import x86
from hypervisor.engines.x86 import PTE_NX, PTE_P, PTE_RW, PTE_US
from hypervisor.memory.frames import L1, NONE, WRITABLE

pytestmark = COMPILED

STATES = int(os.environ.get("REEVE_NATIVE_STATES") or 300)
INVALIDATIONS = (abi.MMUEXT_INVLPG_LOCAL, abi.MMUEXT_INVLPG_MULTI, abi.MMUEXT_INVLPG_ALL)


@pytest.fixture(scope="module")
def rig() -> Iterator[Rig]:
    yield Rig()


class Guest:
    """What a guest that works asks for, and now and then one that does not."""

    def __init__(self, rig: Rig, seed: int) -> None:
        self.rig = rig
        self.dice = random.Random(seed)
        domain = rig.domain
        self.frames, self.base = domain.frames, domain.tables.base
        kinds = [self.frames.kind[i] if self.frames.count[i] else NONE for i in range(self.frames.size)]
        self.tables = [i for i, kind in enumerate(kinds) if kind == L1]
        self.others = [i for i, kind in enumerate(kinds) if kind not in (L1, NONE, WRITABLE)]
        self.ram = [i for i in range(self.frames.ram) if self.frames.refs[i] and kinds[i] in (NONE, WRITABLE)]
        self.vas = [rig.stack, rig.boot.entry & ~0xFFF, rig.stack + 0x1000, 0xFFFF_FFFF_8000_0000, 0, 1 << 47]
        self.entries: list[int] = []
        for index in self.dice.sample(self.ram[44:], 60):
            self.frames.executed[index] = 1
        state = domain.running.state
        state.kernel_mode = 1
        rig.engine.load_flat64(abi.FLAT_KERNEL_CS64, abi.FLAT_KERNEL_SS64)
        rig.regs.rflags = 0x202 | (x86.FLAG_TF if not self.dice.randrange(40) else 0)
        rig.regs.rip = rig.boot.entry
        rig.regs.gpr[x86.RSP] = rig.stack + 0x800
        domain.memory.bytes[state.vcpu_info + abi.VCPU_INFO_EVTCHN_UPCALL_PENDING] = self.dice.randrange(2)
        domain.memory.bytes[state.vcpu_info + abi.VCPU_INFO_EVTCHN_UPCALL_MASK] = self.dice.randrange(2)
        state.event_callback = rig.boot.entry

    def rarely(self, odds: int) -> bool:
        return not self.dice.randrange(odds)

    def target(self) -> int:
        """An mfn to map."""
        if self.rarely(12):
            odd = [self.base - 1, self.base + self.frames.size, 0, (1 << 40) - 1, self.base + self.frames.size - 1]
            return self.dice.choice([*odd, *(self.base + i for i in (*self.tables, *self.others))])
        return self.base + self.dice.choice(self.ram[:40])

    def entry(self) -> int:
        dice = self.dice
        value = self.target() << 12 | dice.choice((PTE_P, PTE_P | PTE_RW, PTE_P | PTE_RW, 0)) | dice.choice((0, PTE_US))
        value |= 0 if self.rarely(8) else PTE_NX
        value |= dice.choice((0, 0x20, 0x60, 0x100, 0x200))
        return value | (dice.choice((0x8, 0x10, 0x80, 1 << 62, 1 << 52, 1 << 53, 1 << 58)) if self.rarely(12) else 0)

    def slot(self) -> int:
        """Machine address of an entry, most often one of a few."""
        dice = self.dice
        if self.rarely(12):
            return self.target() << 12 | dice.randrange(512) * 8
        index = dice.choice(self.tables if dice.randrange(3) else self.ram[40:44])
        return (self.base + index) << 12 | dice.choice((dice.randrange(512), 3, 3, 4, 300)) * 8

    def updates(self, at: int, most: int) -> tuple[int, ...]:
        """Arguments of mmu_update, whose list is put to `at`."""
        count = self.dice.randrange(1, most + 1)
        for number in range(count):
            command = self.dice.choice((0, 0, 0, 2, 2, 3)) if not self.rarely(12) else self.dice.choice((1, 4, 7))
            self.put(at + 16 * number, struct.pack("<2Q", self.slot() | command, self.entry()))
        return self.common(at, count)

    def common(self, at: int, count: int) -> tuple[int, ...]:
        done = self.rig.stack + 0xFF8 if self.rarely(12) else 0
        who = self.dice.choice((0, 9, abi.DOMID_IO, 5 << 16 | abi.DOMID_SELF)) if self.rarely(12) else abi.DOMID_SELF
        at = self.dice.choice((0, 1 << 47, x86.MASK64 - 20)) if self.rarely(16) else at
        return at, count, done, who

    def mapping(self) -> tuple[int, ...]:
        return self.dice.choice(self.vas), self.entry(), self.dice.choice((0, 0, 2, 2, 1, 3)), 0

    def extended(self, at: int) -> tuple[int, ...]:
        command = self.dice.choice(INVALIDATIONS) if self.dice.randrange(4) else self.dice.choice((6, 99))
        self.put(at, struct.pack("<I4xQQ", command, self.dice.choice(self.vas), 0))
        return self.common(at, 1)

    def put(self, va: int, data: bytes) -> None:
        at = self.rig.domain.guest.translate(va)
        self.rig.domain.memory.bytes[at : at + len(data)] = data

    def call(self, at: int, most: int = 6) -> tuple[int, tuple[int, ...]]:
        kind = self.dice.randrange(8)
        if kind < 4:
            return abi.HYPERVISOR_mmu_update, self.updates(at, most)
        if kind < 6:
            return abi.HYPERVISOR_update_va_mapping, self.mapping()
        if kind < 7:
            return abi.HYPERVISOR_mmuext_op, self.extended(at)
        return abi.HYPERVISOR_xen_version if self.rarely(2) else 200, (0, 0, 0, 0)

    def ask(self) -> None:
        """Put a call into the registers."""
        stack = self.rig.stack
        if self.dice.randrange(2):
            number, args = self.call(stack + 0x200)
        else:
            count = self.dice.randrange(1, 7)
            start = stack + (0xF00 if self.rarely(12) else 0)
            for place in range(count):
                number, args = self.call(stack + 0x400 + 0x80 * place)
                if start + 64 * place + 64 <= stack + 0x1000:
                    self.put(start + 64 * place, struct.pack("<8Q", number, 77, *args, 0, 0))
                    self.entries.append(self.rig.domain.guest.translate(start + 64 * place))
            number, args = abi.HYPERVISOR_multicall, (start, count, 0, 0)
        gpr = self.rig.regs.gpr
        gpr[x86.RAX] = number
        for register, value in zip((x86.RDI, x86.RSI, x86.RDX, x86.R10), args, strict=True):
            gpr[register] = value

    def level(self) -> None:
        """Arguments are the callee's, in registers and in a multicall's entries: a preempted call changes them."""
        gpr = self.rig.regs.gpr
        gpr[x86.RDI] = gpr[x86.RSI] = 0
        for at in self.entries:
            self.rig.domain.memory.bytes[at + 16 : at + 32] = bytes(16)


def test_updates_of_page_tables(rig: Rig) -> None:
    clean = rig.snapshot()
    call = SYSCALL(rig.fast.syscall)
    alone = 0
    for seed in range(STATES):
        rig.put(clean)
        guest = Guest(rig, seed)
        guest.ask()
        before = rig.snapshot()
        rig.put(before)
        act = (lambda: call(rig.engine._handle, rig.fast.data), lambda: rig.engine._direct_syscall(0, 0))
        alone += compare(rig, before, act, f"seed {seed}", guest.level)
        # The count that everything stands on, made anew from the tables themselves.
        assert seed % 8 or rig.domain.recount() == [], f"seed {seed}"
    rig.put(clean)
    assert alone > STATES // 8, "plain lists, which these seldom are, are done by the compiled code"


def test_the_epoch_of_a_lost_mapping(rig: Rig) -> None:
    """A frame that nobody may write any more must not become a page table before translations are forgotten."""
    clean = rig.snapshot()
    rig.put(clean)
    guest = Guest(rig, 1)
    rig.regs.rflags = 0x202
    assert rig.engine.flush_epoch == EPOCH + 1
    rig.engine.flush_all()
    rig.engine.load_cr3(rig.regs.cr3)
    frames, words = guest.frames, rig.domain.memory.words
    frame, at = next(
        (target, table * 512 + slot)
        for table in guest.tables
        for slot in range(512)
        if (entry := words[table * 512 + slot]) & (PTE_RW | PTE_P) == PTE_RW | PTE_P
        and frames.count[target := (entry >> 12 & 0xFF_FFFF_FFFF) - guest.base] == 1
        and not frames.executed[target]
        and target != rig.domain.guest.translate(rig.stack) >> 12
    )
    guest.put(rig.stack, struct.pack("<2Q", (guest.base << 12) + at * 8, 0))
    gpr = rig.regs.gpr
    gpr[x86.RAX], gpr[x86.RDI], gpr[x86.RSI], gpr[x86.RDX], gpr[x86.R10] = 1, rig.stack, 1, 0, abi.DOMID_SELF
    done = rig.fast.context.updates
    SYSCALL(rig.fast.syscall)(rig.engine._handle, rig.fast.data)
    assert (rig.fast.context.updates, gpr[x86.RAX], words[at]) == (done + 1, 0, 0)
    assert frames.count[frame] == 0
    assert guest.frames.stamp[frame] == rig.engine.flush_epoch == EPOCH + 3
    rig.put(clean)
