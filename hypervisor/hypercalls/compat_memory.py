"""memory_op of 32-bit guests (xen/common/compat/memory.c): lists of 4-byte frame numbers, taken in pieces."""

from __future__ import annotations

import struct

from hypervisor import abi
from hypervisor.abi import errno
from hypervisor.domain import Domain
from hypervisor.errors import XenError
from hypervisor.hypercalls.compat_registry import compat, guest_of, native
from hypervisor.hypercalls.registry import Continuation
from hypervisor.hypercalls.xlat import Pair, narrow_words, widen_words
from hypervisor.memory.guest32 import GuestAccess32
from hypervisor.memory.xenarea32 import M2P_ENTRIES

START_EXTENT_SHIFT = 6  # MEMOP_EXTENT_SHIFT: a continued call says here where it stopped
CHUNK = 512
"""Extents translated at a time."""
MAX_EXCHANGED = 1 << 14
"""Extents of one exchange."""

_RESERVATION = Pair("xen_memory_reservation")
_EXCHANGE = Pair("xen_memory_exchange")
_MEMORY_MAP = Pair("xen_memory_map")
_COMMAND_MASK = (1 << START_EXTENT_SHIFT) - 1
_EXTENTS = (abi.XENMEM_increase_reservation, abi.XENMEM_decrease_reservation, abi.XENMEM_populate_physmap)
_SAME = (
    abi.XENMEM_maximum_ram_page,
    abi.XENMEM_current_reservation,
    abi.XENMEM_maximum_reservation,
    abi.XENMEM_maximum_gpfn,
    abi.XENMEM_machphys_mfn_list,
    abi.XENMEM_machine_memory_map,
)
_TRANSLATED = {
    abi.XENMEM_add_to_physmap: Pair("xen_add_to_physmap"),
    abi.XENMEM_remove_from_physmap: Pair("xen_remove_from_physmap"),
}


@compat(abi.HYPERVISOR_memory_op)
def memory_op(domain: Domain, command: int, argument: int, _3: int, _4: int, _5: int, _6: int) -> int:
    start, command = command >> START_EXTENT_SHIFT, command & _COMMAND_MASK
    if command in _EXTENTS:
        return _extents(domain, command, argument, start)
    handler = native(abi.HYPERVISOR_memory_op)
    if command in _SAME:
        return handler(domain, command, argument, 0, 0, 0, 0)
    if command == abi.XENMEM_machphys_mapping:
        window = (abi.COMPAT_HYPERVISOR_VIRT_START, 0xFFE0_0000, M2P_ENTRIES - 1)
        domain.guest.write(argument, struct.pack("<3I", *window))
        return 0
    if command == abi.XENMEM_exchange:
        return _exchange(domain, argument)
    guest = guest_of(domain)
    if command == abi.XENMEM_memory_map:
        at = guest.put(bytes(_MEMORY_MAP.read(guest, argument)))
        result = handler(domain, command, at, 0, 0, 0, 0)
        guest.write(argument, _MEMORY_MAP.narrow(guest.read(at, _MEMORY_MAP.native_size)))
        return result
    pair = _TRANSLATED.get(command)
    if pair is None:
        raise XenError(errno.ENOSYS, f"memory_op {command}")
    at = guest.put(bytes(pair.read(guest, argument)))
    return handler(domain, command, at, 0, 0, 0, 0)


def _extents(domain: Domain, command: int, argument: int, start: int) -> int:
    """The number of extents done, the ones before `start` included, whatever is wrong with the rest."""
    try:
        total = int(_RESERVATION.read(guest_of(domain), argument).nr_extents)
    except XenError:
        return start
    while True:
        end = min(total, start + CHUNK)
        done = _piece(domain, command, argument, start, end)
        if done < end or done >= total:
            return done
        start = done
        if domain.preempt:
            raise Continuation(command | start << START_EXTENT_SHIFT, argument)


def _piece(domain: Domain, command: int, argument: int, start: int, end: int) -> int:
    """Extents ``start .. end-1``; returns how many are done, counted from extent 0."""
    guest = guest_of(domain)
    reservation = _RESERVATION.read(guest, argument)
    theirs = int(reservation.extent_start)
    with guest.translating():
        ours = 0
        if theirs:  # a list may be left out when the guest does not care which frames it gets
            words = _readable(guest, theirs + 4 * start, max(0, end - start))
            ours = guest.put(words)
            end = start + len(words) // 8
            # Entry `start` of the list that the handler sees is the first one translated.
            reservation.extent_start = ours - 8 * start
        reservation.nr_extents = end
        structure = guest.put(bytes(reservation))
        again = None
        call = command | start << START_EXTENT_SHIFT
        try:
            done = native(abi.HYPERVISOR_memory_op)(domain, call, structure, 0, 0, 0, 0)
        except Continuation as exc:
            done = exc.arguments[0] >> START_EXTENT_SHIFT
            again = Continuation(exc.arguments[0], argument)
        if theirs and command != abi.XENMEM_decrease_reservation and done > start:
            guest.write(theirs + 4 * start, narrow_words(guest.read(ours, 8 * (done - start))))
        if again is not None:
            raise again
    return done


def _readable(guest: GuestAccess32, address: int, count: int) -> bytes:
    """As many of `count` frame numbers as can be read, widened."""
    try:
        return widen_words(guest.read(address, 4 * count))
    except XenError:
        out = b""
        for number in range(count):
            try:
                out += widen_words(guest.read(address + 4 * number, 4))
            except XenError:
                break
        return out


def _exchange(domain: Domain, argument: int) -> int:
    guest = guest_of(domain)
    exchange = _EXCHANGE.read(guest, argument)
    lists = []
    for side in (exchange.in_, exchange.out):
        if side.nr_extents > MAX_EXCHANGED:
            raise XenError(errno.ENOSPC, f"exchange of {side.nr_extents} extents")
        theirs, count = int(side.extent_start), int(side.nr_extents)
        side.extent_start = guest.put(widen_words(guest.read(theirs, 4 * count)))
        lists.append((theirs, int(side.extent_start), count))
    at = guest.put(bytes(exchange))
    try:
        return native(abi.HYPERVISOR_memory_op)(domain, abi.XENMEM_exchange, at, 0, 0, 0, 0)
    except Continuation as exc:
        raise Continuation(exc.arguments[0], argument) from exc
    finally:
        theirs, ours, count = lists[1]
        guest.write(theirs, narrow_words(guest.read(ours, 8 * count)))
        exchanged = guest.read_u64(at + _EXCHANGE.native_size - 8)
        guest.write_u32(argument + _EXCHANGE.size - 4, exchanged)
