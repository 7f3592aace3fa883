"""Bounce frames bit for bit (xen/arch/x86/x86_64/entry.S, create_bounce_frame) and the ways back."""

from __future__ import annotations

import struct

import pytest
from pv_rig import FIRST_FREE, NX, RO, ROOT_L1, Rig

from hypervisor import abi
from hypervisor.cpu.traps import TI_IF
from hypervisor.engines import x86
from hypervisor.engines.x86 import FLAG_AC, FLAG_DF, FLAG_NT, FLAG_RF, FLAG_TF, R11, RAX, RCX, RSP
from hypervisor.errors import GuestFault
from hypervisor.memory.frames import L4

STACK, KSTACK, GDT, USER = FIRST_FREE, FIRST_FREE + 1, FIRST_FREE + 2, FIRST_FREE + 3
TOP, KTOP = STACK * 4096 + 0xF00, KSTACK * 4096 + 0xFF8
HANDLER, RIP = 0x1234_5000, 0x5678_0010
CS64, SS64 = abi.FLAT_RING3_CS64, abi.FLAT_RING3_SS64
USER_CS, USER_SS = 0x33, 0x2B
IRET = struct.Struct("<9Q")


@pytest.fixture
def rig() -> Rig:
    made = Rig().boot()
    made.unmap(USER, GDT)
    made.fill(
        GDT,
        {
            5: 0x00CF_F300_0000_FFFF,
            6: 0x00AF_FB00_0000_FFFF,
            7: 0x00CF_FB00_0000_FFFF,
            8: 0x00CF_7300_0000_FFFF,
            9: 0x00AF_7B00_0000_FFFF,
            10: 0x0000_8C00_E033_0000,
        },
    )
    made.domain.set_gdt(made.domain.running, [made.mfn(GDT)], 512)
    made.tables.pin(made.mfn(made.fill(USER, {0: made.word(1, 0)})), L4)
    made.domain.new_user_baseptr(made.mfn(USER))
    state, regs = made.state, made.regs
    state.kernel_sp = KTOP
    regs.gpr[RSP], regs.gpr[RCX], regs.gpr[R11] = TOP, 0xCC, 0x11
    regs.rip = RIP
    regs.gs_base, state.gs_base_other = 0x1000, 0x2000
    return made


def masked(rig: Rig) -> int:
    return int(rig.memory.bytes[rig.state.vcpu_info + abi.VCPU_INFO_EVTCHN_UPCALL_MASK])


def set_masked(rig: Rig, value: int, pending: int = 0) -> None:
    rig.memory.bytes[rig.state.vcpu_info + abi.VCPU_INFO_EVTCHN_UPCALL_MASK] = value
    rig.memory.bytes[rig.state.vcpu_info + abi.VCPU_INFO_EVTCHN_UPCALL_PENDING] = pending


def to_user(rig: Rig) -> None:
    rig.domain.traps.to_user()
    rig.regs.cs, rig.regs.ss = USER_CS, USER_SS


def handler(rig: Rig, vector: int, flags: int = 0) -> None:
    rig.state.trap_address[vector], rig.state.trap_flags[vector] = HANDLER, flags


def frame(rig: Rig, words: int) -> tuple[int, ...]:
    return struct.unpack(f"<{words}Q", rig.guest.read(rig.regs.gpr[RSP], 8 * words))


@pytest.mark.parametrize("mask", [0, 1, 0x80])
@pytest.mark.parametrize("masks_events", [False, True])
def test_a_trap_in_the_kernel(rig: Rig, mask: int, masks_events: bool) -> None:
    """{ RCX, R11, RIP, CS | saved_upcall_mask, RFLAGS, RSP, SS } on the stack in use, aligned down to 16 bytes."""
    rig.regs.gpr[RSP] = TOP + 9
    set_masked(rig, mask)
    handler(rig, x86.UD, TI_IF if masks_events else 0)
    rig.domain.traps.inject(x86.UD)
    assert rig.regs.gpr[RSP] == TOP - 56
    flags = 0x202 if not mask else 2
    assert frame(rig, 7) == (0xCC, 0x11, RIP, CS64 & ~3 | mask << 32, flags, TOP + 9, SS64)
    assert (rig.regs.rip, rig.regs.cs, rig.regs.ss) == (HANDLER, CS64, SS64)
    assert masked(rig) == (1 if masks_events else mask)
    assert rig.engine.regs.cr3 == rig.state.kernel_cr3 and rig.regs.gs_base == 0x1000


def test_a_trap_in_user_mode_goes_to_the_kernels_stack_and_tables(rig: Rig) -> None:
    set_masked(rig, 0)
    to_user(rig)
    assert rig.regs.gs_base == 0x2000 and rig.regs.cr3 == rig.mpa(USER)
    handler(rig, x86.UD)
    rig.domain.traps.inject(x86.UD)
    assert rig.regs.gpr[RSP] == (KTOP & ~15) - 56
    assert frame(rig, 7) == (0xCC, 0x11, RIP, USER_CS, 0x202, TOP, USER_SS)
    assert rig.state.kernel_mode and rig.regs.cr3 == rig.state.kernel_cr3
    assert (rig.regs.gs_base, rig.state.gs_base_other) == (0x1000, 0x2000)


WITH_CODE = (8, 10, 11, 12, 13, 14, 17)


@pytest.mark.parametrize("vector", range(20))
def test_which_exceptions_have_an_error_code(rig: Rig, vector: int) -> None:
    handler(rig, vector)
    rig.domain.traps.inject(vector, 0x58, cr2=0)
    words = 8 if vector in WITH_CODE else 7
    assert rig.regs.gpr[RSP] == (TOP & ~15) - 8 * words
    got = frame(rig, words)
    assert got[0] == 0xCC and got[-5] == RIP
    if words == 8:
        assert got[2] == 0x58


@pytest.mark.parametrize("user", [False, True])
@pytest.mark.parametrize("code", [0, 2, 4, 7, 0x15])
def test_a_page_faults_error_code_tells_the_guests_mode(rig: Rig, user: bool, code: int) -> None:
    """The engine always reports ring 3; the guest's kernel runs there too."""
    if user:
        to_user(rig)
    handler(rig, x86.PF)
    rig.regs.cr2 = 0xDEAD_B000
    rig.domain.traps.inject(x86.PF, code)
    assert frame(rig, 8)[2] == (code & ~4) | (4 if user else 0)
    assert rig.u64(rig.state.vcpu_info + abi.VCPU_INFO_ARCH + abi.ARCH_VCPU_INFO_CR2) == 0xDEAD_B000


def test_flags_that_a_trap_clears(rig: Rig) -> None:
    """TF, NT, RF, VM and AC go; the frame has them all; DF and the arithmetic flags stay."""
    rig.regs.rflags = 0x202 | FLAG_TF | FLAG_NT | FLAG_RF | FLAG_AC | FLAG_DF | 0x8D5
    set_masked(rig, 0)
    handler(rig, x86.UD)
    rig.domain.traps.inject(x86.UD)
    assert frame(rig, 7)[4] == 0x202 | FLAG_TF | FLAG_NT | FLAG_RF | FLAG_AC | FLAG_DF | 0x8D5
    assert rig.regs.rflags == 0x202 | FLAG_DF | 0x8D5


@pytest.mark.parametrize(
    ("architectural", "iopl", "shown"), [(False, 3, 0), (True, 0, 0), (True, 1, 0x1000), (True, 3, 0x3000)]
)
def test_the_frames_iopl(rig: Rig, architectural: bool, iopl: int, shown: int) -> None:
    rig.domain.traps.architectural_iopl = architectural
    rig.state.iopl = iopl
    rig.regs.rflags = 0x202 | 0x3000
    handler(rig, x86.UD)
    rig.domain.traps.inject(x86.UD)
    assert frame(rig, 7)[4] & 0x3000 == shown


@pytest.mark.parametrize("vector", [x86.UD, x86.PF, x86.DF])
def test_a_trap_without_a_handler_ends_the_domain(rig: Rig, vector: int) -> None:
    with pytest.raises(GuestFault, match=rf"unhandled exception {vector} .*rip 0x56780010 \(vcpu 0, kernel mode\)"):
        rig.domain.traps.inject(vector, 0, cr2=5)


@pytest.mark.parametrize(
    ("stack", "why"),
    [
        (1 << 40, "not mapped"),
        (STACK * 4096, "the page below is read-only"),
        (0x10, "wraps around"),
        (0xFFFF_8000_0000_1000, "Xen's area"),
        (0x9000_0000_0000_0000, "not canonical"),
    ],
)
def test_a_trap_on_a_bad_stack_ends_the_domain(rig: Rig, stack: int, why: str) -> None:
    rig.tables.update_l1(ROOT_L1 * 512 + STACK - 1, rig.pte(2, RO | NX))
    rig.regs.gpr[RSP] = stack
    handler(rig, x86.UD)
    with pytest.raises(GuestFault, match="no stack at"):
        rig.domain.traps.inject(x86.UD)


def test_a_frame_may_cross_two_pages(rig: Rig) -> None:
    rig.regs.gpr[RSP] = KSTACK * 4096 + 0x20
    handler(rig, x86.UD)
    rig.domain.traps.inject(x86.UD)
    assert frame(rig, 7)[2] == RIP and rig.regs.gpr[RSP] == STACK * 4096 + 0xFE0 + 8


# vector, DPL of the guest's gate, in user mode, delivered?
SOFTWARE = [
    (0x21, 0, False, False), (0x21, 1, False, True), (0x21, 3, False, True),
    (0x21, 0, True, False), (0x21, 1, True, False), (0x21, 2, True, False), (0x21, 3, True, True),
    (x86.BP, 0, True, True), (x86.OF, 0, True, True), (0x80, 0, True, True), (x86.BP, 0, False, True),
    (x86.UD, 0, False, False), (x86.GP, 3, True, True), (x86.PF, 3, True, True),
]  # fmt: skip


@pytest.mark.parametrize(("vector", "dpl", "user", "delivered"), SOFTWARE)
def test_software_interrupts(rig: Rig, vector: int, dpl: int, user: bool, delivered: bool) -> None:
    """Delivered behind the instruction and without an error code, or #GP at it naming the gate."""
    if user:
        to_user(rig)
    handler(rig, vector, dpl)
    rig.state.trap_address[x86.GP] = rig.state.trap_address[x86.GP] or HANDLER + 0x100
    rig.domain.traps.software_interrupt(vector, 2)
    if delivered:
        assert frame(rig, 7)[2] == RIP and rig.regs.rip == HANDLER
        assert rig.u64(rig.state.vcpu_info + abi.VCPU_INFO_ARCH + abi.ARCH_VCPU_INFO_CR2) == 0
    else:
        assert frame(rig, 8)[2:4] == (vector << 3 | 2, RIP - 2) and rig.regs.rip == HANDLER + 0x100


def test_a_software_interrupt_without_a_handler(rig: Rig) -> None:
    handler(rig, x86.GP)
    rig.state.trap_flags[0x21] = 3
    rig.domain.traps.software_interrupt(0x21, 2)
    assert frame(rig, 8)[2:4] == (0x21 << 3 | 2, RIP - 2)
    with pytest.raises(GuestFault, match="unhandled exception 3"):
        rig.domain.traps.software_interrupt(x86.BP, 1)


@pytest.mark.parametrize("masks", [0, 1])
def test_a_system_call_from_user_mode(rig: Rig, masks: int) -> None:
    set_masked(rig, 0)
    to_user(rig)
    rig.state.syscall_callback, rig.state.syscall_masks = HANDLER, masks
    rig.regs.rflags = 0x246 | FLAG_DF
    rig.domain.traps.user_syscall()
    assert frame(rig, 7) == (RIP, 0x246 | FLAG_DF, RIP, abi.FLAT_USER_CS64, 0x246 | FLAG_DF, TOP, abi.FLAT_USER_SS64)
    assert rig.regs.rip == HANDLER and masked(rig) == masks
    assert not rig.regs.rflags & FLAG_DF


def test_a_system_call_from_32_bit_user_mode(rig: Rig) -> None:
    to_user(rig)
    rig.regs.long_mode_code = False
    rig.state.syscall_callback, rig.state.syscall32_callback = HANDLER, HANDLER + 0x40
    rig.domain.traps.user_syscall()
    assert rig.regs.rip == HANDLER + 0x40 and frame(rig, 7)[3] & 0xFFFF == abi.FLAT_USER_CS32


def test_a_system_call_that_the_kernel_does_not_take_is_invalid(rig: Rig) -> None:
    to_user(rig)
    handler(rig, x86.UD)
    rig.domain.traps.user_syscall()
    assert rig.regs.rip == HANDLER and frame(rig, 7)[2] == RIP - 2


EVENTS = [(0, 0, False), (1, 0, True), (0xFF, 0, True), (1, 1, False), (0, 1, False), (1, 0x80, False)]


@pytest.mark.parametrize(("pending", "mask", "called"), EVENTS)
def test_events(rig: Rig, pending: int, mask: int, called: bool) -> None:
    rig.state.event_callback = HANDLER
    set_masked(rig, mask, pending)
    vcpu = rig.domain.running
    vcpu.blocked, vcpu.poll = called, (1,) if called else None
    assert rig.domain.traps.event_pending(vcpu) is called
    assert rig.domain.traps.deliver_event() is called
    assert not vcpu.blocked and vcpu.poll is None
    if called:
        assert frame(rig, 7)[3] == CS64 & ~3 and rig.regs.rip == HANDLER and masked(rig) == 1
    else:
        assert rig.regs.rip == RIP and masked(rig) == mask


def do_iret(rig: Rig, *, cs: int, ss: int, flags: int = 0, rflags: int = 0x246, rip: int = HANDLER) -> None:
    """iret_context: rax, r11, rcx, flags, rip, cs, rflags, rsp, ss."""
    at = rig.put(TOP - 72, IRET.pack(0xAA, 0xB11, 0xCCC, flags, rip, cs, rflags, 0x7000, ss))
    rig.regs.gpr[RSP] = at
    rig.domain.traps.iret()


def test_iret_within_the_kernel(rig: Rig) -> None:
    set_masked(rig, 1)
    do_iret(rig, cs=CS64 & ~3, ss=SS64)
    regs = rig.regs
    assert (regs.rip, regs.cs, regs.ss, regs.rflags, regs.gpr[RSP]) == (HANDLER, CS64, SS64, 0x246, 0x7000)
    assert (regs.gpr[RAX], regs.gpr[RCX], regs.gpr[R11]) == (0xAA, 0xCCC, 0xB11)
    assert masked(rig) == 0 and rig.state.kernel_mode


def test_iret_to_user_mode_loads_the_users_segments(rig: Rig) -> None:
    do_iret(rig, cs=USER_CS, ss=USER_SS, rflags=0x46)
    assert not rig.state.kernel_mode
    assert rig.regs.cr3 == rig.mpa(USER) and rig.regs.gs_base == 0x2000
    assert (rig.regs.cs, rig.regs.ss) == (USER_CS, USER_SS)
    assert masked(rig) == 1 and rig.regs.rflags == 0x246, "IF is the mask; the real one stays set"


def test_iret_to_32_bit_user_code(rig: Rig) -> None:
    do_iret(rig, cs=0x3B, ss=USER_SS)
    assert rig.regs.cs == 0x3B and not rig.regs.long_mode_code


def test_iret_as_from_a_system_call(rig: Rig) -> None:
    """By sysret: RCX and R11 are RIP and RFLAGS, the selectors Xen's flat ones."""
    do_iret(rig, cs=USER_CS, ss=USER_SS, flags=abi.VGCF_in_syscall, rflags=0x46 | 0x3000)
    regs = rig.regs
    assert (regs.gpr[RAX], regs.gpr[RCX], regs.gpr[R11]) == (0xAA, HANDLER, 0x246)
    assert (regs.cs, regs.ss, regs.rip) == (CS64, SS64, HANDLER) and rig.engine.segments == []
    assert not rig.state.kernel_mode


@pytest.mark.parametrize(("architectural", "kept"), [(False, 1), (True, 3)])
def test_iret_and_iopl(rig: Rig, architectural: bool, kept: int) -> None:
    rig.domain.traps.architectural_iopl = architectural
    rig.state.iopl = 1
    do_iret(rig, cs=CS64, ss=SS64, rflags=0x3202 | x86.FLAG_VM)
    assert rig.regs.rflags == 0x202
    assert rig.state.iopl == kept


BAD_RETURNS = [
    (0, USER_SS, HANDLER, x86.GP, 0, "null CS"),
    (USER_SS, USER_SS, HANDLER, x86.GP, 0x28, "CS is data"),
    (0x1003, USER_SS, HANDLER, x86.GP, 0x1000, "CS is not in the GDT"),
    (0x7, USER_SS, HANDLER, x86.GP, 0x4, "CS is not in the LDT"),
    (0x4B, USER_SS, HANDLER, x86.NP, 0x48, "CS is not present"),
    (0x53, USER_SS, HANDLER, x86.GP, 0x50, "CS is a call gate"),
    (USER_CS, 0, HANDLER, x86.GP, 0, "null SS"),
    (USER_CS, USER_CS, HANDLER, x86.GP, 0x30, "SS is code"),
    (USER_CS, 0x43, HANDLER, x86.SSF, 0x40, "SS is not present"),
    (USER_CS, USER_SS, 0x9000_0000_0000_0000, x86.GP, 0, "RIP is not canonical"),
]


@pytest.mark.parametrize(("cs", "ss", "rip", "vector", "code", "why"), BAD_RETURNS, ids=[row[5] for row in BAD_RETURNS])
def test_iret_to_what_cannot_be_loaded_faults_there(
    rig: Rig, cs: int, ss: int, rip: int, vector: int, code: int, why: str
) -> None:
    """Xen's own iretq faults, and the guest gets that fault with the context it wanted to enter."""
    handler(rig, vector)
    do_iret(rig, cs=cs | 3, ss=ss, rip=rip)
    assert frame(rig, 8) == (0xCCC, 0xB11, code, rip, cs | 3, 0x246, 0x7000, ss | 3), why
    assert rig.regs.rip == HANDLER and rig.regs.gpr[RSP] == (KTOP & ~15) - 64
    assert rig.state.kernel_mode


def test_iret_without_user_tables_or_stack_ends_the_domain(rig: Rig) -> None:
    rig.domain.new_user_baseptr(0)
    with pytest.raises(GuestFault, match="without a user page table"):
        do_iret(rig, cs=USER_CS, ss=USER_SS)
    rig.regs.gpr[RSP] = 1 << 40
    with pytest.raises(GuestFault, match="unreadable stack"):
        rig.domain.traps.iret()
