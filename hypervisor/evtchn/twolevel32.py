"""The 2-level event ABI of 32-bit guests: words of 32 bits, hence 1024 ports."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from hypervisor import abi
from hypervisor.cpu.state import Vcpu
from hypervisor.evtchn.twolevel import TwoLevel
from hypervisor.memory.physical import DomainMemory

_UPCALL_PENDING = abi.VCPU_INFO_EVTCHN_UPCALL_PENDING
_SELECTOR = abi.COMPAT_VCPU_INFO_EVTCHN_PENDING_SEL


class TwoLevel32(TwoLevel):
    """See `TwoLevel`."""

    max_ports = abi.COMPAT_EVTCHN_2L_NR_CHANNELS

    __slots__ = ("_dwords",)

    def __init__(
        self,
        memory: DomainMemory,
        shared_info: int,
        vcpus: Sequence[Vcpu],
        wake: Callable[[int, int], None],
    ) -> None:
        super().__init__(memory, shared_info, vcpus, wake)
        self._dwords = memory.dwords
        self._masks = shared_info * 4096 + abi.COMPAT_SHARED_INFO_EVTCHN_MASK

    def _select(self, port: int, vcpu: int) -> None:
        info, bit = self._vcpus[vcpu].state.vcpu_info, 1 << (port >> 5)
        selector = self._dwords[(info + _SELECTOR) >> 2]
        if not selector & bit:
            self._dwords[(info + _SELECTOR) >> 2] = selector | bit
            self._bytes[info + _UPCALL_PENDING] = 1
