"""Everything about grants of one domain: its table, what its grants are used for, and what it maps."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from hypervisor import abi
from hypervisor.abi import errno
from hypervisor.errors import XenError
from hypervisor.grants.active import ActiveGrants
from hypervisor.grants.copy import CopyBatch
from hypervisor.grants.mapping import GrantMapper
from hypervisor.grants.maptrack import Maptrack
from hypervisor.grants.peer import HOST_DOMID, GrantError, GrantPeer, HostDomain
from hypervisor.grants.table import GrantTable
from hypervisor.memory.guest import GuestAccess
from hypervisor.memory.pagetables import PageTables
from hypervisor.memory.pagetables32 import PaeTables
from hypervisor.memory.xenarea import XenArea
from hypervisor.types import PAGE_SIZE

LOG = logging.getLogger(__name__)


def _nobody(_domid: int) -> GrantPeer | None:
    return None


class Grants:
    """The grant operations of a domain, decoded.

    :ivar find_peer: the other domains that may be granted from; set by the host side. None: no such domain.
    """

    def __init__(self, domid: int, tables: PageTables, area: XenArea, guest: GuestAccess) -> None:
        self.domid = domid
        self._tables = tables
        self._host = HostDomain()
        self.find_peer: Callable[[int], GrantPeer | None] = _nobody
        self.table = GrantTable(tables.memory, area, tables.frames, tables.code.host_wrote)
        self.own = ActiveGrants(domid, self.table, tables, self.peer)
        self.mapper = GrantMapper(self.own, tables, guest, Maptrack(), self.peer, narrow=isinstance(tables, PaeTables))

    # -- domains

    def peer(self, domid: int) -> GrantPeer | None:
        """The domain of a number; DOMID_SELF is none."""
        if domid == self.domid:
            return self.own
        return self._host if domid == HOST_DOMID else self.find_peer(domid)

    def any_peer(self, domid: int) -> GrantPeer | None:
        """The same, where DOMID_SELF is allowed."""
        return self.own if domid == abi.DOMID_SELF else self.peer(domid)

    def is_own(self, domid: int) -> bool:
        """Whether it is the domain's own number. :raises GrantError: GNTST_bad_domain, there is none of that number."""
        peer = self.any_peer(domid)
        if peer is None:
            raise GrantError(abi.GNTST_bad_domain, f"no domain {domid}")
        return peer is self.own

    # -- the table

    def grow(self, count: int) -> None:
        """See `GrantTable.grow`."""
        self.table.grow(count)

    def set_version(self, version: int) -> None:
        """See `GrantTable.set_version`."""
        self.table.set_version(version, self.own)
        # Status frames that went are no longer the guest's, though it may have unmapped them without a flush.
        self._tables.tlb.flush_all()

    def swap(self, a: int, b: int) -> None:
        """Exchange two of the domain's grants. :raises GrantError: out of range, or in use."""
        for ref in (a, b):
            if ref >= self.table.entries:
                raise GrantError(abi.GNTST_bad_gntref, f"grant {ref:#x}")
        if a == b:
            return
        for ref in (a, b):
            if self.own.pin_of(ref):
                raise GrantError(abi.GNTST_eagain, f"grant {ref} is in use")
        self.table.swap(a, b)

    # -- the rest

    def copies(self) -> CopyBatch:
        """Begin the copies of one hypercall."""
        return CopyBatch(self.domid, self.own, self.any_peer)

    def check_cache_flush(self, address: int, offset: int, length: int, operation: int) -> bool:
        """GNTTABOP_cache_flush of a machine address; False: there is nothing to flush.

        The caches of an emulated machine are coherent, so what is allowed is done already.

        :raises XenError: EINVAL bad range or operation, or no frame that the domain uses; EOPNOTSUPP.
        """
        known = abi.GNTTAB_CACHE_INVAL | abi.GNTTAB_CACHE_CLEAN
        if offset >= PAGE_SIZE or length > PAGE_SIZE or offset + length > PAGE_SIZE or operation & ~known:
            raise XenError(errno.EINVAL, f"cache flush {operation:#x} of {length} bytes")
        if not length or not operation:
            return False
        mfn = address >> 12
        frames = self._tables.frames
        mapped = any(entry in self._tables.foreign for entry in (mfn << 12, mfn << 12 | 2))
        if not frames.owned(mfn - self._tables.memory.base_mfn) and not mapped:
            raise XenError(errno.EINVAL, f"frame {mfn:#x} is not in the domain's use")
        if operation == abi.GNTTAB_CACHE_INVAL:
            raise XenError(errno.EOPNOTSUPP, "caches cannot be dropped without being written back")
        return True

    def release(self) -> int:
        """Give back all uses of grants; the domain does not run any more. The number of mappings there were."""
        released = self.mapper.release()
        if released:
            LOG.info("domain %d ended with %d mappings of grants", self.domid, released)
        return released

    # -- save and restore

    def save(self) -> dict[str, Any]:
        """The state; the shared frames and page tables are part of the domain's memory.

        :raises ValueError: frames of other domains are mapped, which only this host knows.
        """
        if self._tables.foreign:
            raise ValueError(f"{len(self._tables.foreign)} frames of other domains are mapped")
        return {"table": self.table.save(), "active": self.own.save(), "maptrack": self.mapper.maptrack.save()}

    def restore(self, data: dict[str, Any]) -> None:
        """:raises ValueError: the saved state contradicts itself."""
        self.table.restore(data["table"])
        self.own.restore(data["active"])
        self.mapper.maptrack.restore(data["maptrack"])
