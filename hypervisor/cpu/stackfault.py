"""Which #GP of 64-bit code is #SS on a processor: an address by way of the stack that is not canonical.

The engine tells all such addresses as #GP. A processor raises #SS for those made with RSP or RBP, and for those of
push, pop, call and return (AMD64 Architecture Programmer's Manual vol. 2, 8.2.13). In 64-bit mode only FS and GS
change that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from hypervisor.cpu.decode import DecodeError, Operand, decode
from hypervisor.engines import x86

_PUSHES_AND_POPS = frozenset(
    (*range(0x50, 0x60), 0x68, 0x6A, 0x8F, 0x9C, 0x9D, 0xC2, 0xC3, 0xC8, 0xE8, 0x0FA0, 0x0FA1, 0x0FA8, 0x0FA9)
)
_LEAVE, _GROUP5, _GROUP5_CALL, _GROUP5_PUSH = 0xC9, 0xFF, 2, 6
_LONGER_OPCODES = (0x0F38, 0x0F3A)


def is_stack_fault(fetch: Callable[[int], int], gpr: Sequence[int]) -> bool:
    """Whether a #GP(0) of the instruction at offset 0 of `fetch` (the byte there, -1: unreadable) is #SS(0)."""
    try:
        instruction = decode(fetch, True)
    except DecodeError:
        return False
    opcode, extension, operand = instruction.opcode, instruction.reg & 7, instruction.operand
    if opcode == _LEAVE:
        return _outside(gpr[x86.RBP])
    if opcode in _PUSHES_AND_POPS or (opcode == _GROUP5 and extension in (_GROUP5_CALL, _GROUP5_PUSH)):
        rsp = gpr[x86.RSP]
        if _outside(rsp) or _outside(rsp - 8):
            return True
    if operand is None or operand.base not in (x86.RSP, x86.RBP) or not instruction.plain or opcode in _LONGER_OPCODES:
        return False
    address = _address(operand, gpr)
    return _outside(address) or _outside(address + instruction.size - 1)


def _address(operand: Operand, gpr: Sequence[int]) -> int:
    index = gpr[operand.index] << operand.scale if operand.index >= 0 else 0
    return gpr[operand.base] + index + operand.displacement


def _outside(address: int) -> bool:
    return not x86.is_canonical(address & x86.MASK64)
