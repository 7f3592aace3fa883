"""mmu_update, update_va_mapping, mmuext_op, update_descriptor (xen/arch/x86/mm.c)."""

from __future__ import annotations

import contextlib
import struct

from hypervisor import abi
from hypervisor.abi import errno
from hypervisor.domain import Domain
from hypervisor.engines.x86 import PTE_P
from hypervisor.errors import XenError
from hypervisor.hypercalls.registry import Continuation, hypercall
from hypervisor.memory.frames import L1, NONE, SEGDESC, WRITABLE
from hypervisor.memory.pagetables import L1_DISALLOW, SAME
from hypervisor.memory.segdesc import check_descriptor
from hypervisor.types import PAGE_SIZE

PREEMPTED = 0x8000_0000  # MMU_UPDATE_PREEMPTED
CHUNK = 256
"""Entries taken between two looks at whether someone waits."""
BUDGET = 4096
"""Most entries in one go."""
_REQUEST_SIZE = 16

_REQUESTS = struct.Struct("<2Q")
_MMUEXT = struct.Struct("<I4xQQ")
_U32 = struct.Struct("<I")

_DOM0 = 0


def page_owner(domain: Domain, domid: int) -> int:
    """Whose pages a call is about, among domains that exist: DOMID_SELF, DOMID_IO, DOMID_XEN, or the tools' domain.

    :raises XenError: ESRCH for any other, and for the caller by its own number, as Xen's get_pg_owner does.
    """
    domid &= 0xFFFF
    if domid in (abi.DOMID_SELF, abi.DOMID_IO, abi.DOMID_XEN) or (domid == _DOM0 != domain.config.domid):
        return domid
    raise XenError(errno.ESRCH, f"foreign domain {domid}")


def _require_self(domain: Domain, domid: int) -> None:
    """Others' memory needs privileges that no domain here has. :raises XenError: ESRCH or EPERM."""
    if page_owner(domain, domid) != abi.DOMID_SELF:
        raise XenError(errno.EPERM, f"foreign domain {domid & 0xFFFF}")


def _resume(domain: Domain, count: int, pdone: int) -> tuple[int, int]:
    """(entries still to do, entries done before this call)."""
    if count & PREEMPTED:
        done = 0
        if pdone:
            with contextlib.suppress(XenError):
                done = domain.guest.read_u32(pdone)
        return count & ~PREEMPTED & 0xFFFF_FFFF, done
    return count & 0xFFFF_FFFF, 0


def _report_done(domain: Domain, pdone: int, done: int) -> None:
    """As in Xen, a bad `pdone` is no error: the work is done."""
    if pdone:
        with contextlib.suppress(XenError):
            domain.guest.write(pdone, _U32.pack(done & 0xFFFF_FFFF))


@hypercall(abi.HYPERVISOR_mmu_update)
def mmu_update(domain: Domain, requests: int, count: int, pdone: int, foreign: int, _5: int, _6: int) -> int:
    left, before = _resume(domain, count, pdone)
    tables_of = (foreign >> 16 & 0xFFFF) - 1
    if tables_of > 0 and tables_of != domain.config.domid:
        raise XenError(errno.ESRCH, f"page tables of domain {tables_of}")
    owner = page_owner(domain, foreign)
    if tables_of == _DOM0 != domain.config.domid:
        owner = _DOM0
    done = 0
    try:
        while left:
            # Up to the end of a page: what precedes an unreadable request is done, as in Xen.
            chunk = min(left, CHUNK, (-requests % PAGE_SIZE) // _REQUEST_SIZE or 1)
            data = domain.guest.read(requests, chunk * _REQUEST_SIZE)
            for ptr, value in _REQUESTS.iter_unpack(data):
                _update_one(domain, ptr, value, owner)
                done += 1
            left -= chunk
            requests += chunk * _REQUEST_SIZE
            if left and (domain.preempt or done >= BUDGET):
                raise Continuation(requests, left | PREEMPTED, pdone, foreign)
    finally:
        _report_done(domain, pdone, before + done)
    return 0


def _update_one(domain: Domain, ptr: int, value: int, owner: int) -> None:
    command = ptr & 7
    tables = domain.tables
    if command > abi.MMU_PT_UPDATE_NO_TRANSLATE:
        raise XenError(errno.ENOSYS, f"mmu_update command {command}")
    if owner not in (abi.DOMID_SELF, abi.DOMID_IO):
        raise XenError(errno.EPERM, f"frames of domain {owner}")
    if owner == abi.DOMID_IO:
        _check_io(domain, ptr, value)
    if command in (abi.MMU_NORMAL_PT_UPDATE, abi.MMU_PT_UPDATE_PRESERVE_AD, abi.MMU_PT_UPDATE_NO_TRANSLATE):
        index = tables.owned_index(ptr >> 12)
        preserve = command == abi.MMU_PT_UPDATE_PRESERVE_AD
        tables.update(index, (ptr & 0xFF8) >> 3, value, preserve_ad=preserve)
    else:
        tables.owned_index(ptr >> 12)
        domain.area.set_m2p(ptr >> 12, value)


def _check_io(domain: Domain, ptr: int, value: int) -> None:
    """With DOMID_IO as the owner only I/O memory may be mapped, of which no domain here has any.

    What maps nothing new is done. :raises XenError: EINVAL, EPERM or EBUSY, as get_page_from_l1e.
    """
    tables, frames = domain.tables, domain.frames
    if ptr & 7 == abi.MMU_MACHPHYS_UPDATE:
        raise XenError(errno.EINVAL, "I/O memory has no place in the M2P")
    index = tables.owned_index(ptr >> 12)
    if not frames.count[index] or frames.kind[index] not in tables.TABLES:
        return
    if frames.kind[index] != L1:
        raise XenError(errno.EINVAL, "an upper-level entry for I/O memory")
    old = domain.memory.words[(index << 9) + ((ptr & 0xFF8) >> 3)]
    if value & PTE_P and (value & L1_DISALLOW or not old & PTE_P or (old ^ value) & SAME):
        if value & L1_DISALLOW:
            raise XenError(errno.EINVAL, f"bad L1 flags in {value:#x}")
        tables.frame_of(value)
        raise XenError(errno.EBUSY, "the frame is no I/O memory")


def _flush_after(domain: Domain, va: int, flags: int) -> None:
    # One engine runs all vCPUs, so local and global flushes are the same.
    kind = flags & abi.UVMF_FLUSHTYPE_MASK
    if kind == abi.UVMF_INVLPG:
        domain.engine.flush_page(va & ~0xFFF)
    elif kind == abi.UVMF_TLB_FLUSH:
        domain.engine.flush_all()


@hypercall(abi.HYPERVISOR_update_va_mapping)
def update_va_mapping(domain: Domain, va: int, value: int, flags: int, _4: int, _5: int, _6: int) -> int:
    at = domain.guest.l1_slot(va)
    if at < 0 or not domain.frames.count[at >> 9] or domain.frames.kind[at >> 9] != 1:
        raise XenError(errno.EINVAL, f"no L1 table for {va:#x}")
    domain.tables.update_l1(at, value)
    _flush_after(domain, va, flags)
    return 0


@hypercall(abi.HYPERVISOR_update_va_mapping_otherdomain)
def update_va_mapping_otherdomain(domain: Domain, va: int, value: int, flags: int, domid: int, _5: int, _6: int) -> int:
    _require_self(domain, domid)
    return update_va_mapping(domain, va, value, flags, 0, 0, 0)


@hypercall(abi.HYPERVISOR_mmuext_op)
def mmuext_op(domain: Domain, operations: int, count: int, pdone: int, foreign: int, _5: int, _6: int) -> int:
    left, before = _resume(domain, count, pdone)
    _require_self(domain, foreign)
    done = 0
    try:
        while left:
            command, first, second = _MMUEXT.unpack(domain.guest.read(operations, _MMUEXT.size))
            _extended(domain, command, first, second)
            done += 1
            left -= 1
            operations += _MMUEXT.size
            if left and (domain.preempt or done >= BUDGET):
                raise Continuation(operations, left | PREEMPTED, pdone, foreign)
    finally:
        _report_done(domain, pdone, before + done)
    return 0


def _extended(domain: Domain, command: int, first: int, second: int) -> None:
    tables, engine = domain.tables, domain.engine
    if command <= abi.MMUEXT_PIN_L4_TABLE:
        tables.pin(first, command + 1)
    elif command == abi.MMUEXT_UNPIN_TABLE:
        tables.unpin(first)
    elif command == abi.MMUEXT_NEW_BASEPTR:
        domain.new_baseptr(first)
    elif command == abi.MMUEXT_NEW_USER_BASEPTR:
        domain.new_user_baseptr(first)
    elif command in (abi.MMUEXT_TLB_FLUSH_LOCAL, abi.MMUEXT_TLB_FLUSH_MULTI, abi.MMUEXT_TLB_FLUSH_ALL):
        engine.flush_all()
    elif command in (abi.MMUEXT_INVLPG_LOCAL, abi.MMUEXT_INVLPG_MULTI, abi.MMUEXT_INVLPG_ALL):
        engine.flush_page(first & ~0xFFF)
    elif command in (abi.MMUEXT_FLUSH_CACHE, abi.MMUEXT_FLUSH_CACHE_GLOBAL):
        # A domain without devices has no use for it and may not (cache_flush_permitted).
        raise XenError(errno.EACCES, "cache flush without devices")
    elif command == abi.MMUEXT_SET_LDT:
        entries = second & 0xFFFF_FFFF
        if first & (PAGE_SIZE - 1) or entries > 8192:
            raise XenError(errno.EINVAL, "bad LDT")
        domain.set_ldt(domain.running, first, entries)
    elif command in (abi.MMUEXT_CLEAR_PAGE, abi.MMUEXT_COPY_PAGE):
        _page_contents(domain, command, first, second)
    elif command in (abi.MMUEXT_MARK_SUPER, abi.MMUEXT_UNMARK_SUPER):
        raise XenError(errno.EOPNOTSUPP, "superpages")
    else:
        raise XenError(errno.ENOSYS, f"mmuext_op {command}")


def _page_contents(domain: Domain, command: int, mfn: int, source: int) -> None:
    tables = domain.tables
    index = tables.owned_index(mfn)
    tables.get_type(index, WRITABLE)
    try:
        if command == abi.MMUEXT_CLEAR_PAGE:
            domain.memory.clear_page(index)
        else:
            domain.memory.copy_page(index, tables.owned_index(source))
        tables.code.host_wrote(index)
    finally:
        tables.put_type(index)


@hypercall(abi.HYPERVISOR_update_descriptor)
def update_descriptor(domain: Domain, address: int, descriptor: int, _3: int, _4: int, _5: int, _6: int) -> int:
    return store_descriptor(domain, address, check_descriptor(descriptor))


def store_descriptor(domain: Domain, address: int, good: int | None) -> int:
    """:param good: the descriptor as it may be stored, None when it may not. :raises XenError: EINVAL."""
    if address & 7 or good is None:
        raise XenError(errno.EINVAL, f"bad descriptor, or not at a multiple of 8: {address:#x}")
    tables, frames = domain.tables, domain.frames
    index = tables.owned_index(address >> 12)
    kind = frames.kind[index] if frames.count[index] else NONE
    if kind not in (NONE, WRITABLE, SEGDESC):
        raise XenError(errno.EINVAL, "the frame is a page table")
    domain.memory.words[(index << 9) + ((address & 0xFFF) >> 3)] = good
    tables.code.host_wrote(index)
    return 0
