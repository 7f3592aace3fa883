"""What a 32-bit guest sees of its processor, and the instructions emulated for it."""

from __future__ import annotations

import pytest
from pv_rig32 import ROOT3, ROOT_L1, Rig32

from hypervisor import abi
from hypervisor.cpu.compat import cr3_of
from hypervisor.engines import x86

CODE = 0x6000


@pytest.fixture
def rig() -> Rig32:
    rig = Rig32().boot()
    rig.regs.rip = CODE
    return rig


def run(rig: Rig32, code: str) -> bool:
    """Emulate the instruction; whether it was one for that. Its length is checked too."""
    data = bytes.fromhex(code)
    rig.put(CODE, data)
    rig.regs.rip = CODE
    done = rig.domain.privileged.emulate()
    assert rig.regs.rip == CODE + (len(data) if done else 0)
    return done


def test_cpuid_without_long_mode(rig: Rig32) -> None:
    cpuid = rig.domain.cpuid
    assert not cpuid.query(1, 0)[2] & 1 << 13, "cmpxchg16b"
    _, _, c, d = cpuid.query(0x8000_0001, 0)
    assert not c & 1 and not d & (1 << 29 | 1 << 11)
    assert cpuid.query(0x4000_0000, 0)[1] == int.from_bytes(b"XenV", "little")


def test_control_registers(rig: Rig32) -> None:
    gpr = rig.regs.gpr
    assert run(rig, "0f20d9") and gpr[x86.RCX] == cr3_of(rig.mfn(ROOT3))  # mov ecx, cr3
    assert run(rig, "0f22d9") and rig.regs.cr3 == rig.area.root(0)  # mov cr3, ecx
    gpr[x86.RCX] = 0x1234_5000
    assert not run(rig, "0f22d9")
    gpr[x86.RDX] = 0xDEAD_BEEF
    assert run(rig, "0f22d2")  # mov cr2, edx
    assert rig.memory.dwords[(rig.state.vcpu_info + abi.COMPAT_VCPU_INFO_ARCH) >> 2] == 0xDEAD_BEEF
    gpr[x86.RAX] = 0
    assert run(rig, "0f20d0") and gpr[x86.RAX] == 0xDEAD_BEEF  # mov eax, cr2


@pytest.mark.parametrize("msr", [0xC000_0100, 0xC000_0101, 0xC000_0102])
def test_segment_bases_are_no_msrs(rig: Rig32, msr: int) -> None:
    rig.regs.gpr[x86.RCX] = msr
    assert not run(rig, "0f32") and not run(rig, "0f30")


def test_efer_has_no_long_mode(rig: Rig32) -> None:
    rig.regs.gpr[x86.RCX] = 0xC000_0080
    assert run(rig, "0f32") and rig.regs.gpr[x86.RAX] == x86.EFER_NX


def test_instructions_are_fetched_through_the_code_segment(rig: Rig32) -> None:
    rig.put(CODE + 0x1000, bytes.fromhex("0fa2"))
    rig.put(CODE, bytes.fromhex("9090"))
    rig.engine.bases[x86.CS] = 0x1000
    assert rig.domain.privileged.emulate() and rig.regs.rip == CODE + 2


# -- page tables written as if they were memory


def write(rig: Rig32, code: str, va: int) -> bool:
    rig.put(CODE, bytes.fromhex(code))
    rig.regs.rip = CODE
    return bool(rig.domain.table_writes.emulate(va))


def test_an_entry_is_written_in_halves(rig: Rig32) -> None:
    at, gpr = ROOT_L1 * 4096 + 20 * 8, rig.regs.gpr
    entry = rig.pte(21, 0x63) | x86.PTE_NX
    gpr[x86.RAX], gpr[x86.RBX] = entry & x86.MASK32, at
    assert write(rig, "c70300000000", at) and rig.word(ROOT_L1, 20) == 0  # mov [ebx], 0
    gpr[x86.RBX], gpr[x86.RDX] = at + 4, entry >> 32
    assert write(rig, "8913", at + 4)  # mov [ebx], edx
    assert write(rig, "a3" + at.to_bytes(4, "little").hex(), at)  # mov [at], eax
    assert rig.word(ROOT_L1, 20) == entry
    rig.check()


def test_an_upper_half_that_does_not_fit_clears_the_present_bit(rig: Rig32) -> None:
    at, gpr = ROOT_L1 * 4096 + 20 * 8, rig.regs.gpr
    gpr[x86.RAX], gpr[x86.RBX] = 0x77, at + 4
    assert write(rig, "8903", at + 4)
    assert rig.word(ROOT_L1, 20) == (0x77 << 32 | rig.pte(20, 0x22)) & ~1
    assert not write(rig, "8903", ROOT_L1 * 4096 + 22 * 8), "a lower half that does not fit is the guest's fault"
    rig.check()


def test_cmpxchg8b_changes_a_whole_entry(rig: Rig32) -> None:
    at, gpr = ROOT_L1 * 4096 + 20 * 8, rig.regs.gpr
    old, new = rig.word(ROOT_L1, 20), rig.pte(30, 0x61)
    gpr[x86.RAX], gpr[x86.RDX], gpr[x86.RBX], gpr[x86.RCX] = old & x86.MASK32, old >> 32, new & x86.MASK32, new >> 32
    gpr[x86.RSI] = at
    assert write(rig, "f00fc70e", at) and rig.word(ROOT_L1, 20) == new
    assert rig.regs.rflags & x86.FLAG_ZF
    rig.check()


def test_an_absolute_address_is_not_relative_to_eip(rig: Rig32) -> None:
    """Where a store begins is computed for the first bytes of a page."""
    rig.regs.gpr[x86.RCX] = 0
    at = ROOT_L1 * 4096
    assert write(rig, "890d" + at.to_bytes(4, "little").hex(), at)  # mov [at], ecx
    assert rig.word(ROOT_L1, 0) >> 32 == rig.mpa(0) >> 32 and not rig.word(ROOT_L1, 0) & x86.MASK32
