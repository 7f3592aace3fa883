"""The 2-level event ABI: 4096 bits in shared_info and a selector word per vCPU (xen/common/event_2l.c)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from hypervisor import abi
from hypervisor.abi import errno
from hypervisor.cpu.state import Vcpu
from hypervisor.errors import XenError
from hypervisor.memory.physical import DomainMemory

_PENDING_BITS = abi.SHARED_INFO_EVTCHN_PENDING
_MASK_BITS = abi.SHARED_INFO_EVTCHN_MASK
_UPCALL_PENDING = abi.VCPU_INFO_EVTCHN_UPCALL_PENDING
_SELECTOR = abi.VCPU_INFO_EVTCHN_PENDING_SEL


class TwoLevel:
    """See `hypervisor.evtchn.core.Abi`.

    :param shared_info: frame index.
    :param wake: called with (vCPU number, port) when a port went pending: the event may be deliverable there now,
        or someone polls the port.
    """

    name = "2l"
    max_ports = abi.EVTCHN_2L_NR_CHANNELS
    priorities = False

    __slots__ = ("_bytes", "_masks", "_pending", "_vcpus", "_wake", "_words")

    def __init__(
        self,
        memory: DomainMemory,
        shared_info: int,
        vcpus: Sequence[Vcpu],
        wake: Callable[[int, int], None],
    ) -> None:
        self._bytes = memory.bytes
        self._words = memory.words
        self._pending = shared_info * 4096 + _PENDING_BITS
        self._masks = shared_info * 4096 + _MASK_BITS
        self._vcpus = vcpus
        self._wake = wake

    def set_pending(self, port: int, vcpu: int) -> None:
        data, at, bit = self._bytes, self._pending + (port >> 3), 1 << (port & 7)
        if data[at] & bit:
            return
        data[at] |= bit
        if not data[self._masks + (port >> 3)] & bit:
            self._select(port, vcpu)
        self._wake(vcpu, port)

    def _select(self, port: int, vcpu: int) -> None:
        """Announce the port's word; a guest that has it announced already is not called again, as in Xen."""
        info, bit = self._vcpus[vcpu].state.vcpu_info, 1 << (port >> 6)
        selector = self._words[(info + _SELECTOR) >> 3]
        if not selector & bit:
            self._words[(info + _SELECTOR) >> 3] = selector | bit
            self._bytes[info + _UPCALL_PENDING] = 1

    def unmask(self, port: int, vcpu: int) -> None:
        data, at, bit = self._bytes, self._masks + (port >> 3), 1 << (port & 7)
        if not data[at] & bit:
            return
        data[at] &= ~bit & 0xFF
        if data[self._pending + (port >> 3)] & bit:
            self._select(port, vcpu)
            self._wake(vcpu, port)

    def clear(self, port: int) -> None:
        self._bytes[self._pending + (port >> 3)] &= ~(1 << (port & 7)) & 0xFF

    def is_pending(self, port: int) -> bool:
        return bool(self._bytes[self._pending + (port >> 3)] & 1 << (port & 7))

    def opened(self, port: int) -> None:
        return

    def is_busy(self, _port: int) -> bool:
        return False

    def set_priority(self, _port: int, _priority: int) -> None:
        raise XenError(errno.ENOSYS, "priorities need the FIFO ABI")

    def release(self) -> None:
        return

    def save(self) -> dict[str, Any]:
        """All of it lies in the guest's memory."""
        return {"name": self.name}
