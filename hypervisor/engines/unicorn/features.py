"""The engine's own feature words, found in its memory: what is cleared there is gone for the guest in every way.

CPUID is answered by the handler, but an instruction that a processor does not have must fault, too. That follows from
the feature words (QEMU's CPUX86State.features).
"""

from __future__ import annotations

import ctypes
import logging
import struct
from collections.abc import Callable, Mapping

from hypervisor.engines.unicorn.private import readable

LOG = logging.getLogger(__name__)

_AREA = 4096
"""The words lie behind what a reset clears, at most so many bytes on."""
_ECX, _EDX = 2, 3
# Index of the word in the library's order.
_INDEX = {(1, _EDX): 0, (1, _ECX): 1, (0x8000_0001, _EDX): 6, (0x8000_0001, _ECX): 7}

Cpuid = Callable[[int, int], tuple[int, int, int, int]]


def find(env: int, start: int, cpuid: Cpuid) -> int:
    """Address of the feature words behind `start` bytes of the processor's state, 0 when they are not found."""
    data = readable(env + start, _AREA)  # the heap may end before
    wanted = {index: cpuid(leaf, 0)[register] for (leaf, register), index in _INDEX.items()}
    for at in range(0, len(data) - 63, 8):
        words = struct.unpack_from("<8Q", data, at)
        if all(words[index] == value for index, value in wanted.items()):
            return env + start + at
    return 0


def hide(address: int, masks: Mapping[tuple[int, int], int]) -> bool:
    """Clear bits of the feature words. False, and nothing changed, when they are not where they should be.

    :param address: what `find` gave.
    :param masks: (leaf, register) → bits. Other leaves than 1 and 0x80000001 are left alone.
    """
    if not address:
        LOG.warning("the engine's feature words were not found: hidden instructions still work")
        return False
    for (leaf, register), bits in masks.items():
        index = _INDEX.get((leaf, register))
        if index is not None:
            word = ctypes.c_uint64.from_address(address + 8 * index)
            word.value &= ~bits
    return True
