"""Translation between the structures a 32-bit guest passes and those the handlers know (Xen's xlat.lst).

Both come from the public headers (`hypervisor.abi.structs`) and have the same field names, so one walk over the
fields serves them all. Integers, guest pointers among them, are zero-extended. Where a pointer's target has to be
translated too, the caller puts the translated target into the scratch area of `GuestAccess32` first.
"""

from __future__ import annotations

import ctypes
import struct
from typing import Any

from hypervisor.abi import structs
from hypervisor.memory.guest32 import GuestAccess32

_Aggregate = (ctypes.Structure, ctypes.Union)


def copy_fields(target: Any, source: Any) -> None:
    """Copy the fields that both structures have. A union is copied as a number, zero-extended or cut off."""
    if isinstance(target, ctypes.Union):
        data = bytes(source)[: ctypes.sizeof(target)]
        ctypes.memmove(ctypes.addressof(target), data.ljust(ctypes.sizeof(target), b"\0"), ctypes.sizeof(target))
        return
    there = {field[0] for field in source._fields_}
    for name, *_ in target._fields_:
        if name not in there:
            continue
        value = getattr(source, name)
        if isinstance(value, _Aggregate):
            copy_fields(getattr(target, name), value)
        elif isinstance(value, ctypes.Array):
            _copy_array(getattr(target, name), value)
        else:
            setattr(target, name, value)


def _copy_array(target: Any, source: Any) -> None:
    for number in range(min(len(target), len(source))):
        value = source[number]
        if isinstance(value, _Aggregate):
            copy_fields(target[number], value)
        else:
            target[number] = value


class Pair:
    """A C structure in both its forms.

    :ivar size: bytes of the 32-bit form.
    """

    __slots__ = ("_compat", "_native", "native_size", "size")

    def __init__(self, name: str) -> None:
        self._native: Any = structs.for_bits(name, 64)
        self._compat: Any = structs.for_bits(name, 32)
        self.size = ctypes.sizeof(self._compat)
        self.native_size = ctypes.sizeof(self._native)

    def read(self, guest: GuestAccess32, address: int) -> Any:
        """The guest's structure at `address`, in the 64-bit form. :raises XenError: EFAULT."""
        return self.widen(guest.read(address, self.size))

    def widen(self, data: bytes) -> Any:
        native = self._native()
        copy_fields(native, self._compat.from_buffer_copy(data))
        return native

    def narrow(self, data: bytes) -> bytes:
        """The 32-bit form of a 64-bit structure's bytes."""
        compat = self._compat()
        copy_fields(compat, self._native.from_buffer_copy(data))
        return bytes(compat)


def widen_words(data: bytes) -> bytes:
    """4-byte numbers as 8-byte ones."""
    count = len(data) // 4
    return struct.pack(f"<{count}Q", *struct.unpack(f"<{count}I", data))


def narrow_words(data: bytes) -> bytes:
    count = len(data) // 8
    return struct.pack(f"<{count}I", *(value & 0xFFFF_FFFF for value in struct.unpack(f"<{count}Q", data)))
