"""grant_table_op (do_grant_table_op in xen/common/grant_table.c).

What is wrong with one item of a batch goes into that item's status; what is
wrong with the call itself is its result.
"""

from __future__ import annotations

import struct
from collections.abc import Callable

from hypervisor import abi
from hypervisor.abi import errno
from hypervisor.domain import Domain
from hypervisor.errors import XenError
from hypervisor.grants.copy import End
from hypervisor.grants.mapping import LOW_END, XEN_END, Unmapped
from hypervisor.grants.peer import GrantError
from hypervisor.grants.table import MAX_FRAMES
from hypervisor.hypercalls.registry import Continuation, hypercall

COMMAND_MASK = (1 << 12) - 1  # GNTTABOP_CMD_MASK; what lies above is a continued cache flush's
BUDGET = 256
"""Most items in one go; a copy moves a page at most."""
UNMAP_BATCH = 32
"""Unmaps between two TLB flushes."""

_MAP = struct.Struct("<QIIHhIQ")
_UNMAP = struct.Struct("<QQIhxx")
_SETUP = struct.Struct("<HxxIhxxxxxxQ")
_STATUS_FRAMES = struct.Struct("<IHhQ")
_COPY = struct.Struct("<QHHxxxxQHHxxxxHHhxx")
_SWAP = struct.Struct("<IIhxx")
_CACHE_FLUSH = struct.Struct("<QHHI")
_STATUS = struct.Struct("<h")


def _handle_ok(address: int, count: int, size: int) -> bool:
    """Whether an array may lie there (guest_handle_okay); reading it finds out the rest."""
    return count < ((1 << 64) - 1) // size and not LOW_END <= address < XEN_END


# -- batches: each function does item after item from `argument` on and returns how many it did


def _gives_way(domain: Domain, number: int) -> bool:
    return number > 0 and (domain.preempt or number >= BUDGET)


def _map(domain: Domain, argument: int, count: int) -> int:
    for number in range(count):
        if _gives_way(domain, number):
            return number
        at = argument + number * _MAP.size
        host, flags, ref, dom, _, handle, bus = _MAP.unpack(domain.guest.read(at, _MAP.size))
        status = abi.GNTST_okay
        try:
            handle, bus = domain.grants.mapper.map(host, flags, ref, dom)
        except GrantError as exc:
            status = exc.status
        domain.guest.write(at, _MAP.pack(host, flags, ref, dom, status, handle, bus))
    return count


def _unmap(domain: Domain, argument: int, count: int) -> int:
    return _unmap_batches(domain, argument, count, replace=False)


def _unmap_and_replace(domain: Domain, argument: int, count: int) -> int:
    return _unmap_batches(domain, argument, count, replace=True)


def _unmap_batches(domain: Domain, argument: int, count: int, *, replace: bool) -> int:
    done = 0
    while done < count:
        if _gives_way(domain, done):
            return done
        part = min(UNMAP_BATCH, count - done)
        unmapped: list[Unmapped] = []
        try:
            for number in range(done, done + part):
                _unmap_one(domain, argument + number * _UNMAP.size, unmapped, replace=replace)
        finally:
            if unmapped:
                domain.engine.flush_all()
            for item in unmapped:
                domain.grants.mapper.complete(item)
        done += part
    return count


def _unmap_one(domain: Domain, at: int, unmapped: list[Unmapped], *, replace: bool) -> None:
    host, second, handle, _ = _UNMAP.unpack(domain.guest.read(at, _UNMAP.size))
    bus, new = (0, second) if replace else (second, 0)
    status = abi.GNTST_okay
    try:
        item = domain.grants.mapper.unmap(handle, host, bus, new)
        if item is not None:
            unmapped.append(item)
    except GrantError as exc:
        status = exc.status
    domain.guest.write(at + 20, _STATUS.pack(status))


def _transfer(_domain: Domain, _argument: int, _count: int) -> int:
    # As a Xen whose administrator turned it off (gnttab=no-transfer).
    raise XenError(errno.EOPNOTSUPP, "grant transfer")


def _copy(domain: Domain, argument: int, count: int) -> int:
    with domain.grants.copies() as batch:
        for number in range(count):
            if _gives_way(domain, number):
                return number
            at = argument + number * _COPY.size
            source, source_dom, source_at, target, target_dom, target_at, size, flags, _ = _COPY.unpack(
                domain.guest.read(at, _COPY.size)
            )
            ends = (
                End(source, source_dom, source_at, granted=bool(flags & abi.GNTCOPY_source_gref)),
                End(target, target_dom, target_at, granted=bool(flags & abi.GNTCOPY_dest_gref)),
            )
            status = abi.GNTST_okay
            try:
                batch.copy(*ends, size)
            except GrantError as exc:
                status = exc.status
            domain.guest.write(at + 36, _STATUS.pack(status))
    return count


def _swap(domain: Domain, argument: int, count: int) -> int:
    for number in range(count):
        if _gives_way(domain, number):
            return number
        at = argument + number * _SWAP.size
        a, b, _ = _SWAP.unpack(domain.guest.read(at, _SWAP.size))
        status = abi.GNTST_okay
        try:
            domain.grants.swap(a, b)
        except GrantError as exc:
            status = exc.status
        domain.guest.write(at + 8, _STATUS.pack(status))
    return count


def _cache_flush(domain: Domain, argument: int, count: int) -> int:
    for number in range(count):
        if _gives_way(domain, number):
            return number
        at = argument + number * _CACHE_FLUSH.size
        address, offset, length, operation = _CACHE_FLUSH.unpack(domain.guest.read(at, _CACHE_FLUSH.size))
        domain.grants.check_cache_flush(address, offset, length, operation)
    return count


_BATCHES: dict[int, tuple[Callable[[Domain, int, int], int], int]] = {
    abi.GNTTABOP_map_grant_ref: (_map, _MAP.size),
    abi.GNTTABOP_unmap_grant_ref: (_unmap, _UNMAP.size),
    abi.GNTTABOP_unmap_and_replace: (_unmap_and_replace, _UNMAP.size),
    abi.GNTTABOP_transfer: (_transfer, abi.SIZEOF_GNTTAB_TRANSFER),
    abi.GNTTABOP_copy: (_copy, _COPY.size),
    abi.GNTTABOP_swap_grant_ref: (_swap, _SWAP.size),
    abi.GNTTABOP_cache_flush: (_cache_flush, _CACHE_FLUSH.size),
}


# -- single operations


def _listed(domain: Domain, address: int, indexes: list[int]) -> int:
    """Write the frame numbers of a table's frames for the guest; the status."""
    status = abi.GNTST_okay
    for number, index in enumerate(indexes):
        try:
            domain.guest.write_u64(address + 8 * number, domain.memory.mfn(index))
        except XenError:
            status = abi.GNTST_bad_virt_addr
    return status


def _setup_table(domain: Domain, argument: int, count: int) -> None:
    _one(count)
    dom, frames, _, listed_at = _SETUP.unpack(domain.guest.read(argument, _SETUP.size))
    if not _handle_ok(listed_at, frames, 8):
        raise XenError(errno.EFAULT, f"frame list at {listed_at:#x}")
    table = domain.grants.table
    try:
        if not domain.grants.is_own(dom):
            status = abi.GNTST_permission_denied
        elif frames > MAX_FRAMES:
            status = abi.GNTST_general_error
        else:
            table.grow(frames)
            status = _listed(domain, listed_at, table.frames[:frames])
    except GrantError as exc:
        status = exc.status
    domain.guest.write(argument + 8, _STATUS.pack(status))


def _get_status_frames(domain: Domain, argument: int, count: int) -> None:
    _one(count)
    frames, dom, _, listed_at = _STATUS_FRAMES.unpack(domain.guest.read(argument, _STATUS_FRAMES.size))
    if not _handle_ok(listed_at, frames, 8):
        raise XenError(errno.EFAULT, f"frame list at {listed_at:#x}")
    table = domain.grants.table
    try:
        if not domain.grants.is_own(dom):
            status = abi.GNTST_permission_denied
        elif frames > len(table.status_frames):
            status = abi.GNTST_general_error
        else:
            status = _listed(domain, listed_at, table.status_frames[:frames])
    except GrantError as exc:
        status = exc.status
    domain.guest.write(argument + 6, _STATUS.pack(status))


def _query_size(domain: Domain, argument: int, count: int) -> None:
    _one(count)
    dom, frames, most = struct.unpack("<HxxII", domain.guest.read(argument, 16)[:12])
    try:
        status = abi.GNTST_okay if domain.grants.is_own(dom) else abi.GNTST_permission_denied
    except GrantError as exc:
        status = exc.status
    if status == abi.GNTST_okay:
        frames, most = len(domain.grants.table.frames), MAX_FRAMES
    domain.guest.write(argument + 4, struct.pack("<IIh", frames, most, status))


def _set_version(domain: Domain, argument: int, _count: int) -> None:
    version = domain.guest.read_u32(argument)
    try:
        domain.grants.set_version(version)
    finally:
        domain.guest.write_u32(argument, domain.grants.table.version)


def _get_version(domain: Domain, argument: int, _count: int) -> None:
    (dom,) = struct.unpack("<H", domain.guest.read(argument, 8)[:2])
    try:
        if not domain.grants.is_own(dom):
            raise XenError(errno.EPERM, f"grant table of domain {dom}")
    except GrantError as exc:
        raise XenError(errno.ESRCH, exc.why) from exc
    domain.guest.write_u32(argument + 4, domain.grants.table.version)


def _one(count: int) -> None:
    if count != 1:
        raise XenError(errno.EINVAL, f"{count} items")


_SINGLE: dict[int, Callable[[Domain, int, int], None]] = {
    abi.GNTTABOP_setup_table: _setup_table,
    abi.GNTTABOP_query_size: _query_size,
    abi.GNTTABOP_set_version: _set_version,
    abi.GNTTABOP_get_status_frames: _get_status_frames,
    abi.GNTTABOP_get_version: _get_version,
}


@hypercall(abi.HYPERVISOR_grant_table_op)
def grant_table_op(domain: Domain, command: int, argument: int, count: int, _4: int, _5: int, _6: int) -> int:
    command &= 0xFFFF_FFFF
    count &= 0xFFFF_FFFF
    if count >> 31:
        raise XenError(errno.EINVAL, f"{count} grant operations")
    operation, resumed = command & COMMAND_MASK, command & ~COMMAND_MASK
    if resumed and operation != abi.GNTTABOP_cache_flush:
        raise XenError(errno.EINVAL, f"grant_table_op {command:#x}")
    if operation in _SINGLE:
        _SINGLE[operation](domain, argument, count)
        return 0
    if operation not in _BATCHES:
        # GNTTABOP_dump_table is one of them: Xen dropped it.
        raise XenError(errno.ENOSYS, f"grant_table_op {operation}")
    batch, size = _BATCHES[operation]
    if not _handle_ok(argument, count, size):
        raise XenError(errno.EFAULT, f"grant operations at {argument:#x}")
    done = batch(domain, argument, count)
    if done < count:
        raise Continuation(operation, argument + done * size, count - done)
    return 0
