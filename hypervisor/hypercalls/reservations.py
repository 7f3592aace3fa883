"""memory_op's changes of what memory a domain has (memory_exchange and its like in xen/common/memory.c)."""

from __future__ import annotations

from hypervisor import abi
from hypervisor.abi import errno, structs
from hypervisor.domain import Domain
from hypervisor.engines.x86 import MASK64
from hypervisor.errors import XenError
from hypervisor.grants.mapping import LOW_END, XEN_END
from hypervisor.hypercalls.registry import Continuation
from hypervisor.memory.reservation import MAX_ORDER
from hypervisor.types import PAGE_SHIFT

START_EXTENT_SHIFT = 6  # MEMOP_EXTENT_SHIFT: a continued call says here where it stopped
CHUNK = 512
"""Frames between two looks at whether someone waits."""
BUDGET = 1 << 15
"""Most frames in one go."""
MAX_EXTENTS = 0xFFFF_FFFF >> START_EXTENT_SHIFT
"""More could not be continued; Xen does none of them then."""


def require_own(domain: Domain, domid: int) -> None:
    """:raises XenError: EPERM for the domain of the tools, ESRCH for any other but the caller's own."""
    if domid not in (abi.DOMID_SELF, domain.config.domid):
        raise XenError(errno.EPERM if domid == 0 else errno.ESRCH, f"foreign domain {domid}")


def _list_ok(address: int) -> bool:
    """Whether a list may begin there (guest_handle_subrange_okay); reading it finds out the rest."""
    return not LOW_END <= address < XEN_END


def reservation(domain: Domain, command: int, argument: int, start: int) -> int:
    """The reservation calls. Whatever is wrong, the answer is the number of extents done."""
    try:
        data = domain.guest.read(argument, abi.SIZEOF_XEN_MEMORY_RESERVATION)
    except XenError:
        return start
    asked = structs.XenMemoryReservation.from_buffer_copy(data)
    if not start < asked.nr_extents <= MAX_EXTENTS or asked.domid not in (abi.DOMID_SELF, domain.config.domid):
        return start
    bits, flags = asked.mem_flags & 0xFF, asked.mem_flags
    if 0 < bits <= PAGE_SHIFT or not (flags & abi.XENMEMF_vnode or _node_ok(flags)):
        return start
    anywhere = command == abi.XENMEM_increase_reservation and not asked.extent_start
    if asked.extent_order > MAX_ORDER or not (anywhere or _list_ok(asked.extent_start + 8 * start)):
        return start
    if command == abi.XENMEM_populate_physmap and flags & abi.XENMEMF_populate_on_demand:
        return start  # not for oneself
    try:
        if command == abi.XENMEM_decrease_reservation:
            return _decrease(domain, asked, argument, start)
        return _populate(domain, asked, argument, start, command)
    finally:
        domain.reservation.settle()


def _node_ok(flags: int) -> bool:
    """An ordinary domain's wish for a NUMA node is not heard; one that must be heard is refused (propagate_node)."""
    return not flags & abi.XENMEMF_exact_node_request or (flags >> 8) & 0xFF == 0


def _decrease(domain: Domain, asked: structs.XenMemoryReservation, argument: int, start: int) -> int:
    size = 1 << asked.extent_order
    for number in range(start, asked.nr_extents):
        if _gives_way(domain, number - start, size):
            raise Continuation(abi.XENMEM_decrease_reservation | number << START_EXTENT_SHIFT, argument)
        try:
            first = domain.guest.read_u64(asked.extent_start + 8 * number)
            for mfn in range(first, first + size):
                domain.reservation.give_back(mfn)
        except XenError:
            return number
    return int(asked.nr_extents)


def _populate(domain: Domain, asked: structs.XenMemoryReservation, argument: int, start: int, command: int) -> int:
    taker = domain.reservation.taker(asked.extent_order, asked.mem_flags & 0xFF)
    populate = command == abi.XENMEM_populate_physmap
    has = domain.frames.pages()
    for number in range(start, asked.nr_extents):
        if _gives_way(domain, number - start, taker.size):
            raise Continuation(command | number << START_EXTENT_SHIFT, argument)
        at = asked.extent_start + 8 * number
        try:
            pfn = domain.guest.read_u64(at) if populate else 0
            has += taker.size
            index = taker.take() if has <= domain.reservation.limit else None
            if index is None:
                return number
            mfn = domain.memory.mfn(index)
            if populate:
                _name_frames(domain, mfn, pfn, taker.size)
            if asked.extent_start:
                domain.guest.write_u64(at, mfn)
        except XenError:
            return number
    return int(asked.nr_extents)


def _name_frames(domain: Domain, mfn: int, pfn: int, size: int) -> None:
    for offset in range(size):
        domain.area.set_m2p(mfn + offset, (pfn + offset) & MASK64)


def _gives_way(domain: Domain, done: int, size: int) -> bool:
    frames = done * size
    return done > 0 and frames % CHUNK < size and (domain.preempt or frames >= BUDGET)


def exchange(domain: Domain, argument: int) -> int:
    """XENMEM_exchange: `nr_exchanged` says how far it came, whatever the result.

    :raises XenError: EPERM too large an extent, EINVAL lists that do not fit or a frame in use, ENOMEM, EFAULT, ESRCH.
    """
    asked = structs.XenMemoryExchange.from_buffer_copy(domain.guest.read(argument, abi.SIZEOF_XEN_MEMORY_EXCHANGE))
    taken, given = asked.in_, asked.out
    if asked.nr_exchanged == taken.nr_extents and _fits(asked):
        return 0
    done = int(asked.nr_exchanged)
    try:
        _check_exchange(domain, asked)
        unit = 1 << max(0, given.extent_order - taken.extent_order)  # extents of the first list exchanged at a time
        first = done // unit * unit
        for number in range(first, taken.nr_extents // unit * unit, unit):
            done = number
            if _gives_way(domain, (number - first) // unit, unit << taken.extent_order):
                raise Continuation(abi.XENMEM_exchange, argument)
            _exchange_unit(domain, asked, number, unit)
        done = int(taken.nr_extents)
        return 0
    finally:
        domain.reservation.settle()
        domain.guest.write_u64(argument + abi.SIZEOF_XEN_MEMORY_EXCHANGE - 8, done)


def _fits(asked: structs.XenMemoryExchange) -> bool:
    """Whether both lists have the same number of frames, not more than can be counted."""
    taken, given = asked.in_, asked.out
    frames = taken.nr_extents << taken.extent_order
    return (
        max(taken.extent_order, given.extent_order) <= MAX_ORDER
        and asked.nr_exchanged <= taken.nr_extents
        and taken.domid == given.domid
        and frames == given.nr_extents << given.extent_order <= MASK64
    )


def _check_exchange(domain: Domain, asked: structs.XenMemoryExchange) -> None:
    taken, given = asked.in_, asked.out
    if max(taken.extent_order, given.extent_order) > MAX_ORDER:
        raise XenError(errno.EPERM, f"extent orders {taken.extent_order} and {given.extent_order}")
    if not _fits(asked):
        raise XenError(errno.EINVAL, "the lists of an exchange do not fit together")
    frames = asked.nr_exchanged << taken.extent_order
    for side in (taken, given):
        if not _list_ok(side.extent_start + 8 * (frames >> side.extent_order)):
            raise XenError(errno.EFAULT, f"extent list at {side.extent_start:#x}")
    if not _node_ok(given.mem_flags):
        raise XenError(errno.EINVAL, "a NUMA node is not an ordinary domain's to choose")
    require_own(domain, taken.domid)


def _exchange_unit(domain: Domain, asked: structs.XenMemoryExchange, number: int, unit: int) -> None:
    """`unit` extents from number `number` of the first list on, for as many frames of the second."""
    taken, given = asked.in_, asked.out
    size = 1 << taken.extent_order
    mfns: list[int] = []
    for extent in range(number, number + unit):
        first = domain.guest.read_u64(taken.extent_start + 8 * extent)
        mfns += range(first, first + size)
    taker = domain.reservation.taker(given.extent_order, given.mem_flags & 0xFF)
    extents = domain.reservation.exchange(mfns, taker, len(mfns) // taker.size)
    # They are exchanged: what the guest cannot be told of is its own all the same.
    failed: XenError | None = None
    for at, index in enumerate(extents, (number << taken.extent_order) >> given.extent_order):
        mfn = domain.memory.mfn(index)
        try:
            pfn = domain.guest.read_u64(given.extent_start + 8 * at)
            _name_frames(domain, mfn, pfn, taker.size)
            domain.guest.write_u64(given.extent_start + 8 * at, mfn)
        except XenError as exc:
            failed = exc
    if failed is not None:
        raise failed
