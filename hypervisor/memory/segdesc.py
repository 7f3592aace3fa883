"""Descriptors a PV guest may have (xen/arch/x86/pv/descriptor-tables.c, check_descriptor)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from hypervisor.abi import errno
from hypervisor.engines import x86
from hypervisor.errors import XenError
from hypervisor.memory.physical import DomainMemory

GUEST_KERNEL_RPL = 3
"""A 64-bit PV kernel runs in ring 3."""


FIRST_RESERVED_GDT_ENTRY = 14 * 512  # public/arch-x86/xen.h

_FLAT_RING3_CS64, _FLAT_RING3_CS32 = 0xE033, 0xE023


def gate_selector_ok(selector: int) -> bool:
    """A code selector that a gate may name: the guest's own descriptors or Xen's flat ones."""
    return bool(
        selector >> 3 < FIRST_RESERVED_GDT_ENTRY
        or selector in (_FLAT_RING3_CS64, _FLAT_RING3_CS32)
        or (selector >> 3 < 8192 and selector & 4)
    )


def check_descriptor(desc: int) -> int | None:
    """The descriptor as it may be stored, or None when it is refused.

    Code and data get a DPL of at least the guest kernel's. A call gate keeps working only as a fault: its DPL
    becomes 0 and the original one moves to the selector's RPL.
    """
    if not desc & x86.DESC_P:
        return desc
    low, high = desc & 0xFFFF_FFFF, desc >> 32
    dpl = max((high >> 13) & 3, GUEST_KERNEL_RPL)
    if desc & x86.DESC_S:
        return low | ((high & ~0x6000) | dpl << 13) << 32
    kind = high & 0xF00
    if kind == 0:
        return desc  # the second half of a call gate
    if kind != 0xC00 or high & 0xFF:
        return None
    selector = low >> 16
    if not gate_selector_ok(selector):
        return None
    return (low & 0xFFFF) | ((selector & ~3) | dpl) << 16 | (high & ~0x6000) << 32


def validate_segdesc_page(
    memory: DomainMemory, index: int, check: Callable[[int], int | None] = check_descriptor
) -> None:
    """Check all 512 descriptors of a frame and fix their privilege level. :raises XenError: EINVAL."""
    table = memory.array[index * 512 : index * 512 + 512]
    fixed: list[tuple[int, int]] = []
    for slot in np.flatnonzero(table & np.uint64(x86.DESC_P)).tolist():
        value = int(table[slot])
        good = check(value)
        if good is None:
            raise XenError(errno.EINVAL, f"descriptor {slot} ({value:#018x}) is not allowed")
        if good != value:
            fixed.append((slot, good))
    for slot, good in fixed:
        memory.words[index * 512 + slot] = good
