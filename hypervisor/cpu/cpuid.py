"""What the guest is told of its processor and its hypervisor (public/arch-x86/cpuid.h)."""

from __future__ import annotations

import struct

from hypervisor.cpu.policy import CpuPolicy, Leaf
from hypervisor.engines.tsc import TscScale

XEN_BASE = 0x4000_0000
XEN_VERSION = 4 << 16 | 17
_SIGNATURE = struct.unpack("<3I", b"XenVMMXenVMM")


class GuestCpuid:
    """The guest's view: its policy, and Xen's leaves."""

    __slots__ = ("_cache", "_scale", "policy")

    def __init__(self, policy: CpuPolicy, scale: TscScale) -> None:
        self.policy = policy
        self._scale = scale
        self._cache: dict[tuple[int, int], Leaf] = {}

    def query(self, leaf: int, subleaf: int) -> Leaf:
        """EAX, EBX, ECX, EDX."""
        key = (leaf, subleaf)
        if key not in self._cache:
            if len(self._cache) >= 256:  # the guest chooses the numbers
                self._cache.clear()
            self._cache[key] = self._compute(leaf, subleaf)
        return self._cache[key]

    def _compute(self, leaf: int, subleaf: int) -> Leaf:
        if XEN_BASE <= leaf < XEN_BASE + 0x100:
            return self._xen(leaf - XEN_BASE, subleaf)
        return self.policy.query(leaf, subleaf)

    def _xen(self, number: int, subleaf: int) -> Leaf:
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
