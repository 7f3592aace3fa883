"""The floating-point state of an engine as the processor stores it: the 512 bytes of FXSAVE64 (Intel SDM vol. 1, 10.5).

Through the public API, a register at a time: it is for domains that leave or come, not for switches between vCPUs.
"""

from __future__ import annotations

import struct
from typing import Any

from hypervisor.engines.unicorn.library import uc_x86

SIZE = 512
_HEAD = struct.Struct("<HHBxHQQII")  # FCW, FSW, abridged FTW, FOP, FIP, FDP, MXCSR, its mask
_ST_AT, _XMM_AT = 32, 160
MXCSR_MASK = 0xFFFF
_ST = struct.Struct("<QH")
_FP_IDS = [getattr(uc_x86, f"UC_X86_REG_FP{i}") for i in range(8)]
_XMM_IDS = [getattr(uc_x86, f"UC_X86_REG_XMM{i}") for i in range(16)]
_EMPTY = 3


class FloatingPoint:
    """A part of `hypervisor.engines.unicorn.engine.UnicornEngine`. Registers of the stack have physical numbers here,
    in the image they are counted from the top.
    """

    _uc: Any

    def save_fpu(self) -> bytes:
        read = self._uc.reg_read
        status, tags = read(uc_x86.UC_X86_REG_FPSW), read(uc_x86.UC_X86_REG_FPTAG)
        top = status >> 11 & 7
        valid = sum(1 << i for i in range(8) if tags >> 2 * i & 3 != _EMPTY)
        image = bytearray(SIZE)
        control, mxcsr = read(uc_x86.UC_X86_REG_FPCW), read(uc_x86.UC_X86_REG_MXCSR)
        _HEAD.pack_into(image, 0, control, status, valid, 0, 0, 0, mxcsr, MXCSR_MASK)
        for i in range(8):
            _ST.pack_into(image, _ST_AT + 16 * i, *read(_FP_IDS[(top + i) & 7]))
        for i, identifier in enumerate(_XMM_IDS):
            at = _XMM_AT + 16 * i
            image[at : at + 16] = read(identifier).to_bytes(16, "little")
        return bytes(image)

    def load_fpu(self, image: bytes) -> None:
        """:raises ValueError: not `SIZE` bytes. Reserved bits of MXCSR are left out."""
        if len(image) != SIZE:
            raise ValueError(f"floating-point state of {len(image)} bytes, not {SIZE}")
        control, status, valid, _, _, _, mxcsr, _ = _HEAD.unpack_from(image)
        write, top = self._uc.reg_write, status >> 11 & 7
        write(uc_x86.UC_X86_REG_FPCW, control)
        write(uc_x86.UC_X86_REG_FPSW, status)
        for i in range(8):
            write(_FP_IDS[(top + i) & 7], _ST.unpack_from(image, _ST_AT + 16 * i))
        write(uc_x86.UC_X86_REG_FPTAG, sum(_EMPTY << 2 * i for i in range(8) if not valid >> i & 1))
        write(uc_x86.UC_X86_REG_MXCSR, mxcsr & MXCSR_MASK)
        for i, identifier in enumerate(_XMM_IDS):
            at = _XMM_AT + 16 * i
            write(identifier, int.from_bytes(image[at : at + 16], "little"))
