"""Values where it hurts: frames, page-table entries, addresses, numbers for one machine."""

from __future__ import annotations

import random

from fuzz_machine import Call, FuzzMachine

from hypervisor import abi
from hypervisor.engines import x86

ALL = (1 << 64) - 1
RW = x86.PTE_P | x86.PTE_RW | x86.PTE_US | x86.PTE_A
RO = x86.PTE_P | x86.PTE_US | x86.PTE_A
DOMIDS = (abi.DOMID_SELF, abi.DOMID_SELF, abi.DOMID_SELF, 9, 0, 7, 8, 10, *range(0x7FF0, 0x8000), 0xFFFF)
BAD_POINTERS = (
    *(0, 8, 0x1000, ALL, ALL - 7, ALL - 15, 0x8000_0000_0000, 0x7FFF_FFFF_FFF8, 0x7FFF_FFFF_F000),
    *(
        0xFFFF_8000_0000_0000,
        0xFFFF_8200_0000_0000,
        0xFFFF_87FF_FFFF_FFF8,
        0xFFFF_8800_0000_0000,
        0x8000_0000_0000_0000,
    ),
)
DESCRIPTORS = (
    *(0, 0x00AF_FB00_0000_FFFF, 0x00CF_F300_0000_FFFF, 0x00AF_9B00_0000_FFFF, 0x0000_EC00_E033_0000, ALL),
    *(0x0000_8900_0000_0067, 0x0000_E500_0000_0000, 0x00CF_7300_0000_FFFF, 0x0000_8E00_0000_0000),
)


class Values:
    """Values for one machine.

    :param calm: leave out what mostly ends the guest.
    """

    BAD_POINTERS = BAD_POINTERS

    def __init__(self, fuzz: FuzzMachine, rng: random.Random, *, calm: bool = False) -> None:
        self.fuzz = fuzz
        self.rng = rng
        self.calm = calm
        domain = fuzz.domain
        where = fuzz.where
        self.virt_base = fuzz.virt_base
        self.base = domain.config.base_mfn
        self.ram, self.size = domain.frames.ram, domain.frames.size
        first = (where["arena"] - self.virt_base) >> 12
        self.arena = range(first, first + where["arena_pages"])
        self.l1 = (where["window_l1"] - self.virt_base) >> 12
        self.tables = (self.l1, self.l1 + 1, self.l1 + 2, fuzz.boot.l4_mfn - self.base)

    def one_of(self, *choices: int) -> int:
        return self.rng.choice(choices)

    def frame(self) -> int:
        """A machine frame number."""
        rng = self.rng
        what = rng.randrange(16)
        if what < 10:
            return self.base + rng.choice(self.arena)
        if what < 12:
            # The root least of all: the guest's own code hangs on it.
            return self.base + rng.choice(self.tables if not rng.randrange(6) else self.tables[:3])
        if what == 12:
            # Its own code and stacks only now and then: a guest that writes those is soon gone.
            return self.base + rng.randrange(self.arena.stop if rng.randrange(50) else 0, self.ram)
        if what == 13 and rng.randrange(2):
            return self.base + rng.choice(self._shared())
        if what == 13:
            return self.base + self.ram + rng.randrange(self.size - self.ram)
        return rng.choice(
            (0, 1, self.base - 1, self.base + self.size, 0x40000, 0x40010, 1 << 27, (1 << 40) - 1, ALL, 1 << 52)
        )

    def _shared(self) -> list[int]:
        """Frames of Xen's that the domain may map."""
        grants = self.fuzz.domain.grants.table
        return [self.fuzz.domain.area.shared_info, *grants.frames[:2], *grants.status_frames[:2]]

    def entry(self) -> int:
        rng = self.rng
        if rng.randrange(8) == 0:
            return 0
        flags = rng.choice(
            (RW, RW, RO, RO, RO | x86.PTE_NX, RW | x86.PTE_NX, x86.PTE_P, x86.PTE_P | x86.PTE_RW, RW | 0x80)
        )
        if rng.randrange(8) == 0:
            flags = rng.getrandbits(12) | rng.getrandbits(12) << 52
        return (self.frame() << 12 | flags) & ALL

    def arena_va(self) -> int:
        """An address in the guest's linear mapping of the arena, or in its window."""
        rng = self.rng
        if rng.randrange(2):
            return self.virt_base + (rng.choice(self.arena) << 12)
        return self.fuzz.where["window"] + (rng.randrange(24) << 12)

    def pointer(self, good: int) -> int:
        """Mostly `good`."""
        what = self.rng.randrange(32)
        if what == 0:
            return self.rng.choice(self.BAD_POINTERS)
        if what == 1:
            return self.fuzz.where["edge"] - self.rng.choice((1, 4, 8, 16, 24, 64))
        if what == 2:
            return good + self.rng.choice((1, 4, -8))
        return good

    def number(self) -> int:
        rng = self.rng
        return rng.choice(
            (0, 1, 2, 3, 5, 16, 63, 64, rng.randrange(32), rng.getrandbits(rng.randrange(65)), ALL, 1 << 31)
        )

    def domid(self) -> int:
        return self.rng.choice(DOMIDS)

    def port(self) -> int:
        return self.one_of(0, 1, 2, 3, 4, 5, 6, 7, 63, 64, 1023, 1024, 4095, 4096, 131071, 1 << 31, 0xFFFF_FFFF)

    def count(self, good: int) -> int:
        return (
            good
            if self.rng.randrange(8)
            else self.one_of(0, 1, 2, good + 1, 257, 1 << 31, 0x8000_0001, 0xFFFF_FFFF, ALL)
        )

    def _own(self, number: int, op: int, command: int, image: bytes, *rest: int) -> Call:
        """A call `op(command, pointer to image, …)`."""
        return Call(op, (command, self.pointer(self.fuzz.image(number)), *rest), image=image)

    # -- families
