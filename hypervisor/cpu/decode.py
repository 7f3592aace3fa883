"""Just enough x86 instruction decoding: prefixes, opcode, ModRM length, immediates.

A memory operand's address is rarely needed, as the fault that brought us here
tells one; `Operand` has its parts. Source: AMD64 Architecture Programmer's Manual vol. 3, chapter 1.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

MAX_LENGTH = 15

_PREFIXES = frozenset((0x66, 0x67, 0xF0, 0xF2, 0xF3, 0x2E, 0x36, 0x3E, 0x26, 0x64, 0x65))

# Opcodes without a ModRM byte that this package emulates, with the size of their immediate.
_NO_MODRM = {
    0xAA: 0, 0xAB: 0, 0xA4: 0, 0xA5: 0, 0xF4: 0, 0xFA: 0, 0xFB: 0, 0xEC: 0, 0xED: 0, 0xEE: 0, 0xEF: 0,
    0xE4: 1, 0xE5: 1, 0xE6: 1, 0xE7: 1,
    0x6C: 0, 0x6D: 0, 0x6E: 0, 0x6F: 0,
    0x0F06: 0, 0x0F08: 0, 0x0F09: 0, 0x0F30: 0, 0x0F32: 0, 0x0FA2: 0, 0x0F33: 0, 0x0F31: 0,
}  # fmt: skip


class DecodeError(Exception):
    """Not an instruction this decoder knows, or not enough bytes."""


@dataclasses.dataclass(frozen=True, slots=True)
class Operand:
    """A memory operand: ``base + (index << scale) + displacement``.

    :ivar base: register number, -1 for none, `RIP` for the address behind the instruction; `index`: or -1.
    :ivar displacement: sign-extended.
    """

    base: int
    index: int
    scale: int
    displacement: int


RIP = 16


@dataclasses.dataclass(frozen=True, slots=True)
class Instruction:
    """A decoded instruction.

    :ivar opcode: 0xNN or 0x0FNN.
    :ivar size: operand size in bytes: 1, 2, 4 or 8 (byte forms are the opcode's business).
    :ivar reg: ModRM.reg with REX.R, :ivar rm: ModRM.rm with REX.B, :ivar mod: 0..3 (-1: no ModRM).
    :ivar immediate: sign-extended.
    :ivar length: bytes.
    :ivar operand: None without one in memory.
    :ivar plain: no prefix changes how the operand's address is made (FS, GS, 32-bit addresses).
    """

    opcode: int
    size: int
    mod: int
    reg: int
    rm: int
    immediate: int
    length: int
    rex: int
    repeat: bool
    lock: bool
    operand: Operand | None = None
    plain: bool = True


def decode(fetch: Callable[[int], int], long_mode: bool) -> Instruction:
    """Decode at offset 0 of `fetch` (byte at an offset, -1: unreadable). :raises DecodeError:"""

    def byte(at: int) -> int:
        value = fetch(at) if at < MAX_LENGTH else -1
        if value < 0:
            raise DecodeError("no more bytes")
        return value

    at = rex = 0
    operand16 = repeat = lock = False
    address_size = 8 if long_mode else 4
    plain = True
    while (value := byte(at)) in _PREFIXES:
        operand16 |= value == 0x66
        repeat |= value in (0xF2, 0xF3)
        lock |= value == 0xF0
        if value == 0x67:
            address_size = 4 if long_mode else 2
        plain &= value not in (0x64, 0x65, 0x67)
        at += 1
    if long_mode and value & 0xF0 == 0x40:
        rex = value
        at += 1
        value = byte(at)
    at += 1
    opcode = value
    if value == 0x0F:
        opcode = 0x0F00 | byte(at)
        at += 1
    size = 8 if rex & 8 else 2 if operand16 else 4
    if opcode in (0xA2, 0xA3):  # mov to an absolute address
        where = Operand(-1, -1, 0, int.from_bytes(bytes(byte(at + i) for i in range(address_size)), "little"))
        return Instruction(opcode, size, -1, 0, 0, 0, at + address_size, rex, repeat, lock, where, plain)
    if opcode in _NO_MODRM:
        count = _NO_MODRM[opcode]
        immediate = byte(at) if count else 0
        return Instruction(opcode, size, -1, 0, 0, immediate, at + count, rex, repeat, lock)
    modrm = byte(at)
    at += 1
    mod, rm = modrm >> 6, modrm & 7
    reg = (modrm >> 3) & 7 | (8 if rex & 4 else 0)
    operand = None
    if mod != 3:
        operand, at = _operand(byte, at, mod, rm, rex)
    immediate, count = _immediate(byte, at, opcode, size, reg & 7)
    rm |= 8 if rex & 1 else 0
    length = at + count
    return Instruction(opcode, size, mod, reg, rm, immediate, length, rex, repeat, lock, operand, plain)


def _operand(byte: Callable[[int], int], at: int, mod: int, rm: int, rex: int) -> tuple[Operand, int]:
    """The operand, and the offset behind SIB and displacement."""
    base, index, scale = rm | (8 if rex & 1 else 0), -1, 0
    size = (0, 1, 4)[mod]
    if rm == 4:
        sib = byte(at)
        at += 1
        base, index, scale = sib & 7, sib >> 3 & 7 | (8 if rex & 2 else 0), sib >> 6
        if index == 4:
            index = -1
        if mod == 0 and base == 5:
            base, size = -1, 4
        elif rex & 1:
            base |= 8
    elif mod == 0 and rm == 5:
        base, size = RIP, 4
    displacement = int.from_bytes(bytes(byte(at + i) for i in range(size)), "little", signed=True) if size else 0
    return Operand(base, index, scale, displacement), at + size


def _immediate(byte: Callable[[int], int], at: int, opcode: int, size: int, extension: int) -> tuple[int, int]:
    if opcode in (0x80, 0x83, 0xC6, 0x0FBA) or (opcode == 0xF6 and extension < 2):
        count = 1
    elif opcode in (0x81, 0xC7) or (opcode == 0xF7 and extension < 2):
        count = min(size, 4)
    else:
        return 0, 0
    value = int.from_bytes(bytes(byte(at + i) for i in range(count)), "little", signed=True)
    return value, count
