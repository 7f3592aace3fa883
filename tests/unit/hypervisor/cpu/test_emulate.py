"""Privileged instructions, CPUID, MSRs and debug registers of a PV guest."""

from __future__ import annotations

import struct

import pytest
from pv_rig import FIRST_FREE, Rig

from hypervisor import abi
from hypervisor.cpu.cpuid import XEN_BASE
from hypervisor.cpu.emulate import FORCED_CPUID
from hypervisor.cpu.msr import EFER, FS_BASE, GS_BASE, KERNEL_GS_BASE, TSC, MsrPolicy
from hypervisor.cpu.policy import CONSTANT_MSRS
from hypervisor.engines import x86
from hypervisor.engines.x86 import RAX, RBX, RCX, RDX
from hypervisor.memory.frames import L4

CODE, OTHER_ROOT = FIRST_FREE, FIRST_FREE + 1
START = 0x1111_2222_3333_4444


@pytest.fixture
def rig() -> Rig:
    made = Rig().boot()
    made.regs.rip = CODE * 4096
    made.regs.gpr[RAX] = START
    return made


def emulate(rig: Rig, code: str) -> bool:
    raw = bytes.fromhex(code)
    rig.put(CODE * 4096, raw.ljust(16, b"\xcc"))
    rig.regs.rip = CODE * 4096
    handled = rig.domain.privileged.emulate()
    assert rig.regs.rip == CODE * 4096 + (len(raw) if handled else 0)
    return bool(handled)


def user(rig: Rig) -> None:
    rig.state.kernel_mode = 0


NEVER = [
    ("f4", "hlt: no guest instruction, there is SCHEDOP_block"),
    ("0f08", "invd"),
    ("0f0100", "sgdt"),
    ("0f30", "wrmsr of no MSR"),
    ("0f32", "rdmsr of no MSR"),
    ("0f22f8", "mov cr7, rax"),
    ("0f20f8", "mov rax, cr7"),
    ("440f20c0", "mov rax, cr8"),
    ("90", "nop"),
    ("8907", "mov [rdi], eax"),
]


@pytest.mark.parametrize(("code", "text"), NEVER, ids=lambda v: v[:12])
def test_what_is_not_emulated_faults(rig: Rig, code: str, text: str) -> None:
    gpr = list(rig.regs.gpr)
    assert not emulate(rig, code), text
    assert list(rig.regs.gpr) == gpr


@pytest.mark.parametrize("code", ["0f06", "0f09", "0f20c0", "0f22c0", "0fa2", "0f32", "0f21f8", "0f23f8"])
def test_user_mode_has_no_privileged_instructions(rig: Rig, code: str) -> None:
    rig.regs.gpr[RCX] = EFER
    assert emulate(rig, code) or code == "0f23f8"
    rig.regs.gpr[RAX] = 0
    user(rig)
    assert not emulate(rig, code)


# architectural_iopl, in user mode, iopl → in, out, cli and sti allowed?
IOPL = [
    (False, False, 0, False), (False, False, 1, True), (False, False, 3, True),
    (False, True, 1, False), (False, True, 2, False), (False, True, 3, True),
    (True, False, 0, True), (True, False, 3, True), (True, True, 0, False), (True, True, 3, True),
]  # fmt: skip


@pytest.mark.parametrize(("architectural", "in_user", "iopl", "allowed"), IOPL)
@pytest.mark.parametrize("code", ["e480", "ec", "ed", "66ed", "e680", "ee", "ef", "fa", "fb"])
def test_iopl(rig: Rig, code: str, architectural: bool, in_user: bool, iopl: int, allowed: bool) -> None:
    rig.domain.traps.architectural_iopl = architectural
    rig.state.iopl = iopl
    rig.state.kernel_mode = int(not in_user)
    assert emulate(rig, code) is allowed


@pytest.mark.parametrize(
    ("code", "value"),
    [
        ("ec", START | 0xFF),
        ("66ed", START | 0xFFFF),
        ("ed", 0xFFFF_FFFF),
        ("e480", START | 0xFF),
        ("48ed", 0xFFFF_FFFF),
    ],
)
def test_ports_read_as_all_ones(rig: Rig, code: str, value: int) -> None:
    rig.state.iopl = 3
    assert emulate(rig, code)
    assert rig.regs.gpr[RAX] == value


def test_clts_and_cr0(rig: Rig) -> None:
    rig.regs.task_switched = True
    assert emulate(rig, "0f20c0")
    assert rig.regs.gpr[RAX] & x86.CR0_TS and rig.regs.gpr[RAX] & x86.CR0_PG
    assert emulate(rig, "0f06") and not rig.regs.task_switched
    rig.regs.gpr[RAX] = 0x8005_003B
    assert emulate(rig, "0f22c0") and rig.regs.task_switched


def test_cr2_and_cr4(rig: Rig) -> None:
    assert emulate(rig, "0f22d0")
    assert rig.u64(rig.state.vcpu_info + abi.VCPU_INFO_ARCH + abi.ARCH_VCPU_INFO_CR2) == START
    assert emulate(rig, "0f20d1") and rig.regs.gpr[RCX] == START
    assert emulate(rig, "0f20e1") and rig.regs.gpr[RCX] & x86.CR4_PAE
    assert emulate(rig, "0f22e0")


def test_cr3_switches_the_root(rig: Rig) -> None:
    assert emulate(rig, "0f20d8") and rig.regs.gpr[RAX] == rig.mpa(1)
    rig.unmap(OTHER_ROOT)
    rig.fill(OTHER_ROOT, {0: rig.word(1, 0)})
    rig.tables.pin(rig.mfn(OTHER_ROOT), L4)
    rig.regs.gpr[RAX] = rig.mpa(OTHER_ROOT)
    assert emulate(rig, "0f22d8")
    assert rig.regs.cr3 == rig.state.kernel_cr3 == rig.mpa(OTHER_ROOT)
    rig.regs.gpr[RAX] = rig.mpa(CODE)
    assert not emulate(rig, "0f22d8"), "no table"
    assert rig.regs.cr3 == rig.mpa(OTHER_ROOT)
    rig.check()


def test_code_that_cannot_be_read(rig: Rig) -> None:
    rig.regs.rip = 1 << 40
    assert not rig.domain.privileged.emulate()
    assert not rig.domain.privileged.forced_cpuid()


def test_the_forced_emulation_prefix(rig: Rig) -> None:
    rig.put(CODE * 4096, FORCED_CPUID)
    rig.regs.gpr[RAX], rig.regs.gpr[RCX] = XEN_BASE, 0
    assert rig.domain.privileged.forced_cpuid()
    words = [rig.regs.gpr[r] for r in (RBX, RCX, RDX)]
    assert struct.pack("<3I", *words) == b"XenVMMXenVMM"
    assert rig.regs.rip == CODE * 4096 + len(FORCED_CPUID)
    rig.put(CODE * 4096 + 2, b"xem")
    rig.regs.rip = CODE * 4096
    assert not rig.domain.privileged.forced_cpuid()
    user(rig)
    rig.put(CODE * 4096, FORCED_CPUID)
    assert rig.domain.privileged.forced_cpuid(), "programs may ask too"


HIDDEN = [
    (1, 2, 2, "DTES64"), (1, 2, 3, "MONITOR"), (1, 2, 5, "VMX"), (1, 2, 17, "PCID"), (1, 2, 21, "x2APIC"),
    (1, 2, 26, "XSAVE"), (1, 2, 27, "OSXSAVE"), (1, 2, 28, "AVX"), (1, 2, 24, "TSC deadline"),
    (1, 3, 1, "VME"), (1, 3, 3, "PSE"), (1, 3, 7, "MCE"), (1, 3, 12, "MTRR"), (1, 3, 13, "PGE"), (1, 3, 16, "PAT"),
    (0x8000_0001, 3, 26, "1 GiB pages"), (0x8000_0001, 3, 27, "RDTSCP"), (0x8000_0001, 2, 2, "SVM"),
]  # fmt: skip


@pytest.mark.parametrize(("leaf", "register", "bit", "name"), HIDDEN, ids=[row[3] for row in HIDDEN])
def test_features_a_pv_guest_must_not_see(rig: Rig, leaf: int, register: int, bit: int, name: str) -> None:
    """The engine of the rig claims every feature there is."""
    assert not rig.domain.cpuid.query(leaf, 0)[register] >> bit & 1, name


@pytest.mark.parametrize(
    ("leaf", "register", "bit"),
    [(1, 2, 31), (1, 3, 0), (1, 3, 25), (1, 2, 0), (0x8000_0001, 3, 29), (0x8000_0001, 3, 11), (0x8000_0001, 3, 20)],
)
def test_features_it_keeps(rig: Rig, leaf: int, register: int, bit: int) -> None:
    """Hypervisor, FPU, SSE, SSE3, long mode, syscall, NX."""
    assert rig.domain.cpuid.query(leaf, 0)[register] >> bit & 1


def test_xens_leaves(rig: Rig) -> None:
    query = rig.domain.cpuid.query
    assert query(XEN_BASE, 0)[0] == XEN_BASE + 5
    assert query(XEN_BASE + 1, 0)[0] == 4 << 16 | 17
    assert query(XEN_BASE + 3, 0)[2] == rig.domain.scale.khz
    assert query(XEN_BASE + 3, 1)[2:] == (rig.domain.scale.mul, rig.domain.scale.shift & 0xFF)
    assert query(XEN_BASE + 0x50, 0) == query(0x4000_0100, 0) == query(0x7FFF_FFFF, 0) == query(0xD, 1) == (0, 0, 0, 0)


def test_cpuid_takes_any_number_without_growing(rig: Rig) -> None:
    first = rig.domain.cpuid.query(1, 0)
    for leaf in range(2000):
        assert len(rig.domain.cpuid.query(leaf << 7, leaf)) == 4
    assert len(rig.domain.cpuid._cache) <= 256
    assert rig.domain.cpuid.query(1, 0) == first


def test_segment_base_msrs(rig: Rig) -> None:
    msr = MsrPolicy(rig.domain.traps, CONSTANT_MSRS)
    for number, value in ((FS_BASE, 0x1000), (GS_BASE, 0xFFFF_8880_0000_0000), (KERNEL_GS_BASE, 0x3000)):
        assert msr.write(number, value) and msr.read(number) == value
        assert not msr.write(number, 1 << 63), "not canonical"
        assert msr.read(number) == value
    assert (rig.regs.fs_base, rig.regs.gs_base, rig.state.gs_base_other) == (0x1000, 0xFFFF_8880_0000_0000, 0x3000)


def test_other_msrs(rig: Rig) -> None:
    msr = MsrPolicy(rig.domain.traps, CONSTANT_MSRS)
    assert msr.read(EFER) == 0xD01 and msr.write(EFER, 0xD01) and not msr.write(EFER, 0x1D01)
    assert msr.read(TSC) == 1234
    assert msr.read(0x1234_5678) is None and not msr.write(0x1234_5678, 0)
    assert msr.read(0xC000_0082) is None, "LSTAR is Xen's"


def test_rdmsr_and_wrmsr_split_the_value(rig: Rig) -> None:
    rig.regs.gpr[RCX], rig.regs.gpr[RAX], rig.regs.gpr[RDX] = (
        FS_BASE | 0xABCD << 32,
        0x1111_0000_2000,
        0xFFFF_0000_0000_0001,
    )
    assert emulate(rig, "0f30") and rig.regs.fs_base == 0x1_0000_2000
    assert emulate(rig, "0f32") and (rig.regs.gpr[RAX], rig.regs.gpr[RDX]) == (0x2000, 1)


DEBUG = [
    (0, 0x1000, 0x1000), (3, 0xFFFF_8880_0000_0000, 0xFFFF_8880_0000_0000),
    (0, 0xFFFF_8100_0000_0000, None), (1, 1 << 62, None),
    (6, 0, 0xFFFF_0FF0), (6, 0xFFFF_FFFF, 0xFFFF_EFFF), (7, 0, 0x400), (7, 0x0003_0002, 0x0003_0402),
    (7, 0x0002_0002, None), (4, 0, 0xFFFF_0FF0), (5, 0, 0x400),
]  # fmt: skip


@pytest.mark.parametrize(("number", "given", "stored"), DEBUG)
def test_debug_registers(rig: Rig, number: int, given: int, stored: int | None) -> None:
    """mov drN, rax and back into rcx; DR4 and DR5 are DR6 and DR7."""
    rig.regs.gpr[RAX] = given
    assert emulate(rig, f"0f23{0xC0 | number << 3:02x}") is (stored is not None)
    assert emulate(rig, f"0f21{0xC1 | number << 3:02x}")
    if stored is not None:
        assert rig.regs.gpr[RCX] == stored
