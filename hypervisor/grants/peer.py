"""What a grant operation needs of the domain that granted: its own, or another one of the host.

Names follow xen/common/grant_table.c: a grant is *pinned* for as long as somebody
uses it, and each mapping or copy besides *holds* the frame itself.
"""

from __future__ import annotations

import dataclasses
from typing import Protocol

from hypervisor import abi

COUNTER_BITS = 8
HOST_WRITE, HOST_READ, DEVICE_WRITE, DEVICE_READ = (1 << COUNTER_BITS * n for n in range(4))
"""One use in an active entry's `pin`: four counters of 8 bits (GNTPIN_*)."""

HOST_WRITERS = HOST_WRITE * 0xFF
WRITERS = HOST_WRITERS | DEVICE_WRITE * 0xFF

HOST_DOMID = 0
"""The domain of the back ends and tools. It exists for every guest; what it grants, it grants to nobody here."""


class GrantError(Exception):
    """One operation of a batch fails.

    :ivar status: GNTST_*, below 0 (public/grant_table.h).
    """

    def __init__(self, status: int, why: str = "") -> None:
        super().__init__(status, why)
        self.status = status
        self.why = why


def increment_of(flags: int) -> int:
    """What a mapping with these GNTMAP_* flags adds to `pin`; 0 when it maps nowhere."""
    readonly = flags & abi.GNTMAP_readonly
    increment = 0
    if flags & abi.GNTMAP_device_map:
        increment += DEVICE_READ if readonly else DEVICE_WRITE
    if flags & abi.GNTMAP_host_map:
        increment += HOST_READ if readonly else HOST_WRITE
    return increment


@dataclasses.dataclass(frozen=True, slots=True)
class Window:
    """A pinned part of a frame, for a copy.

    :ivar start: first byte of it that may be copied, 0..4095 if the granter is sane; `length` bytes of them.
    :ivar owner: whose frame it is; not the granter for a transitive grant.
    """

    mfn: int
    start: int
    length: int
    owner: GrantPeer


class GrantPeer(Protocol):
    """A domain with a grant table.

    The domain stays there, dying or not, until everything pinned and held was given back.
    Nothing here may call back into the mapper.

    :ivar domid: its number.
    """

    @property
    def domid(self) -> int: ...

    def pin(self, ref: int, mapper: int, increment: int, *, readonly: bool) -> int:
        """Use a grant for a mapping by domain `mapper`; the machine frame. :raises GrantError: no use was taken."""
        ...

    def unpin(self, ref: int, increment: int, *, readonly: bool) -> None:
        """Give back what `pin` took."""
        ...

    def pin_copy(self, ref: int, mapper: int, *, readonly: bool, transitive: bool) -> Window:
        """Use a grant for a copy; its owner holds the frame too, but not as writable.

        :param transitive: whether the grant may refer to another domain's grant.
        :raises GrantError: nothing was taken.
        """
        ...

    def unpin_copy(self, ref: int, *, readonly: bool) -> None:
        """Give back the use that `pin_copy` took; not the hold of the frame."""
        ...

    def hold(self, mfn: int, *, writable: bool) -> None:
        """Keep a frame of the domain, and keep it from any use but as plain memory if `writable`.

        :raises GrantError: it is not the domain's, or is a page table.
        """
        ...

    def drop(self, mfn: int, *, writable: bool) -> None:
        """Give back one `hold`; a writable one may have written."""
        ...

    def page(self, mfn: int) -> memoryview:
        """The 4096 bytes of a frame that is held; writable."""
        ...


class HostDomain:
    """Domain 0 as guests see it: one grant frame, all of whose entries are invalid."""

    _ENTRIES = 512

    @property
    def domid(self) -> int:
        return HOST_DOMID

    def _refuse(self, ref: int) -> GrantError:
        if ref >= self._ENTRIES:
            return GrantError(abi.GNTST_bad_gntref, f"domain 0 has no grant {ref}")
        return GrantError(abi.GNTST_general_error, f"grant {ref} of domain 0 is invalid")

    def pin(self, ref: int, mapper: int, increment: int, *, readonly: bool) -> int:
        raise self._refuse(ref)

    def pin_copy(self, ref: int, mapper: int, *, readonly: bool, transitive: bool) -> Window:
        raise self._refuse(ref)

    def hold(self, mfn: int, *, writable: bool) -> None:
        raise GrantError(abi.GNTST_general_error, f"frame {mfn:#x} is not domain 0's to give")

    def page(self, mfn: int) -> memoryview:
        raise GrantError(abi.GNTST_bad_page, f"frame {mfn:#x} is not domain 0's to give")

    def unpin(self, ref: int, increment: int, *, readonly: bool) -> None:
        """Nothing was ever taken."""

    def unpin_copy(self, ref: int, *, readonly: bool) -> None:
        """Nothing was ever taken."""

    def drop(self, mfn: int, *, writable: bool) -> None:
        """Nothing was ever taken."""
