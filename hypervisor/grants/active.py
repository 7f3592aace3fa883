"""What a domain's own grants are used for: active entries, and the references on its frames (xen/common/grant_table.c).

`ActiveGrants` is the `GrantPeer` of a domain, for the domain itself (a guest may
map what it granted to itself) and for whoever speaks for another domain.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from hypervisor import abi
from hypervisor.errors import HypervisorBug, XenError
from hypervisor.grants.peer import (
    COUNTER_BITS,
    HOST_READ,
    HOST_WRITE,
    WRITERS,
    GrantError,
    GrantPeer,
    Window,
)
from hypervisor.grants.table import Entry, GrantTable
from hypervisor.memory.frames import WRITABLE
from hypervisor.memory.pagetables import PageTables
from hypervisor.types import PAGE_SIZE


@dataclasses.dataclass(slots=True)
class Active:
    """A grant in use, with what it granted when that began.

    :ivar pin: four counters of 8 bits (`hypervisor.grants.peer`); never 0.
    :ivar target: domain whose grant `target_ref` this one passes on; None for an own frame.
    """

    pin: int
    domid: int
    mfn: int
    start: int
    length: int
    sub_page: bool
    target: int | None = None
    target_ref: int = 0


class ActiveGrants:
    """The uses of one domain's grants.

    :param find: the peer of a domain number, None when there is no such domain.
    """

    def __init__(
        self, domid: int, table: GrantTable, tables: PageTables, find: Callable[[int], GrantPeer | None]
    ) -> None:
        self._domid = domid
        self._table = table
        self._tables = tables
        self._find = find
        self._active: dict[int, Active] = {}

    @property
    def domid(self) -> int:
        return self._domid

    def __iter__(self) -> Iterator[int]:
        """References in use."""
        return iter(self._active)

    def __len__(self) -> int:
        return len(self._active)

    def pin_of(self, ref: int) -> int:
        """The four counters of a reference, 0 when it is not in use."""
        act = self._active.get(ref)
        return act.pin if act else 0

    # -- for mappings

    def pin(self, ref: int, mapper: int, increment: int, *, readonly: bool) -> int:
        act = self._usable(ref, mapper, increment)
        if act is not None and act.sub_page:
            raise GrantError(abi.GNTST_general_error, f"grant {ref} is of a part of a page")
        if act is None or not (readonly or act.pin & WRITERS):
            entry = self._table.entry(ref)
            self._claim(ref, entry, mapper, act, readonly=readonly, mapping=True)
            if act is None:
                act = self._activate(ref, mapper, entry, readonly=readonly)
        act.pin += increment
        return act.mfn

    def unpin(self, ref: int, increment: int, *, readonly: bool) -> None:
        act = self._active.get(ref)
        if act is None or not self._contains(act.pin, increment):
            raise HypervisorBug(f"grant {ref} is given back more often than taken")
        act.pin -= increment
        self._reduce(ref, act.pin, readonly=readonly)
        if not act.pin:
            del self._active[ref]

    @staticmethod
    def _contains(pin: int, increment: int) -> bool:
        mask = (1 << COUNTER_BITS) - 1
        return all(pin >> n & mask >= increment >> n & mask for n in range(0, 4 * COUNTER_BITS, COUNTER_BITS))

    def _usable(self, ref: int, mapper: int, increment: int) -> Active | None:
        """The active entry of a reference, if there is one and it can take another use."""
        if ref >= self._table.entries:
            raise GrantError(abi.GNTST_bad_gntref, f"grant {ref:#x}")
        act = self._active.get(ref)
        if act is not None and (act.domid != mapper or act.pin & increment << (COUNTER_BITS - 1)):
            raise GrantError(abi.GNTST_general_error, f"grant {ref} is for domain {act.domid}, or used too often")
        return act

    def _claim(self, ref: int, entry: Entry, mapper: int, act: Active | None, *, readonly: bool, mapping: bool) -> None:
        """Check the copy of a shared entry and mark the grant used (_set_status_v1 and _v2)."""
        kind = entry.flags & (abi.GTF_type_mask | (abi.GTF_sub_page if mapping else 0))
        good = kind == abi.GTF_permit_access or (
            kind == abi.GTF_transitive and not mapping and self._table.version == 2
        )
        if act is None and not (good and entry.domid == mapper):
            raise GrantError(abi.GNTST_general_error, f"grant {ref}: flags {entry.flags:#x} for domain {entry.domid}")
        if not readonly and entry.flags & abi.GTF_readonly:
            raise GrantError(abi.GNTST_general_error, f"grant {ref} is read-only")
        self._table.mark(ref, readonly=readonly)

    def _activate(self, ref: int, mapper: int, entry: Entry, *, readonly: bool) -> Active:
        """An active entry without uses yet, of an own frame."""
        if not self._owned(entry.frame):
            self._reduce(ref, 0, readonly=readonly)
            raise GrantError(abi.GNTST_bad_page, f"grant {ref}: frame {entry.frame:#x} is not the domain's")
        sub_page = self._table.version == 2 and bool(entry.flags & abi.GTF_sub_page)
        act = Active(0, mapper, entry.frame, entry.start & 0x7FFF, entry.length, sub_page)
        self._active[ref] = act
        return act

    def _reduce(self, ref: int, pin: int, *, readonly: bool) -> None:
        """Let the guest see no more use than there is (reduce_status_for_pin)."""
        bits = 0 if pin else abi.GTF_reading
        if not readonly and not pin & WRITERS:
            bits |= abi.GTF_writing
        if bits:
            self._table.clear(ref, bits)

    # -- for copies

    def pin_copy(self, ref: int, mapper: int, *, readonly: bool, transitive: bool) -> Window:
        increment = HOST_READ if readonly else HOST_WRITE
        act = self._usable(ref, mapper, increment)
        entry = self._table.entry(ref)
        if act is None or not (readonly or act.pin & WRITERS):
            self._claim(ref, entry, mapper, act, readonly=readonly, mapping=False)
        if self._table.version == 2 and entry.kind == abi.GTF_transitive:
            act, window = self._pass_on(ref, entry, mapper, act, readonly=readonly, transitive=transitive)
        else:
            if act is None:
                act = self._activate(ref, mapper, entry, readonly=readonly)
            window = self._hold_pinned(ref, act, readonly=readonly)
        act.pin += increment
        return window

    def _hold_pinned(self, ref: int, act: Active, *, readonly: bool) -> Window:
        try:
            if act.target is not None:
                # It was transitive when its use began; the entry changed since.
                raise GrantError(abi.GNTST_bad_domain, f"grant {ref} passed on another domain's")
            self.hold(act.mfn, writable=False)
        except GrantError:
            self._reduce(ref, act.pin, readonly=readonly)
            if not act.pin:
                del self._active[ref]
            raise
        return Window(act.mfn, act.start, act.length, self)

    def _pass_on(
        self, ref: int, entry: Entry, mapper: int, act: Active | None, *, readonly: bool, transitive: bool
    ) -> tuple[Active, Window]:
        """The use of a transitive grant: one of the grant it refers to."""
        target, target_ref = entry.target, entry.frame
        try:
            if not transitive:
                raise GrantError(abi.GNTST_general_error, f"grant {ref} is transitive itself")
            if target == self._domid:
                raise GrantError(abi.GNTST_general_error, f"grant {ref} refers to its own domain")
            peer = self._find(target)
            if peer is None:
                raise GrantError(abi.GNTST_general_error, f"grant {ref} refers to domain {target}")
            window = peer.pin_copy(target_ref, self._domid, readonly=readonly, transitive=False)
            # A peer in another process may have been served meanwhile, with this grant, too.
            act = self._active.get(ref)
            found = (target, target_ref, window.mfn, window.start, window.length)
            if act is not None and found != (act.target, act.target_ref, act.mfn, act.start, act.length):
                peer.unpin_copy(target_ref, readonly=readonly)
                window.owner.drop(window.mfn, writable=False)
                # Xen tries again, and again for as long as the entry does not match.
                raise GrantError(abi.GNTST_eagain, f"grant {ref} changed while it is in use")
        except GrantError:
            self._reduce(ref, act.pin if act else 0, readonly=readonly)
            raise
        if act is None:
            # Always as a part of a page: that keeps it from being mapped.
            act = Active(0, mapper, window.mfn, window.start, window.length, True, target, target_ref)
            self._active[ref] = act
        return act, window

    def unpin_copy(self, ref: int, *, readonly: bool) -> None:
        act = self._active.get(ref)
        if act is None:
            raise HypervisorBug(f"grant {ref} is given back more often than taken")
        self.unpin(ref, HOST_READ if readonly else HOST_WRITE, readonly=readonly)
        if act.target is not None:
            peer = self._find(act.target)
            if peer is not None:
                peer.unpin_copy(act.target_ref, readonly=readonly)

    # -- frames

    def _owned(self, mfn: int) -> bool:
        return self._tables.frames.owned(mfn - self._tables.memory.base_mfn)

    def hold(self, mfn: int, *, writable: bool) -> None:
        tables = self._tables
        index = mfn - tables.memory.base_mfn
        if not tables.frames.owned(index):
            raise GrantError(abi.GNTST_general_error, f"frame {mfn:#x} is not the domain's")
        if not writable:
            tables.frames.refs[index] += 1
            return
        try:
            tables.get_type(index, WRITABLE)
        except XenError as exc:
            raise GrantError(abi.GNTST_general_error, f"frame {mfn:#x}: {exc.why}") from exc

    def drop(self, mfn: int, *, writable: bool) -> None:
        tables = self._tables
        index = mfn - tables.memory.base_mfn
        if writable:
            tables.put_type(index)
            tables.code.host_wrote(index)
        else:
            tables.frames.refs[index] -= 1

    def page(self, mfn: int) -> memoryview:
        memory = self._tables.memory
        index = memory.index(mfn)
        if index < 0:
            raise HypervisorBug(f"frame {mfn:#x} is not the domain's")
        return memory.page(index)

    @contextlib.contextmanager
    def set_aside(self, mapper: int) -> Iterator[None]:
        """Meanwhile all is as if domain `mapper` had given its mappings back, but for what the guest sees of them.

        Nobody may use grants or frames then. :raises GrantError: a frame is not what it was when it was put aside.
        """
        mask = (1 << COUNTER_BITS) - 1
        active, holds = self._active, list[tuple[int, bool]]()
        for act in active.values():
            if act.domid == mapper:
                holds += [(act.mfn, True)] * (act.pin // HOST_WRITE & mask)
                holds += [(act.mfn, False)] * (act.pin // HOST_READ & mask)
        self._active = {ref: act for ref, act in active.items() if act.domid != mapper}
        for mfn, writable in holds:
            self.drop(mfn, writable=writable)
        try:
            yield
        finally:
            self._active = active
            for mfn, writable in holds:
                self.hold(mfn, writable=writable)

    # -- save and restore

    def save(self) -> list[list[int | None]]:
        return [
            [ref, a.pin, a.domid, a.mfn, a.start, a.length, int(a.sub_page), a.target, a.target_ref]
            for ref, a in sorted(self._active.items())
        ]

    def restore(self, data: list[list[Any]]) -> None:
        """:raises ValueError: the saved state contradicts itself."""
        active: dict[int, Active] = {}
        for ref, pin, domid, mfn, start, length, sub_page, target, target_ref in data:
            if not 0 <= ref < self._table.entries or not 0 < pin < 1 << 32 or ref in active:
                raise ValueError(f"active grant {ref} with uses {pin:#x}")
            if not 0 <= length <= PAGE_SIZE and not sub_page:
                raise ValueError(f"active grant {ref} of {length} bytes")
            active[ref] = Active(pin, domid, mfn, start, length, bool(sub_page), target, target_ref)
        self._active = active
