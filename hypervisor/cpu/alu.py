"""Results and flags of x86 integer operations (AMD64 APM vol. 1, 3.1.4)."""

from __future__ import annotations

from hypervisor.engines.x86 import FLAG_AF, FLAG_CF, FLAG_OF, FLAG_PF, FLAG_SF, FLAG_ZF

FLAGS = FLAG_CF | FLAG_PF | FLAG_AF | FLAG_ZF | FLAG_SF | FLAG_OF


def compute(name: str, left: int, right: int, size: int, carry: int) -> tuple[int, int]:
    """(result, flags) of ``left name right`` on unsigned operands of `size` bytes.

    :param name: add, or, adc, sbb, and, sub, xor, cmp.
    :param carry: the carry flag before, used by adc and sbb.
    """
    bits = size * 8
    mask = (1 << bits) - 1
    sign = 1 << (bits - 1)
    flags = 0
    if name in ("and", "or", "xor"):
        result = left & right if name == "and" else left | right if name == "or" else left ^ right
    elif name in ("add", "adc"):
        total = left + right + (carry & 1 if name == "adc" else 0)
        result = total & mask
        flags |= FLAG_CF if total > mask else 0
        flags |= FLAG_OF if ~(left ^ right) & (left ^ result) & sign else 0
        flags |= (left ^ right ^ result) & FLAG_AF
    else:
        total = left - right - (carry & 1 if name == "sbb" else 0)
        result = total & mask
        flags |= FLAG_CF if total < 0 else 0
        flags |= FLAG_OF if (left ^ right) & (left ^ result) & sign else 0
        flags |= (left ^ right ^ result) & FLAG_AF
    flags |= FLAG_ZF if result == 0 else 0
    flags |= FLAG_SF if result & sign else 0
    flags |= FLAG_PF if (result & 0xFF).bit_count() % 2 == 0 else 0
    return result, flags
