"""Direct writes to page tables, instruction by instruction: what they store, what they leave in registers and flags."""

from __future__ import annotations

import dataclasses

import pytest
from pv_rig import BASE, FIRST_FREE, NX, RO, ROOT, ROOT_L1, ROOT_L2, RW, Rig

from hypervisor.engines import x86
from hypervisor.engines.x86 import FLAG_CF, FLAG_DF, FLAG_ZF, RAX, RBX, RCX, RDI, RDX

A, B, CODE = FIRST_FREE, FIRST_FREE + 1, FIRST_FREE + 2
SLOT = 100
TARGET = ROOT_L1 * 4096 + SLOT * 8  # its address in the guest: read-only, as all page tables
MINE, OTHER = (BASE + A) << 12 | RW, (BASE + B) << 12 | RW
READ_ONLY = MINE & ~x86.PTE_RW
START = 0x5555_0000_0000_0000


@pytest.fixture
def rig() -> Rig:
    made = Rig().boot()
    made.tables.update(ROOT_L1, SLOT, MINE)
    made.regs.rip = CODE * 4096 + 0x10
    made.regs.gpr[RDI] = TARGET
    return made


def execute(rig: Rig, code: str, va: int = TARGET) -> bool:
    raw = bytes.fromhex(code)
    rig.put(rig.regs.rip, raw + b"\xcc" * 15)
    before = rig.regs.rip
    handled = rig.domain.table_writes.emulate(va)
    assert rig.regs.rip == before + (len(raw) if handled else 0)
    return handled


@dataclasses.dataclass(frozen=True)
class Row:
    code: str
    text: str
    registers: dict[int, int]
    stored: int
    after: dict[int, int] = dataclasses.field(default_factory=dict)
    flags: int | None = None  # CF and ZF afterwards, None: as before
    at: int = 0  # offset in the entry


HIGH = MINE & ~0xFFFF_FFFF
ROWS = [
    Row("488907", "mov [rdi], rax", {RAX: OTHER}, OTHER),
    Row("48c70700000000", "mov qword [rdi], 0", {}, 0),
    Row("8907", "mov [rdi], eax", {RAX: START | 0}, HIGH),
    Row("c70700000000", "mov dword [rdi], 0", {}, HIGH),
    Row("668907", "mov [rdi], ax", {RAX: RO}, MINE & ~0xFFFF | RO),
    Row("8807", "mov [rdi], al", {RAX: 0x25}, READ_ONLY),
    Row("8827", "mov [rdi], ah", {RAX: 0x2500}, READ_ONLY),
    Row("408837", "mov [rdi], sil", {6: 0x25}, READ_ONLY),
    Row("c60725", "mov byte [rdi], 0x25", {}, READ_ONLY),
    Row("8807", "mov [rdi+1], al: software bits", {RAX: MINE >> 8 & 0xF0 | 0x0E}, MINE | 0xE00, at=1),
    Row("488707", "xchg [rdi], rax", {RAX: OTHER}, OTHER, {RAX: MINE}),
    Row("8707", "xchg [rdi], eax", {RAX: START}, HIGH, {RAX: MINE & 0xFFFF_FFFF}),
    Row("8607", "xchg [rdi], al", {RAX: START | 0x25}, READ_ONLY, {RAX: START | 0x27}),
    Row("8627", "xchg [rdi], ah", {RAX: 0x2500}, READ_ONLY, {RAX: 0x2700}),
    Row("f0480fb10f", "lock cmpxchg [rdi], rcx: equal", {RAX: MINE, RCX: OTHER}, OTHER, {RAX: MINE}, FLAG_ZF),
    Row("f0480fb10f", "lock cmpxchg [rdi], rcx: differs", {RAX: 5, RCX: OTHER}, MINE, {RAX: MINE}, FLAG_CF),
    Row("f00fb10f", "lock cmpxchg [rdi], ecx: equal", {RAX: MINE & 0xFFFF_FFFF, RCX: 0}, HIGH, {}, FLAG_ZF),
    Row("f00fb00f", "lock cmpxchg [rdi], cl: equal", {RAX: 0x27, RCX: 0x25}, READ_ONLY, {}, FLAG_ZF),
    Row("f0480fc10f", "lock xadd [rdi], rcx", {RCX: 1 << 12}, OTHER, {RCX: MINE}, 0),
    Row("f0480fba3701", "lock btr qword [rdi], 1", {}, READ_ONLY, flags=FLAG_CF),
    Row("f0480fba2f09", "lock bts qword [rdi], 9", {}, MINE | 0x200, flags=0),
    Row("f0480fba3f09", "lock btc qword [rdi], 9", {}, MINE | 0x200, flags=0),
    Row("f0480fb30f", "lock btr [rdi], rcx", {RCX: 1}, READ_ONLY, flags=FLAG_CF),
    Row("f0480fab0f", "lock bts [rdi], rcx", {RCX: 63}, MINE | NX, flags=0),
    Row("f0488327fd", "lock and qword [rdi], ~2", {}, READ_ONLY, flags=0),
    Row("f048210f", "lock and [rdi], rcx", {RCX: ~2 & (1 << 64) - 1}, READ_ONLY, flags=0),
    Row("802f02", "sub byte [rdi], 2", {}, READ_ONLY, flags=0),
    Row("f048810f00020000", "lock or qword [rdi], 0x200", {}, MINE | 0x200, flags=0),
    Row("48090f", "or [rdi], rcx", {RCX: 0xC00}, MINE | 0xC00, flags=0),
    Row("80270f", "and byte [rdi], 0xf", {}, MINE & ~0xF0, flags=0),
    Row("48310f", "xor [rdi], rcx", {RCX: 2}, READ_ONLY, flags=0),
    Row("4881070010 0000".replace(" ", ""), "add qword [rdi], 0x1000", {}, OTHER, flags=0),
    Row("48832f02", "sub qword [rdi], 2", {}, READ_ONLY, flags=0),
    Row("fe0f", "dec byte [rdi]: 0x27 becomes 0x26, not present", {}, MINE - 1, flags=0),
    Row("48f717", "not qword [rdi]: not present", {}, ~MINE & (1 << 64) - 1),
    Row("48ab", "stosq", {RAX: OTHER}, OTHER, {RDI: TARGET + 8}),
    Row("f348ab", "rep stosq, the last one", {RAX: OTHER, RCX: 1}, OTHER, {RDI: TARGET + 8, RCX: 0}),
    Row("f00fc70f", "lock cmpxchg8b [rdi]: equal",
        {RAX: MINE & 0xFFFF_FFFF, RDX: MINE >> 32, RBX: OTHER & 0xFFFF_FFFF, RCX: OTHER >> 32}, OTHER, {}, FLAG_ZF),
    Row("f00fc70f", "lock cmpxchg8b [rdi]: differs", {RAX: 1, RDX: 2, RBX: 3, RCX: 4}, MINE,
        {RAX: MINE & 0xFFFF_FFFF, RDX: MINE >> 32}, 0),
    Row("f0480fc70f", "lock cmpxchg16b [rdi]: equal", {RAX: MINE, RDX: 0, RBX: OTHER, RCX: 0}, OTHER, {}, FLAG_ZF),
    Row("f0480fc70f", "lock cmpxchg16b [rdi]: differs", {RAX: 1, RDX: 0, RBX: OTHER, RCX: 0}, MINE,
        {RAX: MINE, RDX: 0}, 0),
]  # fmt: skip


@pytest.mark.parametrize("row", ROWS, ids=[row.text for row in ROWS])
def test_writes(rig: Rig, row: Row) -> None:
    rig.regs.gpr[RDI] += row.at
    for register, value in row.registers.items():
        rig.regs.gpr[register] = value
    rig.regs.rflags = 0x202
    untouched = list(rig.regs.gpr)
    assert execute(rig, row.code, TARGET + row.at)
    assert rig.word(ROOT_L1, SLOT) == row.stored
    for register, value in row.after.items():
        assert rig.regs.gpr[register] == value, register
        untouched[register] = value
    assert list(rig.regs.gpr) == untouched
    if row.flags is None:
        assert rig.regs.rflags == 0x202
    else:
        assert rig.regs.rflags & (FLAG_CF | FLAG_ZF) == row.flags
    rig.check()


def test_a_repeated_store_does_one_element_and_comes_back(rig: Rig) -> None:
    rig.regs.gpr[RCX], rig.regs.gpr[RAX] = 3, 0
    rig.put(rig.regs.rip, bytes.fromhex("f348ab"))
    before = rig.regs.rip
    for left in (2, 1):
        assert rig.domain.table_writes.emulate(rig.regs.gpr[RDI])
        assert (rig.regs.gpr[RCX], rig.regs.rip) == (left, before)
    assert rig.domain.table_writes.emulate(rig.regs.gpr[RDI])
    assert (rig.regs.gpr[RCX], rig.regs.rip) == (0, before + 3)
    assert rig.regs.gpr[RDI] == TARGET + 24
    rig.regs.gpr[RCX], rig.regs.rflags, rig.regs.rip = 2, 0x202 | FLAG_DF, before
    rig.regs.gpr[RDI] = TARGET + 8
    assert rig.domain.table_writes.emulate(TARGET + 8)
    assert rig.regs.gpr[RDI] == TARGET


REFUSED = [
    ("488907", "a foreign frame", {RAX: (BASE - 1) << 12 | RW}),
    ("488907", "a writable mapping of a page table", {RAX: (BASE + ROOT) << 12 | RW}),
    ("488907", "cache attributes", {RAX: MINE | x86.PTE_PCD}),
    ("488707", "xchg with a foreign frame", {RAX: (BASE - 1) << 12 | RW}),
    ("f0480fb10f", "cmpxchg with a foreign frame", {RAX: MINE, RCX: (BASE - 1) << 12 | RW}),
    ("f0480fc10f", "xadd to a frame behind", {RCX: 1 << 30}),
    ("48830f10", "or of a cache attribute", {}),
    ("f0480fc70f", "cmpxchg16b, its second half", {RAX: MINE, RBX: OTHER, RCX: (BASE - 1) << 12 | RW}),
    ("f00fc70f", "cmpxchg8b", {RAX: MINE & 0xFFFF_FFFF, RDX: MINE >> 32, RBX: RW, RCX: 0}),
    ("48d127", "shl: not an instruction that is emulated", {}),
    ("660f1107", "movupd [rdi], xmm0", {}),
    ("4889c7", "no memory operand", {}),
    ("f30f", "an instruction that cannot be read", {}),
]


@pytest.mark.parametrize(("code", "text", "registers"), REFUSED, ids=[row[1] for row in REFUSED])
def test_what_is_refused_changes_nothing(rig: Rig, code: str, text: str, registers: dict[int, int]) -> None:
    """The guest gets its page fault, with registers, flags, table and counts as they were."""
    for register, value in registers.items():
        rig.regs.gpr[register] = value
    before, gpr = rig.snapshot(), list(rig.regs.gpr)
    assert not execute(rig, code), text
    assert rig.word(ROOT_L1, SLOT) == MINE and rig.word(ROOT_L1, SLOT + 1) == 0
    assert rig.snapshot() == before
    assert list(rig.regs.gpr) == gpr and rig.regs.rflags == 0x202
    rig.check()


@pytest.mark.parametrize(
    ("va", "why"),
    [
        (TARGET + 4, "across two entries"),
        (TARGET + 1, "unaligned, within one"),
        (ROOT_L2 * 4096, "an L2"),
        (ROOT * 4096, "an L4"),
        (A * 4096, "no page table at all"),
        (1 << 40, "not mapped"),
    ],
)
def test_other_addresses_are_not_ours(rig: Rig, va: int, why: str) -> None:
    rig.regs.gpr[RDI] = va
    assert not execute(rig, "488907", va), why
    assert rig.word(ROOT_L1, SLOT) == MINE


def test_a_store_that_began_on_the_page_before_is_not_ours(rig: Rig) -> None:
    """mov [rdi], rax from four bytes before the table: the fault names the table's first byte."""
    rig.regs.gpr[RDI] = ROOT_L1 * 4096 - 4
    first = rig.word(ROOT_L1, 0)
    assert not execute(rig, "488907", ROOT_L1 * 4096)
    assert rig.word(ROOT_L1, 0) == first


FIRST = ROOT_L1 * 4096
AT_THE_START = [
    ("488907", "mov [rdi], rax", {RDI: FIRST}),
    ("488904d7", "mov [rdi+rdx*8], rax", {RDI: FIRST - 16, RDX: 2}),
    ("48894708", "mov [rdi+8], rax", {RDI: FIRST - 8}),
    ("48890425", "mov [disp32], rax", {}),
    ("488905", "mov [rip+disp32], rax", {}),
    ("48ab", "stosq", {RDI: FIRST}),
]


@pytest.mark.parametrize(("code", "text", "registers"), AT_THE_START, ids=[row[1] for row in AT_THE_START])
def test_a_store_to_the_first_entry_is_told_apart_from_that(
    rig: Rig, code: str, text: str, registers: dict[int, int]
) -> None:
    value = rig.word(ROOT_L1, 0) | 0x200
    rig.regs.gpr[RAX] = value
    for register, content in registers.items():
        rig.regs.gpr[register] = content
    if "disp32" in text:
        code += (FIRST - (rig.regs.rip + 7 if "rip" in text else 0)).to_bytes(4, "little", signed=True).hex()
    assert execute(rig, code, FIRST), text
    assert rig.word(ROOT_L1, 0) == value


def test_code_that_cannot_be_read_is_not_emulated(rig: Rig) -> None:
    rig.regs.rip = 1 << 40
    assert not rig.domain.table_writes.emulate(TARGET)
