"""Whether the library's cached address translations lie where its private layout says (see `private`).

``CPUTLB`` of the library: 32 bytes for all modes, for each of three modes of translation a ``CPUTLBDesc``, then for
each a mask and the table, entries of 64 bytes (include/exec/cpu-defs.h of the library).
"""

from __future__ import annotations

import struct
from collections.abc import Callable

_COMMON, _DESCRIPTION, _MODES, _FAST = 32, 696, 3, 16
_ENTRY_BITS = 6
_NONE = 0xFFFF_FFFF_FFFF_FFFF
_RING0 = 2  # the mode of ring 0 without SMAP
_SIZES = range(6, 21)


def why_not(read: Callable[[int, int], bytes], at: int, size: int, va: int, host: int) -> str:
    """What is wrong, or "".

    :param read: memory of this process. :param at: where the translations lie, `size` bytes.
    :param va: the page that ring 0 has just written, and `host`, where it is in this process.
    """
    words = struct.unpack(f"<{size // 8}Q", read(at, size))
    for mode in range(_MODES):
        if words[(_COMMON + _DESCRIPTION * mode) // 8] != _NONE:
            return f"large pages in the translations of mode {mode}"
    fast = words[len(words) - _MODES * _FAST // 8 :]
    for mode in range(_MODES):
        if not any(fast[2 * mode] == ((1 << bits) - 1) << _ENTRY_BITS for bits in _SIZES):
            return f"a mask of {fast[2 * mode]:#x} for the translations of mode {mode}"
    mask, table = fast[2 * _RING0 : 2 * _RING0 + 2]
    entry = read(table + (va >> 12 << _ENTRY_BITS & mask), 1 << _ENTRY_BITS)
    _, write, _, _, addend = struct.unpack_from("<5Q", entry)
    if write & ~0xFFF != va or (addend + va) & _NONE != host:
        return f"an entry for {write:#x}, not {va:#x}"
    return ""
