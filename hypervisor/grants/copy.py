"""Copies between frames named by number or by grant (gnttab_copy in xen/common/grant_table.c)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from hypervisor import abi
from hypervisor.grants.peer import GrantError, GrantPeer
from hypervisor.types import PAGE_SIZE


@dataclasses.dataclass(frozen=True, slots=True)
class End:
    """Source or destination of one copy, as the guest gave it.

    :ivar number: grant reference if `granted`, else a machine frame of the domain's own.
    :ivar offset: first byte of the frame to copy, 0..65535 as the guest likes.
    """

    number: int
    domid: int
    offset: int
    granted: bool


@dataclasses.dataclass(slots=True)
class _Buffer:
    """A frame in use, kept for the next copy of the batch."""

    end: End
    peer: GrantPeer
    owner: GrantPeer
    mfn: int
    start: int
    length: int
    writable: bool

    def serves(self, end: End) -> bool:
        mine = self.end
        return (mine.number, mine.domid, mine.granted) == (end.number, end.domid, end.granted)


class CopyBatch:
    """The copies of one hypercall; `close` it whatever happened.

    :param domid: the domain that copies.
    :param own: its own grants and frames.
    :param find: the peer of a domain number, DOMID_SELF included; None when there is no such domain.
    """

    def __init__(self, domid: int, own: GrantPeer, find: Callable[[int], GrantPeer | None]) -> None:
        self._domid = domid
        self._own = own
        self._find = find
        self._source: _Buffer | None = None
        self._target: _Buffer | None = None

    def __enter__(self) -> CopyBatch:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def copy(self, source: End, target: End, size: int) -> None:
        """Copy `size` bytes, 0..65535 as the guest likes. :raises GrantError: nothing was copied."""
        try:
            self._copy(source, target, size)
        except GrantError:
            self.close()
            raise

    def _copy(self, source: End, target: End, size: int) -> None:
        if not self._same_domains(source, target):
            self.close()
            # Both before either is used: a bad destination leaves the source alone.
            for end in (source, target):
                self._peer_of(end)
        if self._source is None or not self._source.serves(source):
            self._drop_source()
            self._source = self._claim(source, writable=False)
        if self._target is None or not self._target.serves(target):
            self._drop_target()
            self._target = self._claim(target, writable=True)
        if source.offset + size > PAGE_SIZE or target.offset + size > PAGE_SIZE:
            raise GrantError(abi.GNTST_bad_copy_arg, "copy across the end of a page")
        for end, buffer in ((source, self._source), (target, self._target)):
            if end.offset < buffer.start or end.offset + size > buffer.start + buffer.length:
                raise GrantError(abi.GNTST_general_error, "copy outside the granted part of a page")
        data = bytes(self._source.owner.page(self._source.mfn)[source.offset : source.offset + size])
        self._target.owner.page(self._target.mfn)[target.offset : target.offset + size] = data

    def _same_domains(self, source: End, target: End) -> bool:
        return (
            self._source is not None
            and self._target is not None
            and self._source.end.domid == source.domid
            and self._target.end.domid == target.domid
            # A domain that was named for a grant must not serve for a frame number.
            and (source.granted or source.domid == abi.DOMID_SELF)
            and (target.granted or target.domid == abi.DOMID_SELF)
        )

    def _peer_of(self, end: End) -> GrantPeer:
        if not end.granted and end.domid != abi.DOMID_SELF:
            raise GrantError(abi.GNTST_permission_denied, "only an own frame can be named by number")
        peer = self._find(end.domid)
        if peer is None:
            raise GrantError(abi.GNTST_bad_domain, f"no domain {end.domid}")
        return peer

    def _claim(self, end: End, *, writable: bool) -> _Buffer:
        peer = self._peer_of(end)
        if end.granted:
            window = peer.pin_copy(end.number & 0xFFFF_FFFF, self._domid, readonly=not writable, transitive=True)
            buffer = _Buffer(end, peer, window.owner, window.mfn, window.start, window.length, writable=False)
        else:
            try:
                self._own.hold(end.number, writable=False)
            except GrantError as exc:
                raise GrantError(abi.GNTST_bad_page, exc.why) from exc
            buffer = _Buffer(end, peer, self._own, end.number, 0, PAGE_SIZE, writable=False)
        if writable:
            try:
                buffer.owner.hold(buffer.mfn, writable=True)
            except GrantError:
                self._give_back(buffer, readonly=False)
                raise
            # One hold with the type is enough.
            buffer.owner.drop(buffer.mfn, writable=False)
            buffer.writable = True
        return buffer

    def _drop_source(self) -> None:
        buffer, self._source = self._source, None
        if buffer is not None:
            self._give_back(buffer, readonly=True)

    def _drop_target(self) -> None:
        buffer, self._target = self._target, None
        if buffer is not None:
            self._give_back(buffer, readonly=False)

    @staticmethod
    def _give_back(buffer: _Buffer, *, readonly: bool) -> None:
        if buffer.end.granted:
            buffer.peer.unpin_copy(buffer.end.number & 0xFFFF_FFFF, readonly=readonly)
        buffer.owner.drop(buffer.mfn, writable=buffer.writable)

    def close(self) -> None:
        """Give back what the last copies used."""
        self._drop_source()
        self._drop_target()
