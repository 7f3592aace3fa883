"""The decoder: machine code as bytes, its disassembly beside it."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hypervisor.cpu.decode import MAX_LENGTH, RIP, DecodeError, Instruction, decode


def run(code: bytes, long_mode: bool = True) -> Instruction:
    return decode(lambda at: code[at] if at < len(code) else -1, long_mode)


# machine code, disassembly, opcode, size, mod, reg, rm, immediate
CASES = [
    ("8907", "mov [rdi], eax", 0x89, 4, 0, 0, 7, 0),
    ("488907", "mov [rdi], rax", 0x89, 8, 0, 0, 7, 0),
    ("668907", "mov [rdi], ax", 0x89, 2, 0, 0, 7, 0),
    ("8807", "mov [rdi], al", 0x88, 4, 0, 0, 7, 0),
    ("4d89af00010000", "mov [r15+0x100], r13", 0x89, 8, 2, 13, 15, 0),
    ("48894708", "mov [rdi+8], rax", 0x89, 8, 1, 0, 7, 0),
    ("4889442408", "mov [rsp+8], rax", 0x89, 8, 1, 0, 4, 0),
    ("48890425785634 12".replace(" ", ""), "mov [0x12345678], rax", 0x89, 8, 0, 0, 4, 0),
    ("48890578563412", "mov [rip+0x12345678], rax", 0x89, 8, 0, 0, 5, 0),
    ("4a8904e500000000", "mov [r12*8], rax", 0x89, 8, 0, 0, 4, 0),
    ("48c70778563492", "mov qword [rdi], -0x6dcba988", 0xC7, 8, 0, 0, 7, 0x92345678 - (1 << 32)),
    ("c70778563412", "mov dword [rdi], 0x12345678", 0xC7, 4, 0, 0, 7, 0x12345678),
    ("66c7073412", "mov word [rdi], 0x1234", 0xC7, 2, 0, 0, 7, 0x1234),
    ("c607ff", "mov byte [rdi], 0xff", 0xC6, 4, 0, 0, 7, -1),
    ("488707", "xchg [rdi], rax", 0x87, 8, 0, 0, 7, 0),
    ("f0480fb10f", "lock cmpxchg [rdi], rcx", 0x0FB1, 8, 0, 1, 7, 0),
    ("f00fc70f", "lock cmpxchg8b [rdi]", 0x0FC7, 4, 0, 1, 7, 0),
    ("f0480fc70f", "lock cmpxchg16b [rdi]", 0x0FC7, 8, 0, 1, 7, 0),
    ("f0480fc10f", "lock xadd [rdi], rcx", 0x0FC1, 8, 0, 1, 7, 0),
    ("f0480fba3701", "lock btr qword [rdi], 1", 0x0FBA, 8, 0, 6, 7, 1),
    ("f0480fb30f", "lock btr [rdi], rcx", 0x0FB3, 8, 0, 1, 7, 0),
    ("f0488327fd", "lock and qword [rdi], -3", 0x83, 8, 0, 4, 7, -3),
    ("f048810f00020000", "lock or qword [rdi], 0x200", 0x81, 8, 0, 1, 7, 0x200),
    ("66810f0002", "or word [rdi], 0x200", 0x81, 2, 0, 1, 7, 0x200),
    ("800f02", "or byte [rdi], 2", 0x80, 4, 0, 1, 7, 2),
    ("48f71f", "neg qword [rdi]", 0xF7, 8, 0, 3, 7, 0),
    ("48f70778563412", "test qword [rdi], 0x12345678", 0xF7, 8, 0, 0, 7, 0x12345678),
    ("f60701", "test byte [rdi], 1", 0xF6, 4, 0, 0, 7, 1),
    ("48ff07", "inc qword [rdi]", 0xFF, 8, 0, 0, 7, 0),
    ("f348ab", "rep stosq", 0xAB, 8, -1, 0, 0, 0),
    ("aa", "stosb", 0xAA, 4, -1, 0, 0, 0),
    ("0f20d8", "mov rax, cr3", 0x0F20, 4, 3, 3, 0, 0),
    ("410f22d8", "mov cr3, r8", 0x0F22, 4, 3, 3, 8, 0),
    ("0f06", "clts", 0x0F06, 4, -1, 0, 0, 0),
    ("0fa2", "cpuid", 0x0FA2, 4, -1, 0, 0, 0),
    ("0f32", "rdmsr", 0x0F32, 4, -1, 0, 0, 0),
    ("e480", "in al, 0x80", 0xE4, 4, -1, 0, 0, 0x80),
    ("66ed", "in ax, dx", 0xED, 2, -1, 0, 0, 0),
    ("fa", "cli", 0xFA, 4, -1, 0, 0, 0),
    ("65488907", "mov gs:[rdi], rax", 0x89, 8, 0, 0, 7, 0),
]


@pytest.mark.parametrize(
    ("code", "text", "opcode", "size", "mod", "reg", "rm", "immediate"), CASES, ids=[c[1] for c in CASES]
)
def test_decode(code: str, text: str, opcode: int, size: int, mod: int, reg: int, rm: int, immediate: int) -> None:
    raw = bytes.fromhex(code)
    got = run(raw + b"\xcc" * 15)
    assert (got.opcode, got.size, got.mod, got.reg, got.rm, got.immediate) == (opcode, size, mod, reg, rm, immediate), (
        text
    )
    assert got.length == len(raw)
    assert got.lock == (raw[0] == 0xF0) and got.repeat == (raw[0] == 0xF3)


OPERANDS = [
    ("488907", "[rdi]", (7, -1, 0, 0)),
    ("49894710", "[r15+0x10]", (15, -1, 0, 0x10)),
    ("488987f0ffffff", "[rdi-0x10], long", (7, -1, 0, -0x10)),
    ("488947f0", "[rdi-0x10]", (7, -1, 0, -0x10)),
    ("48890424", "[rsp]", (4, -1, 0, 0)),
    ("4889442408", "[rsp+8]", (4, -1, 0, 8)),
    ("488904d7", "[rdi+rdx*8]", (7, 2, 3, 0)),
    ("4a8904e500100000", "[r12*8+0x1000]", (-1, 12, 3, 0x1000)),
    ("4889042500100000", "[0x1000]", (-1, -1, 0, 0x1000)),
    ("4a8904ef", "[rdi+r13*8]", (7, 13, 3, 0)),
    ("498904d4", "[r12+rdx*8]", (12, 2, 3, 0)),
    ("4989450 0".replace(" ", ""), "[r13+0]", (13, -1, 0, 0)),
    ("48890510000000", "[rip+0x10]", (RIP, -1, 0, 0x10)),
]


@pytest.mark.parametrize(("code", "text", "parts"), OPERANDS, ids=[row[1] for row in OPERANDS])
def test_memory_operands(code: str, text: str, parts: tuple[int, int, int, int]) -> None:
    got = run(bytes.fromhex(code))
    assert got.operand is not None and dataclasses.astuple(got.operand) == parts, text
    assert got.length == len(code) // 2 and got.plain


def test_what_changes_an_operands_address_is_told() -> None:
    assert [run(bytes.fromhex(c)).plain for c in ("65488907", "64488907", "67488907", "3e488907")] == [
        False,
        False,
        False,
        True,
    ]
    assert run(bytes.fromhex("4889c7")).operand is None


def test_without_long_mode_a_rex_byte_is_an_instruction() -> None:
    assert run(bytes.fromhex("8907"), long_mode=False).length == 2
    assert run(bytes.fromhex("488907cccccccccc"), long_mode=False).opcode == 0x48


@pytest.mark.parametrize("code", ["", "0f", "f0", "4889", "c707785634", "f0" * 15 + "8907", "488904"])
def test_not_enough_bytes(code: str) -> None:
    with pytest.raises(DecodeError):
        run(bytes.fromhex(code))


@given(st.binary(max_size=20), st.booleans())
def test_any_bytes_decode_or_are_refused(code: bytes, long_mode: bool) -> None:
    """No other exception, no byte asked for beyond the longest instruction."""
    asked: list[int] = []

    def fetch(at: int) -> int:
        asked.append(at)
        return code[at] if at < len(code) else -1

    try:
        got = decode(fetch, long_mode)
    except DecodeError:
        return
    finally:
        assert max(asked, default=0) < MAX_LENGTH
    assert got.length >= 1
