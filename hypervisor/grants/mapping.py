"""Mappings of grants into a domain's page tables (map_grant_ref and unmap_common in xen/common/grant_table.c,
xen/arch/x86/pv/grant_table.c).

A page-table entry made here holds its frame as any other leaf entry does, so a
guest that overwrites it gives that hold back; its handle then stays, with the
use of the grant, until the domain ends.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from hypervisor import abi
from hypervisor.engines.x86 import PTE_A, PTE_ADDR, PTE_D, PTE_NX, PTE_P, PTE_RW, PTE_US
from hypervisor.grants.active import ActiveGrants
from hypervisor.grants.maptrack import Mapping, Maptrack
from hypervisor.grants.peer import GrantError, GrantPeer, increment_of
from hypervisor.memory.frames import L1, NONE, WRITABLE
from hypervisor.memory.guest import GuestAccess
from hypervisor.memory.pagetables import USER_BITS, PageTables

_KINDS = abi.GNTMAP_host_map | abi.GNTMAP_device_map
_AVAILABLE_SHIFT = abi.GNTMAP_guest_avail0_BIT - 9
_AVAILABLE = 0xE00

LOW_END, XEN_END = 1 << 47, 0xFFFF_8800_0000_0000
"""Linear addresses between these are no guest's."""


@dataclasses.dataclass(slots=True)
class Unmapped:
    """What an unmap took out of the page tables, to be given back after the TLB flush."""

    peer: GrantPeer
    ref: int
    mfn: int
    flags: int


class GrantMapper:
    """The mappings of one domain.

    :param find: the peer of a domain number, None when there is no such domain.
    :param narrow: the guest is a 32-bit one, whose kernel needs no user bit.
    """

    def __init__(
        self,
        own: ActiveGrants,
        tables: PageTables,
        guest: GuestAccess,
        maptrack: Maptrack,
        find: Callable[[int], GrantPeer | None],
        *,
        narrow: bool = False,
    ) -> None:
        self._own = own
        self._tables = tables
        self._guest = guest
        self._find = find
        self._base = tables.memory.base_mfn
        self._narrow = narrow
        self.maptrack = maptrack

    # -- map

    def map(self, host_addr: int, flags: int, ref: int, domid: int) -> tuple[int, int]:
        """GNTTABOP_map_grant_ref: (handle, machine address). :raises GrantError: nothing changed."""
        increment = increment_of(flags)
        if not increment:
            raise GrantError(abi.GNTST_bad_gntref, f"grant map flags {flags:#x}")
        peer = self._find(domid)
        if peer is None:
            raise GrantError(abi.GNTST_bad_domain, f"no domain {domid}")
        handle = self.maptrack.take()
        readonly = bool(flags & abi.GNTMAP_readonly)
        try:
            mfn = peer.pin(ref, self._own.domid, increment, readonly=readonly)
            try:
                self._hold_and_map(peer, mfn, host_addr, flags)
            except GrantError:
                peer.unpin(ref, increment, readonly=readonly)
                raise
        except GrantError:
            self.maptrack.give_back(handle)
            raise
        self.maptrack.set(handle, Mapping(domid, ref, flags & 0xFFFF, mfn))
        return handle, mfn << 12

    def _hold_and_map(self, peer: GrantPeer, mfn: int, host_addr: int, flags: int) -> None:
        writable = not flags & abi.GNTMAP_readonly
        if flags & abi.GNTMAP_device_map:
            peer.hold(mfn, writable=writable)
        try:
            if flags & abi.GNTMAP_host_map:
                peer.hold(mfn, writable=writable)
                try:
                    self._create(peer, host_addr, mfn, flags)
                except GrantError:
                    peer.drop(mfn, writable=writable)
                    raise
        except GrantError:
            if flags & abi.GNTMAP_device_map:
                peer.drop(mfn, writable=writable)
            raise

    def _create(self, peer: GrantPeer, host_addr: int, mfn: int, flags: int) -> None:
        at = self._entry_of(host_addr, flags)
        entry = mfn << 12 | _entry_flags(flags)
        if not entry & PTE_US and not self._narrow:
            entry |= USER_BITS
        # What the entry held before goes as by any other write; nothing can fail from here on.
        self._tables.update_l1(at, 0)
        if peer.domid != self._own.domid:
            self._tables.foreign.add(peer, mfn, writable=bool(entry & PTE_RW))
        self._tables.words[at] = entry

    def _entry_of(self, address: int, flags: int) -> int:
        """Word offset of the L1 entry that a host address names. :raises GrantError: GNTST_general_error."""
        at = -1
        if flags & abi.GNTMAP_contains_pte:
            # A misaligned address would corrupt its neighbours.
            index = (address >> 12) - self._base
            if not address & 7 and self._tables.frames.owned(index):
                at = index << 9 | (address & 0xFFF) >> 3
        else:
            at = self._linear_entry(address)
        if at < 0 or not self._is_l1(at >> 9):
            raise GrantError(abi.GNTST_general_error, f"no L1 entry for {address:#x}")
        return at

    def _linear_entry(self, address: int) -> int:
        if LOW_END <= address < XEN_END or (self._narrow and address >> 32):
            return -1
        return self._guest.l1_slot(address)

    def _is_l1(self, index: int) -> bool:
        frames = self._tables.frames
        return bool(frames.kind[index] == L1 and frames.count[index])

    # -- unmap

    def unmap(self, handle: int, host_addr: int, dev_bus_addr: int, new_addr: int = 0) -> Unmapped | None:
        """Take a mapping, or a part of it, out of the page tables; `complete` what this returns after a TLB flush.

        :param new_addr: if not 0, the linear address whose entry takes the mapping's place (unmap_and_replace).
        :raises GrantError: the mapping stays.
        """
        mapping = self.maptrack.get(handle)
        peer = self._find(mapping.domid)
        if peer is None:
            raise GrantError(abi.GNTST_bad_domain, f"domain {mapping.domid} is gone")
        flags = mapping.flags
        mfn = mapping.mfn
        done = 0
        if dev_bus_addr and flags & abi.GNTMAP_device_map and dev_bus_addr != mfn << 12:
            raise GrantError(abi.GNTST_bad_dev_addr, f"{dev_bus_addr:#x} is not the granted frame {mfn:#x}")
        if host_addr and flags & abi.GNTMAP_host_map:
            self._replace(host_addr, mfn, new_addr, flags)
            done |= abi.GNTMAP_host_map
        if dev_bus_addr and flags & abi.GNTMAP_device_map:
            done |= abi.GNTMAP_device_map
        mapping.flags &= ~done
        if not mapping.flags & _KINDS:
            self.maptrack.give_back(handle)
        if not done:
            return None
        return Unmapped(peer, mapping.ref, mfn, done | flags & abi.GNTMAP_readonly)

    def complete(self, done: Unmapped) -> None:
        """Give back what an unmap set free (unmap_common_complete)."""
        readonly = bool(done.flags & abi.GNTMAP_readonly)
        increment = increment_of(done.flags)
        if done.flags & abi.GNTMAP_device_map:
            done.peer.drop(done.mfn, writable=not readonly)
        if done.flags & abi.GNTMAP_host_map:
            self._drop_leaf(done.mfn << 12 | (0 if readonly else PTE_RW))
        done.peer.unpin(done.ref, increment, readonly=readonly)

    def _drop_leaf(self, entry: int) -> None:
        """Give back what an entry that is gone already held."""
        mfn = (entry & PTE_ADDR) >> 12
        if self._tables.memory.index(mfn) >= 0:
            self._own.drop(mfn, writable=bool(entry & PTE_RW))
        else:
            self._tables.foreign.left(entry)

    def _replace(self, host_addr: int, mfn: int, new_addr: int, flags: int) -> None:
        """Replace a mapping's entry by nothing, or by the one of `new_addr` (replace_grant_pv_mapping)."""
        stolen = 0
        if new_addr:
            if flags & abi.GNTMAP_contains_pte:
                raise GrantError(abi.GNTST_general_error, "a mapping by its entry cannot be replaced")
            at = self._entry_of(new_addr, 0)
            stolen, self._tables.words[at] = self._tables.words[at], 0
        try:
            at = self._entry_of(host_addr, flags)
            entry = self._tables.words[at]
            if (entry ^ _entry_flags(flags)) & (PTE_P | PTE_RW) or (entry & PTE_ADDR) >> 12 != mfn:
                raise GrantError(abi.GNTST_general_error, f"entry {entry:#x} does not map the granted frame {mfn:#x}")
        except GrantError:
            if stolen & PTE_P:
                # The caller flushes for what was unmapped only, and this frame may be another domain's.
                self._tables.tlb.flush_all()
                self._drop_leaf(stolen)
            raise
        self._tables.words[at] = stolen

    def device_holds(self) -> list[tuple[int, int]]:
        """(frame, kind) of each own frame that is mapped for devices, which no page table shows."""
        holds: list[tuple[int, int]] = []
        for _, mapping in self.maptrack.items():
            if mapping.flags & abi.GNTMAP_device_map and mapping.domid == self._own.domid:
                kind = NONE if mapping.flags & abi.GNTMAP_readonly else WRITABLE
                holds.append((mapping.mfn - self._base, kind))
        return holds

    # -- the end of the domain

    def release(self) -> int:
        """Give back all uses of grants, when the domain does not run any more; how many mappings there were.

        The entries themselves keep their own frames; those of other domains are given back here.
        """
        released = 0
        for handle, mapping in self.maptrack.items():
            peer = self._find(mapping.domid)
            if peer is not None:
                readonly = bool(mapping.flags & abi.GNTMAP_readonly)
                if mapping.flags & abi.GNTMAP_device_map:
                    peer.drop(mapping.mfn, writable=not readonly)
                peer.unpin(mapping.ref, increment_of(mapping.flags), readonly=readonly)
            self.maptrack.give_back(handle)
            released += 1
        self._tables.foreign.release()
        return released


def _entry_flags(flags: int) -> int:
    """The page-table entry of a mapping with these GNTMAP_* flags, without its address (grant_to_pte_flags)."""
    entry = PTE_P | PTE_A | PTE_D | PTE_NX
    if flags & abi.GNTMAP_application_map:
        entry |= PTE_US
    if not flags & abi.GNTMAP_readonly:
        entry |= PTE_RW
    return entry | flags >> _AVAILABLE_SHIFT & _AVAILABLE
