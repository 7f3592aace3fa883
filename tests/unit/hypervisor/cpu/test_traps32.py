"""Frames, callbacks and returns of 32-bit guests, byte by byte (x86_64/compat/entry.S, compat_iret)."""

from __future__ import annotations

import pytest
from pv_rig import FIRST_FREE
from pv_rig32 import ROOT_L1, Rig32

from hypervisor import abi
from hypervisor.cpu.compat import cr3_of, mfn_of
from hypervisor.cpu.traps32 import KERNEL_CS, KERNEL_SS, ModeHandler, Traps32
from hypervisor.engines import x86
from hypervisor.errors import GuestFault

STACK, HANDLER, EIP = 0x1E000, 0x9000, 0x5000
USER_CS, USER_SS, USER_ESP = abi.COMPAT_FLAT_USER_CS, abi.COMPAT_FLAT_USER_SS, 0x3_0000
GDT = FIRST_FREE + 1
CR2 = abi.COMPAT_VCPU_INFO_ARCH


@pytest.fixture
def rig() -> Rig32:
    rig = Rig32().boot()
    state = rig.state
    state.kernel_ss, state.kernel_sp = KERNEL_SS, STACK
    state.event_cs, state.event_callback = KERNEL_CS, HANDLER + 0x100
    for vector in (x86.BP, x86.GP, x86.PF, x86.UD, 0x80):
        state.trap_cs[vector], state.trap_address[vector] = KERNEL_CS, HANDLER + vector
    state.trap_flags[0x80] = 3
    rig.regs.rip, rig.regs.gpr[x86.RSP] = EIP, STACK - 0x100
    unmask(rig)
    return rig


def unmask(rig: Rig32) -> None:
    rig.memory.bytes[rig.state.vcpu_info + 1] = 0


def masked(rig: Rig32) -> int:
    return int(rig.memory.bytes[rig.state.vcpu_info + 1])


def to_user(rig: Rig32) -> None:
    rig.regs.cs, rig.regs.ss = USER_CS, USER_SS
    rig.regs.gpr[x86.RSP] = USER_ESP


def traps(rig: Rig32) -> Traps32:
    found = rig.domain.traps
    assert isinstance(found, Traps32)
    return found


def test_a_trap_in_the_kernel_stays_on_its_stack(rig: Rig32) -> None:
    rig.regs.rflags = 0x202 | x86.FLAG_CF | x86.FLAG_TF | x86.FLAG_AC
    traps(rig).inject(x86.BP)
    assert rig.regs.rip == HANDLER + x86.BP and rig.regs.gpr[x86.RSP] == STACK - 0x100 - 12
    pushed = 0x202 | x86.FLAG_CF | x86.FLAG_TF | x86.FLAG_AC
    assert rig.unpack(STACK - 0x10C, "<3I") == (EIP, KERNEL_CS, pushed)
    assert rig.regs.rflags == 0x202 | x86.FLAG_CF | x86.FLAG_AC, "TF is cleared, AC is not"
    assert masked(rig) == 0


def test_a_trap_from_a_program_switches_stacks(rig: Rig32) -> None:
    to_user(rig)
    rig.state.trap_flags[x86.GP] = 4
    traps(rig).inject(x86.GP, 0x1234)
    assert rig.regs.gpr[x86.RSP] == STACK - 24
    assert rig.unpack(STACK - 24, "<6I") == (0x1234, EIP, USER_CS, 0x202, USER_ESP, USER_SS)
    assert (rig.regs.cs, rig.regs.ss, rig.state.kernel_mode) == (KERNEL_CS, KERNEL_SS, 1)
    assert masked(rig) == 1, "the gate masks events"


def test_the_upcall_mask_goes_into_the_frame(rig: Rig32) -> None:
    rig.memory.bytes[rig.state.vcpu_info + 1] = 1
    traps(rig).inject(x86.BP)
    assert rig.unpack(STACK - 0x10C, "<3I") == (EIP, KERNEL_CS | 1 << 16, 2)


@pytest.mark.parametrize(("user", "error", "told"), [(False, 2, 2), (False, 6, 2), (True, 5, 5), (True, 1, 5)])
def test_page_faults_tell_address_and_mode(rig: Rig32, user: bool, error: int, told: int) -> None:
    if user:
        to_user(rig)
    traps(rig).inject(x86.PF, error, 0xDEAD_B000)
    assert rig.memory.dwords[(rig.state.vcpu_info + CR2) >> 2] == 0xDEAD_B000
    assert rig.unpack(rig.regs.gpr[x86.RSP], "<2I") == (told, EIP)


def test_events_use_their_own_selector(rig: Rig32) -> None:
    rig.memory.bytes[rig.state.vcpu_info] = 1
    to_user(rig)
    assert traps(rig).deliver_event()
    assert rig.regs.rip == HANDLER + 0x100 and masked(rig) == 1
    assert not traps(rig).deliver_event(), "masked now"


@pytest.mark.parametrize(
    ("what", "prepare"),
    [
        ("no handler", lambda rig: rig.state.trap_cs.__setitem__(x86.BP, 3)),
        ("no stack", lambda rig: rig.tables.update_l1(ROOT_L1 * 512 + 0x1D, 0)),
        ("kernel stack segment", lambda rig: (to_user(rig), setattr(rig.state, "kernel_ss", 0x11))),
        ("cannot be entered", lambda rig: rig.state.trap_cs.__setitem__(x86.BP, 0x11)),
    ],
)
def test_what_ends_the_domain(rig: Rig32, what: str, prepare: object) -> None:
    assert callable(prepare)
    prepare(rig)
    with pytest.raises(GuestFault, match="unhandled" if what == "no handler" else what):
        traps(rig).inject(x86.BP)


def test_software_interrupts(rig: Rig32) -> None:
    calls: list[int] = []
    traps(rig).hypercall = lambda: calls.append(1)
    traps(rig).software_interrupt(0x82, 2)
    assert calls == [1] and rig.regs.rip == EIP
    to_user(rig)
    traps(rig).software_interrupt(0x82, 2)
    assert calls == [1] and rig.regs.rip == HANDLER + x86.GP
    assert rig.unpack(STACK - 24, "<2I") == (0x82 << 3 | 2, EIP - 2)
    to_user(rig)
    rig.regs.rip = EIP
    traps(rig).software_interrupt(0x80, 2)
    assert rig.regs.rip == HANDLER + 0x80 and rig.unpack(STACK - 20, "<I") == (EIP,)


def test_syscall_is_no_instruction_of_this_processor(rig: Rig32) -> None:
    to_user(rig)
    traps(rig).user_syscall()
    assert rig.regs.rip == HANDLER + x86.UD and rig.unpack(STACK - 20, "<I") == (EIP - 2,)


# -- iret


def iret(rig: Rig32, *words: int) -> None:
    rig.regs.gpr[x86.RSP] = rig.pack(STACK - 0x80, f"<{len(words)}I", *words)
    traps(rig).iret()


def test_iret_to_a_program(rig: Rig32) -> None:
    iret(rig, 7, 0x4000, USER_CS, 0x246 | x86.FLAG_IOPL, USER_ESP, USER_SS)
    regs = rig.regs
    assert (regs.gpr[x86.RAX], regs.rip, regs.gpr[x86.RSP]) == (7, 0x4000, USER_ESP)
    assert (regs.cs, regs.ss, regs.rflags, rig.state.kernel_mode) == (USER_CS, USER_SS, 0x246, 0)


def test_iret_within_the_kernel_keeps_its_stack(rig: Rig32) -> None:
    iret(rig, 7, 0x4000, KERNEL_CS | 1 << 16, 2)
    assert (rig.regs.rip, rig.regs.gpr[x86.RSP]) == (0x4000, STACK - 0x70)
    assert masked(rig) == 1 and rig.regs.rflags & x86.FLAG_IF, "IF of the frame is the upcall mask"


@pytest.mark.parametrize(
    ("cs", "ss", "vector", "code"),
    [
        (0x3, USER_SS, x86.GP, 0),
        (USER_SS, USER_SS, x86.GP, USER_SS & 0xFFFC),
        (USER_CS, 0, x86.GP, 0),
        (USER_CS, KERNEL_SS, x86.GP, KERNEL_SS & 0xFFFC),
        (KERNEL_CS | 2, USER_SS, x86.GP, KERNEL_CS & 0xFFFC),
    ],
)
def test_iret_to_selectors_that_cannot_be_loaded(rig: Rig32, cs: int, ss: int, vector: int, code: int) -> None:
    iret(rig, 7, 0x4000, cs, 0x202, USER_ESP, ss)
    assert rig.regs.rip == HANDLER + vector
    assert rig.unpack(STACK - 24, "<6I") == (code, 0x4000, cs, 0x202, USER_ESP, ss)


def test_iret_to_ring_0_and_without_a_stack_end_the_domain(rig: Rig32) -> None:
    with pytest.raises(GuestFault, match="ring 0"):
        iret(rig, 7, 0x4000, 0xE008, 0x202)
    rig.regs.gpr[x86.RSP] = 0xF580_0000
    with pytest.raises(GuestFault, match="unreadable"):
        traps(rig).iret()


def test_iret_to_vm86_is_a_general_protection_fault(rig: Rig32) -> None:
    iret(rig, 7, 0x1234, 0x100, 0x202 | x86.FLAG_VM, 1, 2, 3, 4, 5, 6)
    assert rig.regs.rip == HANDLER + x86.GP and rig.regs.gpr[x86.RSP] == STACK - 40
    assert rig.unpack(STACK - 40, "<4I") == (0, 0x1234, 0x100, 0x202 | x86.FLAG_VM)


def test_a_stack_segment_with_a_base(rig: Rig32) -> None:
    """Frames are written through the kernel stack's segment, wherever that lies."""
    base = 0x2000
    rig.fill(GDT, {1: 0x00CF_B200_0000_FFFF | base << 16})
    rig.tables.update_l1(ROOT_L1 * 512 + GDT, 0)
    rig.domain.set_gdt(rig.domain.vcpus[0], [rig.mfn(GDT)], 16)
    rig.state.kernel_ss, rig.state.kernel_sp = 9, STACK - base
    to_user(rig)
    traps(rig).inject(x86.BP)
    assert rig.unpack(STACK - 20, "<I") == (EIP,) and rig.regs.gpr[x86.RSP] == STACK - base - 20
    assert rig.regs.ss == 9


# -- the mode, CR3


def test_the_mode_follows_the_code_segment(rig: Rig32) -> None:
    seen: list[int] = []

    class Handler:
        def syscall(self) -> None:
            seen.append(rig.state.kernel_mode)

        def exception(self, _vector: int, _error_code: int, _software: bool) -> None:
            seen.append(rig.state.kernel_mode)

        invalid_opcode = syscall

    handler = ModeHandler(traps(rig), Handler())
    handler.syscall()
    to_user(rig)  # by an `iret` instruction, unseen
    handler.exception(14, 0, False)
    rig.regs.cs = KERNEL_CS
    handler.invalid_opcode()
    assert seen == [1, 0, 1]


@pytest.mark.parametrize("mfn", [0, 1, 0xF_FFFF, 0x10_0000, 0x123_4567, 0xFFFF_FFFF])
def test_cr3_folds_frames_above_4_gib(mfn: int) -> None:
    assert mfn_of(cr3_of(mfn)) == mfn and cr3_of(mfn) <= x86.MASK32
