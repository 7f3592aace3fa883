"""The ALU against the processor's own definition, and against a few results from a real one."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hypervisor.cpu import alu
from hypervisor.engines.x86 import FLAG_AF, FLAG_CF, FLAG_OF, FLAG_PF, FLAG_SF, FLAG_ZF

SIZES = st.sampled_from([1, 2, 4, 8])
WORDS = st.one_of(st.integers(0, (1 << 64) - 1), st.sampled_from([0, 1, 0x7F, 0x80, 0xFF, 1 << 63, (1 << 64) - 1]))


def signed(value: int, bits: int) -> int:
    return value - (1 << bits) if value >> (bits - 1) else value


@given(
    name=st.sampled_from(["add", "adc", "sub", "sbb", "cmp"]), left=WORDS, right=WORDS, size=SIZES, carry=st.booleans()
)
def test_arithmetic(name: str, left: int, right: int, size: int, carry: bool) -> None:
    """By exact integers: unsigned range gives CF, signed range gives OF, the low nibble gives AF."""
    bits = size * 8
    mask = (1 << bits) - 1
    left, right = left & mask, right & mask
    sign = 1 if name in ("add", "adc") else -1
    extra = int(carry) if name in ("adc", "sbb") else 0
    exact = left + sign * (right + extra)
    exact_signed = signed(left, bits) + sign * (signed(right, bits) + extra)
    nibble = (left & 15) + sign * ((right & 15) + extra)
    result, flags = alu.compute(name, left, right, size, int(carry))
    assert result == exact & mask
    assert bool(flags & FLAG_CF) == (not 0 <= exact <= mask)
    assert bool(flags & FLAG_OF) == (not -(1 << bits - 1) <= exact_signed < 1 << bits - 1)
    assert bool(flags & FLAG_AF) == (not 0 <= nibble <= 15)
    check_result_flags(result, flags, bits)


@given(name=st.sampled_from(["and", "or", "xor"]), left=WORDS, right=WORDS, size=SIZES, carry=st.booleans())
def test_logic(name: str, left: int, right: int, size: int, carry: bool) -> None:
    bits = size * 8
    left, right = left & (1 << bits) - 1, right & (1 << bits) - 1
    result, flags = alu.compute(name, left, right, size, int(carry))
    assert result == {"and": left & right, "or": left | right, "xor": left ^ right}[name]
    assert not flags & (FLAG_CF | FLAG_OF | FLAG_AF)
    check_result_flags(result, flags, bits)


def check_result_flags(result: int, flags: int, bits: int) -> None:
    assert bool(flags & FLAG_ZF) == (result == 0)
    assert bool(flags & FLAG_SF) == bool(result >> (bits - 1))
    assert bool(flags & FLAG_PF) == (bin(result & 0xFF).count("1") % 2 == 0)
    assert flags & ~alu.FLAGS == 0


@pytest.mark.parametrize(
    ("name", "left", "right", "size", "carry", "result", "flags"),
    [
        ("add", 0x7F, 1, 1, 0, 0x80, FLAG_OF | FLAG_SF | FLAG_AF),
        ("add", 0xFF, 1, 1, 0, 0, FLAG_CF | FLAG_ZF | FLAG_PF | FLAG_AF),
        ("adc", 0xFFFF, 0xFFFF, 2, 1, 0xFFFF, FLAG_CF | FLAG_SF | FLAG_PF | FLAG_AF),
        ("sub", 0x80, 1, 1, 0, 0x7F, FLAG_OF | FLAG_AF),
        ("sbb", 0, 0xFFFF_FFFF, 4, 1, 0, FLAG_CF | FLAG_ZF | FLAG_PF | FLAG_AF),
        ("cmp", 3, 5, 8, 0, (1 << 64) - 2, FLAG_CF | FLAG_SF | FLAG_AF),
    ],
)
def test_known_results(name: str, left: int, right: int, size: int, carry: int, result: int, flags: int) -> None:
    assert alu.compute(name, left, right, size, carry) == (result, flags)
