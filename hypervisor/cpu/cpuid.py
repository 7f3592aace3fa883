"""What the guest is told of its processor and its hypervisor (public/arch-x86/cpuid.h)."""

from __future__ import annotations

import struct
from collections.abc import Callable

from hypervisor.engines.tsc import TscScale

XEN_BASE = 0x4000_0000
XEN_VERSION = 4 << 16 | 17
_SIGNATURE = struct.unpack("<3I", b"XenVMMXenVMM")

# Leaf 1: features a PV guest must not use, because the hypervisor owns them or the engine cannot do them.
_LEAF1_C_HIDE = (
    1 << 2
    | 1 << 3
    | 1 << 5
    | 1 << 6
    | 1 << 7
    | 1 << 8
    | 1 << 12
    | 1 << 15
    | 1 << 17
    | 1 << 18
    | 1 << 21
    | 1 << 24
    | 1 << 26
    | 1 << 27
    | 1 << 28
    | 1 << 29
    | 1 << 30
)  # DTES64, MONITOR, VMX, SMX, EST, TM2, FMA, PDCM, PCID, DCA, x2APIC, TSC deadline, XSAVE, OSXSAVE, AVX, F16C, RDRAND
_LEAF1_D_HIDE = (
    1 << 1
    | 1 << 2
    | 1 << 3
    | 1 << 7
    | 1 << 12
    | 1 << 13
    | 1 << 14
    | 1 << 16
    | 1 << 17
    | 1 << 18
    | 1 << 21
    | 1 << 22
    | 1 << 28
    | 1 << 29
    | 1 << 31
)  # VME, DE, PSE, MCE, MTRR, PGE, MCA, PAT, PSE36, PSN, DS, ACPI, HTT, TM, PBE
_HYPERVISOR_PRESENT = 1 << 31
_EXT_C_KEEP = 1 << 0 | 1 << 5 | 1 << 6 | 1 << 8  # LAHF, LZCNT (ABM), SSE4A, PREFETCHW
_EXT_D_HIDE = 1 << 1 | 1 << 2 | 1 << 3 | 1 << 7 | 1 << 12 | 1 << 13 | 1 << 14 | 1 << 16 | 1 << 17 | 1 << 26 | 1 << 27
_ALL_ZERO = frozenset((0x5, 0x6, 0x7, 0xA, 0xB, 0xD, 0xF, 0x10, 0x12, 0x14, 0x15, 0x16, 0x17, 0x18, 0x1D, 0x1E, 0x1F))


class CpuidPolicy:
    """The guest's view: the engine's model, less what PV forbids, plus Xen's leaves.

    :param native: CPUID of the engine.
    """

    __slots__ = ("_cache", "_native", "_scale")

    def __init__(self, native: Callable[[int, int], tuple[int, int, int, int]], scale: TscScale) -> None:
        self._native = native
        self._scale = scale
        self._cache: dict[tuple[int, int], tuple[int, int, int, int]] = {}

    def query(self, leaf: int, subleaf: int) -> tuple[int, int, int, int]:
        """EAX, EBX, ECX, EDX."""
        key = (leaf, subleaf)
        if key not in self._cache:
            if len(self._cache) >= 256:  # the guest chooses the numbers
                self._cache.clear()
            self._cache[key] = self._compute(leaf, subleaf)
        return self._cache[key]

    def _compute(self, leaf: int, subleaf: int) -> tuple[int, int, int, int]:
        if XEN_BASE <= leaf < XEN_BASE + 0x100:
            return self._xen(leaf - XEN_BASE, subleaf)
        if leaf in _ALL_ZERO or 0x4000_0000 <= leaf < 0x8000_0000:
            return 0, 0, 0, 0
        a, b, c, d = self._native(leaf, subleaf)
        if leaf == 1:
            b &= 0x00FF_FFFF  # initial APIC id: the guest numbers its vCPUs itself
            c = (c & ~_LEAF1_C_HIDE) | _HYPERVISOR_PRESENT
            d &= ~_LEAF1_D_HIDE
        elif leaf == 0x8000_0001:
            c &= _EXT_C_KEEP
            d &= ~_EXT_D_HIDE
        elif leaf == 0x8000_0007:
            a, b, c, d = 0, 0, 0, 1 << 8  # invariant TSC
        return a, b, c, d

    def _xen(self, number: int, subleaf: int) -> tuple[int, int, int, int]:
        if number == 0:
            return XEN_BASE + 5, *_SIGNATURE
        if number == 1:
            return XEN_VERSION, 0, 0, 0
        if number == 2:
            return 1, 0x4000_0000, 1, 0  # one hypercall page; MMU_PT_UPDATE_PRESERVE_AD works
        if number == 3:
            scale = self._scale
            if subleaf == 0:
                return 0, 2, scale.khz, 0
            if subleaf == 1:
                return 0, 0, scale.mul, scale.shift & 0xFF
            return (scale.khz, 0, 0, 0) if subleaf == 2 else (0, 0, 0, 0)
        if number == 5 and subleaf == 0:
            return 0, 39, 0, 0  # machine address width
        return 0, 0, 0, 0
