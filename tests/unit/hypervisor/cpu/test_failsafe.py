"""Data segments of a vCPU that comes back, and the failsafe callback's frames (x86/domain.c, load_segments)."""

from __future__ import annotations

from typing import Any

import pytest
from pv_rig import FIRST_FREE, Rig
from pv_rig32 import Rig32

from hypervisor import abi
from hypervisor.cpu.failsafe import reload_segments
from hypervisor.cpu.traps32 import KERNEL_CS, KERNEL_SS
from hypervisor.engines import x86
from hypervisor.errors import GuestFault

GDT, STACK, TOP, HANDLER, RIP = FIRST_FREE + 1, 0x14000, 0x16008, 0x9000, 0x5004
GOOD, GONE, CODE, DEEP = 1 << 3 | 3, 2 << 3 | 3, 3 << 3 | 3, 4 << 3 | 3
DESCRIPTORS = {
    1: 0x12CF_F334_5678_FFFF,  # data at 0x12345678
    2: 0x00CF_7300_0000_FFFF,  # not present
    3: 0x00CF_F900_0000_FFFF,  # code that cannot be read
    4: 0x00CF_D300_0000_FFFF,  # of ring 2: no selector with RPL 3 loads it
}


def prepare(rig: Any) -> Any:
    rig.unmap(GDT)
    rig.fill(GDT, DESCRIPTORS)
    rig.domain.set_gdt(rig.domain.running, [rig.mfn(GDT)], 512)
    rig.state.failsafe_callback, rig.state.kernel_sp = HANDLER, STACK
    rig.regs.rip, rig.regs.gpr[x86.RSP] = RIP, TOP
    rig.regs.fs_base, rig.regs.gs_base = 0xF5, 0x65
    rig.memory.bytes[rig.state.vcpu_info + 1] = 0
    return rig


@pytest.fixture
def rig() -> Rig:
    return prepare(Rig().boot())  # type: ignore[no-any-return]


@pytest.fixture
def rig32() -> Rig32:
    return prepare(Rig32().boot())  # type: ignore[no-any-return]


def test_null_selectors_are_left_alone(rig: Rig) -> None:
    rig.regs.ds, rig.regs.gs = 3, 1
    reload_segments(rig.domain.traps)
    assert rig.engine.segments == [] and rig.regs.rip == RIP


def test_selectors_that_load_are_loaded_as_the_table_is_now(rig: Rig) -> None:
    rig.regs.ds = rig.regs.fs = GOOD
    reload_segments(rig.domain.traps)
    assert rig.engine.segments == [(x86.DS, GOOD, DESCRIPTORS[1]), (x86.FS, GOOD, DESCRIPTORS[1])]
    assert (rig.regs.fs_base, rig.regs.gs_base, rig.regs.rip) == (0xF5, 0x65, RIP)


@pytest.mark.parametrize("bad", [GONE, CODE, 0x1003, 7])
@pytest.mark.parametrize("masks", [0, 1])
def test_the_frame_of_a_64_bit_kernel(rig: Rig, bad: int, masks: int) -> None:
    rig.regs.es, rig.regs.gs = GOOD, bad
    rig.state.failsafe_masks = masks
    rig.regs.gpr[x86.RCX], rig.regs.gpr[x86.R11] = 0xC, 0x11
    rig.regs.rflags = 0x202 | x86.FLAG_TF | x86.FLAG_AC | x86.FLAG_CF
    rig.regs.cs, rig.regs.ss = abi.FLAT_RING3_CS64, abi.FLAT_RING3_SS64
    reload_segments(rig.domain.traps)
    at = (TOP & ~15) - 88
    words = [rig.u64(at + 8 * n) for n in range(11)]
    flags = 0x202 | x86.FLAG_TF | x86.FLAG_AC | x86.FLAG_CF
    assert words == [0xC, 0x11, 0, GOOD, 0, bad, RIP, abi.FLAT_RING3_CS64 & ~3, flags, TOP, abi.FLAT_RING3_SS64]
    assert (rig.regs.rip, rig.regs.gpr[x86.RSP]) == (HANDLER, at)
    assert rig.regs.rflags == 0x202 | x86.FLAG_CF
    assert (x86.GS, 0, 0) in rig.engine.segments
    assert rig.memory.bytes[rig.state.vcpu_info + 1] == masks


def test_a_program_s_segments_are_the_kernel_s_to_mend(rig: Rig) -> None:
    traps = rig.domain.traps
    rig.state.user_cr3, rig.state.gs_base_other = rig.state.kernel_cr3, 0x6E
    traps.to_user()
    rig.regs.cs, rig.regs.ss, rig.regs.ds = 0x33, 0x2B, GONE
    rig.memory.bytes[rig.state.vcpu_info + 1] = 1
    reload_segments(traps)
    assert rig.state.kernel_mode and rig.regs.gs_base == 0x65
    at = STACK - 88
    assert [rig.u64(at + 8 * n) for n in (2, 6, 7, 9, 10)] == [GONE, RIP, 0x33 | 1 << 32, TOP, 0x2B]
    assert not rig.u64(at + 64) & x86.FLAG_IF


def test_a_failsafe_callback_needs_a_stack(rig: Rig) -> None:
    rig.regs.gpr[x86.RSP] = 1 << 40
    rig.regs.ds = GONE
    with pytest.raises(GuestFault, match="failsafe"):
        reload_segments(rig.domain.traps)


def test_the_frame_of_a_32_bit_kernel(rig32: Rig32) -> None:
    rig32.regs.es, rig32.regs.fs = GOOD, GONE
    reload_segments(rig32.domain.traps)
    at = TOP - 28
    assert rig32.unpack(at, "<7I") == (0, GOOD, GONE, 0, RIP, KERNEL_CS, 0x202)
    assert (rig32.regs.rip, rig32.regs.gpr[x86.RSP]) == (HANDLER, at)
    assert (rig32.regs.cs, rig32.regs.ss) == (KERNEL_CS, KERNEL_SS)


def test_the_frame_of_a_32_bit_program(rig32: Rig32) -> None:
    rig32.regs.cs, rig32.regs.ss, rig32.regs.gs = 0xE02B, 0xE033, DEEP
    rig32.state.kernel_mode = 0
    reload_segments(rig32.domain.traps)
    at = STACK - 36
    assert rig32.unpack(at, "<9I") == (0, 0, 0, DEEP, RIP, 0xE02B, 0x202, TOP, 0xE033)
    assert rig32.state.kernel_mode == 1
