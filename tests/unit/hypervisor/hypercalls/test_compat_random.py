"""Random hypercalls of a 32-bit guest: whatever it passes, it gets a number back and the counts stay exact."""

from __future__ import annotations

import random
import struct

import pytest
from pv_rig import BASE, FIRST_FREE, PAGES
from pv_rig32 import KRO, KRW, Rig32

from hypervisor import abi
from hypervisor.abi import errno
from hypervisor.errors import GuestFault

CALLS = 600
ARGUMENTS = 0x10000
FRAMES = range(FIRST_FREE, PAGES)
OFTEN = (1, 12, 13, 14, 20, 24, 26, 29, 32)


class Dice(random.Random):
    """Numbers that are likely to mean something."""

    def word(self) -> int:
        return self.choice(
            (
                self.randrange(8),
                self.randrange(64),
                ARGUMENTS + 4 * self.randrange(256),
                BASE + self.choice(FRAMES),
                (BASE + self.choice(FRAMES)) << 12 | self.choice((KRO, KRW, 7, 0, 0x1000 - 1)),
                abi.DOMID_SELF,
                self.choice((0xF580_0000, 0xFFFF_FFFF, 0x8000_0001, 0x7FFF_FFFF, PAGES << 12)),
                self.getrandbits(32),
            )
        )

    def structure(self) -> bytes:
        return struct.pack("<64I", *(self.word() for _ in range(64)))


def fresh_rig() -> Rig32:
    rig = Rig32(vcpus=2).boot()
    rig.engine.save_cpu = lambda: b"state"
    rig.engine.restore_cpu = lambda _state: None
    rig.engine.set_gdt = lambda _base, _limit: None
    return rig


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_random_hypercalls(seed: int) -> None:
    dice = Dice(seed)
    rig = fresh_rig()
    answered = 0
    for turn in range(CALLS):
        if rig.guest.translate(ARGUMENTS, write=True) == ARGUMENTS:
            rig.put(ARGUMENTS, dice.structure())
        number = dice.choice((dice.randrange(64), dice.choice(OFTEN)))
        rig.domain.preempt = dice.random() < 0.1
        rig.regs.rip = 0x5002
        try:
            result = rig.call(number, *(dice.word() for _ in range(5)))
            answered += rig.regs.rip == 0x5002 and result >= -errno.EOPNOTSUPP
        except GuestFault:  # an iret to nowhere: it ended itself
            rig.check()
            rig = fresh_rig()
        rig.domain.shutdown_code = None
        rig.domain.vcpus[0].blocked = False
        if turn % 300 == 0:
            rig.check()
    assert answered > CALLS // 2
    rig.check()
