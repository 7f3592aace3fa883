"""grant_table_op: what a guest without back ends needs (version, size, its own table)."""

from __future__ import annotations

import struct

from hypervisor import abi
from hypervisor.abi import errno
from hypervisor.domain import Domain
from hypervisor.errors import XenError
from hypervisor.grants.table import MAX_FRAMES
from hypervisor.hypercalls.registry import hypercall

_SETUP = struct.Struct("<HxxIhxxxxxxQ")


def _own(domain: Domain, domid: int) -> bool:
    return domid in (abi.DOMID_SELF, domain.config.domid)


def _setup_table(domain: Domain, argument: int) -> None:
    dom, count, _, frames_at = _SETUP.unpack(domain.guest.read(argument, _SETUP.size))
    status = abi.GNTST_okay
    if not _own(domain, dom):
        status = abi.GNTST_bad_domain
    elif count > MAX_FRAMES:
        status = abi.GNTST_general_error
    else:
        domain.grants.grow(count)
        frames = [domain.memory.mfn(index) for index in domain.grants.frames[:count]]
        domain.guest.write(frames_at, struct.pack(f"<{count}Q", *frames))
    domain.guest.write(argument + 8, struct.pack("<h", status))


def _query_size(domain: Domain, argument: int) -> None:
    (dom,) = struct.unpack("<H", domain.guest.read(argument, 2))
    if _own(domain, dom):
        answer = struct.pack("<IIh", len(domain.grants.frames), MAX_FRAMES, abi.GNTST_okay)
    else:
        answer = struct.pack("<IIh", 0, 0, abi.GNTST_bad_domain)
    domain.guest.write(argument + 4, answer)


def _set_version(domain: Domain, argument: int) -> None:
    version = domain.guest.read_u32(argument)
    try:
        domain.grants.set_version(version)
    finally:
        domain.guest.write_u32(argument, domain.grants.version)


def _get_version(domain: Domain, argument: int) -> None:
    (dom,) = struct.unpack("<H", domain.guest.read(argument, 2))
    if not _own(domain, dom):
        raise XenError(errno.ESRCH, f"grant table of domain {dom}")
    domain.guest.write_u32(argument + 4, domain.grants.version)


_OPERATIONS = {
    abi.GNTTABOP_setup_table: (_setup_table, _SETUP.size),
    abi.GNTTABOP_query_size: (_query_size, 16),
    abi.GNTTABOP_set_version: (_set_version, 4),
    abi.GNTTABOP_get_version: (_get_version, 8),
}


@hypercall(abi.HYPERVISOR_grant_table_op)
def grant_table_op(domain: Domain, command: int, argument: int, count: int, _4: int, _5: int, _6: int) -> int:
    found = _OPERATIONS.get(command & 0xFFFF_FFFF)
    if found is None:
        raise XenError(errno.ENOSYS, f"grant_table_op {command}")
    if count & 0xFFFF_FFFF != 1:
        raise XenError(errno.EINVAL, f"grant_table_op {command} on {count} items")
    found[0](domain, argument)
    return 0
