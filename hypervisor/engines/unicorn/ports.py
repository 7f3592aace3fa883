"""Port I/O of a machine without devices."""

from __future__ import annotations

import ctypes

PORT_IN_CB = ctypes.CFUNCTYPE(ctypes.c_uint32, ctypes.c_void_p, ctypes.c_uint32, ctypes.c_int, ctypes.c_void_p)


def port_in(_uc: int, _port: int, _size: int, _data: int) -> int:
    """Nothing answers at any port: all ones, as an empty bus reads. (The library never checks IOPL for `in`, `out`.)"""
    return 0xFFFF_FFFF
