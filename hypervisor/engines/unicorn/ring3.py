"""How an engine gets to ring 3, where PV guests live."""

from __future__ import annotations

import struct
from typing import Any

from hypervisor.engines.base import EngineError
from hypervisor.engines.unicorn.library import uc_x86

_TRAMPOLINE = 0x2_0000  # machine frames below layout.FIRST_MFN belong to nobody
_FLAT_CS, _FLAT_SS = 0xE033, 0xE02B  # Xen's flat ring-3 selectors (public/arch-x86/xen-x86_64.h)


def enter_ring3(uc: Any) -> None:
    """Run one `iretq` without paging from a page of our own: the public way to change the privilege level.

    :raises EngineError: it does not work with this build of the library.
    """
    uc.mem_map(_TRAMPOLINE, 0x1000)
    # The GDT lies so that the selectors which the guest will have anyway name these two descriptors.
    descriptors = struct.pack("<2Q", 0x00CF_F300_0000_FFFF, 0x00AF_FB00_0000_FFFF)
    gdt_base = _TRAMPOLINE + 0x100 - (_FLAT_SS & ~7)
    target = _TRAMPOLINE + 0x20
    frame = struct.pack("<5Q", target, _FLAT_CS, 0x202, _TRAMPOLINE + 0x800, _FLAT_SS)
    uc.mem_write(_TRAMPOLINE, b"\x48\xcf".ljust(0x20, b"\x90") + b"\x90" * 16)
    uc.mem_write(_TRAMPOLINE + 0x100, descriptors)
    uc.mem_write(_TRAMPOLINE + 0x200, frame)
    uc.reg_write(uc_x86.UC_X86_REG_GDTR, (0, gdt_base, 0xFFFF, 0))
    uc.reg_write(uc_x86.UC_X86_REG_RSP, _TRAMPOLINE + 0x200)
    uc.emu_start(_TRAMPOLINE, target)
    if uc.reg_read(uc_x86.UC_X86_REG_CS) != _FLAT_CS:
        raise EngineError("the engine did not enter ring 3: this build of the library is not usable")
    uc.mem_unmap(_TRAMPOLINE, 0x1000)
