"""Page-table and descriptor operations of 32-bit guests (xen/arch/x86/x86_64/compat/mm.c)."""

from __future__ import annotations

from hypervisor import abi
from hypervisor.abi import errno
from hypervisor.domain import Domain
from hypervisor.errors import XenError
from hypervisor.hypercalls.compat_registry import compat, guest_of, native
from hypervisor.hypercalls.mmu import PREEMPTED, store_descriptor
from hypervisor.hypercalls.registry import Continuation
from hypervisor.hypercalls.xlat import Pair
from hypervisor.memory.segdesc32 import check_descriptor

_OPERATION = Pair("mmuext_op")
CHUNK = 128
"""Operations translated at a time."""


@compat(abi.HYPERVISOR_update_va_mapping)
def update_va_mapping(domain: Domain, va: int, low: int, high: int, flags: int, _5: int, _6: int) -> int:
    return native(abi.HYPERVISOR_update_va_mapping)(domain, va, low | high << 32, flags, 0, 0, 0)


@compat(abi.HYPERVISOR_update_va_mapping_otherdomain)
def update_va_mapping_otherdomain(domain: Domain, va: int, low: int, high: int, flags: int, domid: int, _6: int) -> int:
    handler = native(abi.HYPERVISOR_update_va_mapping_otherdomain)
    return handler(domain, va, low | high << 32, flags, domid, 0, 0)


@compat(abi.HYPERVISOR_update_descriptor)
def update_descriptor(domain: Domain, pa_low: int, pa_high: int, low: int, high: int, _5: int, _6: int) -> int:
    return store_descriptor(domain, pa_low | pa_high << 32, check_descriptor(low | high << 32))


@compat(abi.HYPERVISOR_mmuext_op)
def mmuext_op(domain: Domain, operations: int, count: int, pdone: int, foreign: int, _5: int, _6: int) -> int:
    guest = guest_of(domain)
    resumed, left = count & PREEMPTED, count & ~PREEMPTED
    handler = native(abi.HYPERVISOR_mmuext_op)
    while True:
        part = min(left, CHUNK)
        with guest.translating():
            data = bytearray()
            for number in range(part):
                data += _translated(bytes(guest.read(operations + number * _OPERATION.size, _OPERATION.size)))
            at = guest.put(bytes(data))
            try:
                handler(domain, at, part | resumed, pdone, foreign, 0, 0)
            except Continuation as exc:
                undone = exc.arguments[1] & ~PREEMPTED
                operations += (part - undone) * _OPERATION.size
                raise Continuation(operations, (left - part + undone) | PREEMPTED, pdone, foreign) from exc
        operations += part * _OPERATION.size
        left -= part
        if not left:
            return 0
        # What was done counts on from here.
        resumed = PREEMPTED
        if domain.preempt:
            raise Continuation(operations, left | PREEMPTED, pdone, foreign)


def _translated(data: bytes) -> bytes:
    operation = _OPERATION.widen(data)
    if operation.cmd == abi.MMUEXT_NEW_USER_BASEPTR:
        raise XenError(errno.EINVAL, "a 32-bit guest has one page-table root")
    return bytes(operation)
