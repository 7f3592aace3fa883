"""Port I/O in ring 3, where PV guests live.

The library never looks at IOPL for `in`, `out` and their string forms, and has no exit for them: a hook gives the value
that is read, and the guest goes on. On the direct path the hook is a few bytes of machine code that raise #GP from
within the library, which has put RIP at the instruction before it calls the hook. So the handler sees what a processor
does at IOPL 0; what a guest may do with ports is its own matter. On the public path nothing faults: reads are all ones.
"""

from __future__ import annotations

import ctypes
import mmap
import struct
from typing import Any

from hypervisor.engines.unicorn.library import uc_x86

PORT_IN_CB = ctypes.CFUNCTYPE(ctypes.c_uint32, ctypes.c_void_p, ctypes.c_uint32, ctypes.c_int, ctypes.c_void_p)
HOOKS = uc_x86.UC_X86_INS_IN, uc_x86.UC_X86_INS_OUT

# raise_exception_err(data, 13, 0), which does not return. `data` is the fourth argument of a hook of `in`, the fifth of
# one of `out`: mov %rcx,%rdi (mov %r8,%rdi); mov $13,%esi; xor %edx,%edx; movabs $target,%rax; jmp *%rax
_DATA = {uc_x86.UC_X86_INS_IN: b"\x48\x89\xcf", uc_x86.UC_X86_INS_OUT: b"\x4c\x89\xc7"}
_RAISE = b"\xbe\x0d\x00\x00\x00\x31\xd2\x48\xb8%s\xff\xe0"
_SLOT = 32


def port_in(_uc: int, _port: int, _size: int, _data: int) -> int:
    """Nothing answers at any port: all ones, as an empty bus reads."""
    return 0xFFFF_FFFF


class PortFaults:
    """Hooks by which port instructions raise #GP.

    :param library: has the library's exported functions.
    :raises OSError: the host gives no executable memory.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        target = ctypes.cast(library.raise_exception_err_x86_64, ctypes.c_void_p).value
        self._code = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        for number, instruction in enumerate(HOOKS):
            code = _DATA[instruction] + _RAISE % struct.pack("<Q", target)
            self._code[number * _SLOT : number * _SLOT + len(code)] = code
        self._anchor: Any = ctypes.c_char.from_buffer(self._code)
        self._at = ctypes.addressof(self._anchor)
        protect = ctypes.CDLL(None, use_errno=True).mprotect
        protect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        if protect(self._at, mmap.PAGESIZE, mmap.PROT_READ | mmap.PROT_EXEC):
            raise OSError(ctypes.get_errno(), "a page cannot be made executable")

    def hook(self, instruction: int) -> ctypes.c_void_p:
        """The hook for one of `HOOKS`; its data must be the address of the engine's register block."""
        return ctypes.c_void_p(self._at + HOOKS.index(instruction) * _SLOT)
