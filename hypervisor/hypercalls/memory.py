"""memory_op: reservation, exchange, maps (xen/common/memory.c)."""

from __future__ import annotations

import struct

from hypervisor import abi
from hypervisor.abi import errno
from hypervisor.domain import Domain
from hypervisor.errors import XenError
from hypervisor.hypercalls.registry import hypercall
from hypervisor.hypercalls.reservations import START_EXTENT_SHIFT as START_EXTENT_SHIFT
from hypervisor.hypercalls.reservations import exchange, require_own, reservation
from hypervisor.memory.layout import M2P_VIRT_START

_COMMAND_MASK = (1 << START_EXTENT_SHIFT) - 1
MAX_MFN_ANSWER = (1 << 35) - 1
"""XENMEM_machphys_mapping's max_mfn. The guest caches it for life, so it must hold on every host it may move to."""


def _memory_map(domain: Domain, argument: int) -> int:
    room, buffer = struct.unpack("<I4xQ", domain.guest.read(argument, 16))
    if room < 1:
        raise XenError(errno.EINVAL, "no room for the memory map")
    domain.guest.write(buffer, struct.pack("<QQI", 0, domain.config.max_pages << 12, 1))
    domain.guest.write_u32(argument, 1)
    return 0


def _machphys_mapping(domain: Domain, argument: int) -> int:
    domain.guest.write(argument, struct.pack("<3Q", M2P_VIRT_START, M2P_VIRT_START + (1 << 38), MAX_MFN_ANSWER))
    return 0


def _domain_count(domain: Domain, command: int, argument: int) -> int:
    (dom,) = struct.unpack("<H", domain.guest.read(argument, 2))
    require_own(domain, dom)
    if command == abi.XENMEM_current_reservation:
        return domain.frames.pages()
    if command == abi.XENMEM_maximum_gpfn:
        return domain.config.max_pages - 1
    return domain.config.max_pages


def _physmap(domain: Domain, command: int, argument: int, start: int) -> int:
    """XENMEM_add_to_physmap and its like are of domains whose frame numbers Xen translates, which no PV domain is."""
    batch = command == abi.XENMEM_add_to_physmap_batch
    if command == abi.XENMEM_remove_from_physmap:
        if start:
            raise XenError(errno.EINVAL, "nothing to go on with")
        dom, space = struct.unpack("<H", domain.guest.read(argument, abi.SIZEOF_XEN_REMOVE_FROM_PHYSMAP)[:2])[0], None
    else:
        if start > 0xFFFF:
            raise XenError(errno.EDOM, f"start at {start}")
        size = abi.SIZEOF_XEN_ADD_TO_PHYSMAP_BATCH if batch else abi.SIZEOF_XEN_ADD_TO_PHYSMAP
        dom, space = struct.unpack("<HH" if batch else "<HxxI", domain.guest.read(argument, size)[: 4 if batch else 8])
    if batch and space == abi.XENMAPSPACE_gmfn_range:
        raise XenError(errno.EOPNOTSUPP, "a batch of ranges")
    if not batch and space == abi.XENMAPSPACE_gmfn_foreign:
        raise XenError(errno.ENOSYS, "foreign frames only in a batch")
    if dom not in (abi.DOMID_SELF, domain.config.domid, 0):
        raise XenError(errno.ESRCH, f"domain {dom}")
    raise XenError(errno.EACCES, "a PV domain's frame numbers are not translated")


_NOT_CONTINUED = (
    abi.XENMEM_exchange,
    abi.XENMEM_maximum_ram_page,
    abi.XENMEM_current_reservation,
    abi.XENMEM_maximum_reservation,
    abi.XENMEM_maximum_gpfn,
)


@hypercall(abi.HYPERVISOR_memory_op)
def memory_op(domain: Domain, command: int, argument: int, _3: int, _4: int, _5: int, _6: int) -> int:
    start = (command & 0xFFFF_FFFF) >> START_EXTENT_SHIFT
    command &= _COMMAND_MASK
    if command in (abi.XENMEM_increase_reservation, abi.XENMEM_decrease_reservation, abi.XENMEM_populate_physmap):
        return reservation(domain, command, argument, start)
    if start and command in _NOT_CONTINUED:
        raise XenError(errno.EINVAL, f"memory_op {command} has nothing to go on with")
    if command == abi.XENMEM_exchange:
        return exchange(domain, argument)
    if command == abi.XENMEM_maximum_ram_page:
        return domain.memory.base_mfn + domain.memory.frames - 1
    if command in (abi.XENMEM_current_reservation, abi.XENMEM_maximum_reservation, abi.XENMEM_maximum_gpfn):
        return _domain_count(domain, command, argument)
    if command == abi.XENMEM_machphys_mapping:
        return _machphys_mapping(domain, argument)
    if command == abi.XENMEM_memory_map:
        return _memory_map(domain, argument)
    if command in (abi.XENMEM_add_to_physmap, abi.XENMEM_add_to_physmap_batch, abi.XENMEM_remove_from_physmap):
        return _physmap(domain, command, argument, start)
    if command in (abi.XENMEM_machine_memory_map, abi.XENMEM_machphys_mfn_list):
        raise XenError(errno.EPERM, f"memory_op {command} is privileged")
    raise XenError(errno.ENOSYS, f"memory_op {command}")
