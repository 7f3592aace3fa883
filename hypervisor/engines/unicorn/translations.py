"""What the library has translated, and translating ahead of need.

A guest that arrives from another host finds no translated code, and its first milliseconds would go into translating
the paths that it needs most. So the engine there tells which blocks it knows, and this one translates them before.

Blocks lie one after the other in the code buffer, each headed by the library's ``struct TranslationBlock``, which has
its own address in it at a fixed distance: so they are found without asking the library. If its layout were another,
none would be found. Nobody relies on the answer: addresses are hints.
"""

from __future__ import annotations

import array
import collections
import ctypes
from typing import Any

import numpy as np

from hypervisor.engines.unicorn.direct import DirectRegisters
from hypervisor.engines.unicorn.library import uc_const

_LINE = 64  # heads begin at multiples of it
_HEAD = 192  # bytes from a head to the code behind it
_PC, _FLAGS, _CFLAGS, _CODE = 0, 2, 3, 4  # 64-bit words of a head; FLAGS and CFLAGS are their low halves
_CF_INVALID = 1 << 18
_CHUNK = 1 << 20
_EFLAGS = 0x7_3100
"""Bits of a block's flags that are the guest's own: single steps and the like. Such blocks are left out."""
MAX_BLOCKS = 100_000

_READ_WRITE = 3  # UC_CTL_IO_READ_WRITE
_REQUEST = uc_const.UC_CTL_TB_REQUEST_CACHE | 2 << 26 | _READ_WRITE << 30


class _Block(ctypes.Structure):
    """``uc_tb``."""

    _fields_ = (("pc", ctypes.c_uint64), ("icount", ctypes.c_uint16), ("size", ctypes.c_uint16))


def known(area: tuple[int, int]) -> tuple[array.array[int], int]:
    """Guest addresses of blocks in the code buffer, oldest first, and the flags that they were translated under.

    Only blocks of the commonest flags are told. A guest may run meanwhile: what is torn is wrong, and no harm.

    :param area: start and end of the code buffer.
    """
    addresses: list[Any] = []
    flags: list[Any] = []
    for at in range(area[0], area[1] - _CHUNK, _CHUNK):
        words = np.ctypeslib.as_array((ctypes.c_uint64 * (_CHUNK // 8 + 4)).from_address(at))
        own = np.uint64(at + _HEAD) + np.arange(_CHUNK // _LINE, dtype=np.uint64) * np.uint64(_LINE)
        heads = np.flatnonzero(words[_CODE :: _LINE // 8][: len(own)] == own) * (_LINE // 8)
        if not len(heads):
            break  # what lies beyond was never used, and looking would make the kernel give it pages
        heads = heads[(words[heads + _CFLAGS] & np.uint64(_CF_INVALID)) == 0]
        addresses.append(words[heads + _PC])
        flags.append(words[heads + _FLAGS] & np.uint64(0xFFFF_FFFF))
    found = array.array("Q")
    if not addresses:
        return found, 0
    pcs, modes = np.concatenate(addresses), np.concatenate(flags)
    mode = collections.Counter(modes.tolist()).most_common(1)[0][0] if len(modes) else 0
    if not mode or mode & _EFLAGS:
        return found, 0
    found.frombytes(pcs[modes == mode][-MAX_BLOCKS:].tobytes())
    return found, mode


class Translations:
    """An `hypervisor.engines.base.Ahead`.

    :param area: the code buffer; None: it is not known where.
    :param call: the library's ``uc_ctl``. :param handle: address of the engine's uc_struct.
    """

    def __init__(self, area: tuple[int, int] | None, call: Any, handle: int, regs: DirectRegisters) -> None:
        self._area = area
        self._call = call
        self._engine = ctypes.c_void_p(handle)
        self._regs = regs
        self._block = _Block()

    def known(self) -> tuple[array.array[int], int]:
        return known(self._area) if self._area is not None else (array.array("Q"), 0)

    def begin(self, mode: int) -> None:
        self._regs.set_mode(mode)

    def translate(self, address: int) -> bool:
        where = ctypes.c_uint64(address)
        return not self._call(self._engine, ctypes.c_uint32(_REQUEST & 0xFFFF_FFFF), where, ctypes.byref(self._block))
