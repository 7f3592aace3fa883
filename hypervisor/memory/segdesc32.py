"""Descriptors a 32-bit PV guest may have (xen/arch/x86/pv/descriptor-tables.c, check_descriptor)."""

from __future__ import annotations

from hypervisor import abi
from hypervisor.engines import x86
from hypervisor.memory.segdesc import FIRST_RESERVED_GDT_ENTRY

KERNEL_RPL = 1
"""A 32-bit PV kernel runs in ring 1."""


def fix_selector(selector: int) -> int:
    """A selector with a privilege level that is the guest's at least (fixup_guest_code_selector and its kin)."""
    return selector if selector & 3 >= KERNEL_RPL else selector & ~3 | KERNEL_RPL


def _gate_selector_ok(selector: int) -> bool:
    return bool(
        selector >> 3 < FIRST_RESERVED_GDT_ENTRY
        or selector == abi.COMPAT_FLAT_KERNEL_CS
        or (selector >> 3 < 8192 and selector & 4)
    )


def check_descriptor(desc: int) -> int | None:
    """The descriptor as it may be stored, or None when it is refused: 64-bit code among others.

    A flat segment that ends within Xen's area is made to reach its end, for the M2P there.
    """
    if not desc & x86.DESC_P:
        return desc
    low, high = desc & x86.MASK32, desc >> 32
    dpl = max((high >> 13) & 3, KERNEL_RPL)
    high = high & ~0x6000 | dpl << 13
    if desc & x86.DESC_S:
        if desc & x86.DESC_L:
            return None
        if not x86.desc_base(desc) and x86.desc_limit(desc) >= abi.COMPAT_HYPERVISOR_VIRT_START:
            low |= 0xFFFF
            high |= 0xF_0000
        return low | high << 32
    if not high & 0xF00:
        return desc  # the second half of a call gate
    selector = low >> 16
    if high & 0xF00 != 0xC00 or not _gate_selector_ok(selector) or high & 0xE0:
        return None
    return (low & 0xFFFF) | (selector & ~3 | dpl) << 16 | (high & ~0x6000) << 32
