"""A neighbour's use of this domain: its requests against the grants and event channels here.

What the neighbour says is hostile: it can give back only what it took, and its process's death gives back all.
"""

from __future__ import annotations

import collections
from collections.abc import Callable
from typing import Any

from hypervisor import abi
from hypervisor.errors import XenError
from hypervisor.evtchn.core import ChannelState, EventChannels
from hypervisor.grants.active import ActiveGrants
from hypervisor.grants.peer import DEVICE_READ, DEVICE_WRITE, HOST_READ, HOST_WRITE, GrantError, Window
from hypervisor.host import peer_wire as wire
from hypervisor.host.peer_shares import Exports, Place

MAX_HOLDS = 4096
"""Of one frame by one neighbour."""
_INCREMENTS = {
    True: frozenset((HOST_READ, DEVICE_READ, HOST_READ + DEVICE_READ)),
    False: frozenset((HOST_WRITE, DEVICE_WRITE, HOST_WRITE + DEVICE_WRITE)),
}


class PeerServer:
    """For the run loop's thread.

    :param index: the place of a machine frame in this domain's memory, -1 for none.
    :param kept: whether a frame must stay where it is (a driver process has it mapped).
    """

    def __init__(
        self,
        domid: int,
        grants: ActiveGrants,
        events: EventChannels,
        exports: Exports,
        index: Callable[[int], int],
        kept: Callable[[int], bool],
    ) -> None:
        self._domid = domid
        self._grants = grants
        self._events = events
        self._exports = exports
        self._index = index
        self._kept = kept
        self._pins: collections.Counter[tuple[int, int, bool]] = collections.Counter()
        self._holds: collections.Counter[tuple[int, bool]] = collections.Counter()
        self._lingering: set[int] = set()
        self._copies: dict[tuple[int, bool], Window] = {}

    def execute(self, kind: int, body: bytes) -> tuple[int, bytes] | None:
        """See `hypervisor.host.peer_link.Server`."""
        try:
            return self._execute(kind, body)
        except GrantError as exc:
            return exc.status, b""
        except XenError as exc:
            return exc.errno, b""

    def _execute(self, kind: int, body: bytes) -> tuple[int, bytes] | None:
        if kind in (wire.PIN, wire.UNPIN):
            ref, increment, readonly = wire.PIN_BODY.unpack(body)
            if increment not in _INCREMENTS[bool(readonly)]:
                raise wire.BadForm(f"uses {increment:#x} of a grant")
            if kind == wire.PIN:
                return 0, self._pin(ref, increment, readonly=bool(readonly))
            self._unpin(ref, increment, readonly=bool(readonly))
            return None
        if kind in (wire.HOLD, wire.DROP):
            mfn, writable = wire.HOLD_BODY.unpack(body)
            if kind == wire.HOLD:
                return 0, self._hold_again(mfn, writable=bool(writable))
            self._drop(mfn, writable=bool(writable))
            return None
        if kind in (wire.PIN_COPY, wire.READ, wire.WRITE, wire.UNPIN_COPY):
            ref, readonly = wire.COPY_BODY.unpack_from(body)
            return self._copy(kind, ref, body[wire.COPY_BODY.size :], readonly=bool(readonly))
        return self._event(kind, *wire.PORTS_BODY.unpack(body))

    # -- mappings

    def _pin(self, ref: int, increment: int, *, readonly: bool) -> bytes:
        mfn = self._grants.pin(ref, self._domid, increment, readonly=readonly)
        try:
            place = self._hold(mfn, writable=not readonly)
        except GrantError:
            self._grants.unpin(ref, increment, readonly=readonly)
            raise
        self._pins[ref, increment, readonly] += 1
        return place

    def _unpin(self, ref: int, increment: int, *, readonly: bool) -> None:
        """A mapping for host and device may be given back in two parts."""
        key = (ref, increment, readonly)
        if not self._pins[key]:
            both = next((k for k in self._pins if k[0] == ref and k[2] == readonly and _parts(k[1], increment)), None)
            if both is None or not self._pins[both]:
                raise wire.BadForm(f"grant {ref} is given back more often than taken")
            _less(self._pins, both)
            self._pins[ref, both[1] - increment, readonly] += 1
        else:
            _less(self._pins, key)
        self._grants.unpin(ref, increment, readonly=readonly)

    def _hold(self, mfn: int, *, writable: bool) -> bytes:
        index = self._index(mfn)
        if self._holds[mfn, writable] >= MAX_HOLDS:
            raise GrantError(abi.GNTST_general_error, f"frame {mfn:#x} is mapped {MAX_HOLDS} times")
        if self._kept(index):
            raise GrantError(abi.GNTST_general_error, f"frame {mfn:#x} is mapped by a driver process")
        self._grants.hold(mfn, writable=writable)
        try:
            place: Place = self._exports.share(index, writable=writable)
        except GrantError:
            self._grants.drop(mfn, writable=writable)
            raise
        self._holds[mfn, writable] += 1
        return wire.PLACE_BODY.pack(mfn, place.slot, place.writable)

    def _hold_again(self, mfn: int, *, writable: bool) -> bytes:
        if not self._holds[mfn, writable]:
            raise wire.BadForm(f"frame {mfn:#x} is not held")
        return self._hold(mfn, writable=writable)

    def _drop(self, mfn: int, *, writable: bool) -> None:
        if not self._holds[mfn, writable]:
            raise wire.BadForm(f"frame {mfn:#x} is dropped more often than held")
        _less(self._holds, (mfn, writable))
        if writable and not self._holds[mfn, True] and self._holds[mfn, False] and mfn not in self._lingering:
            # The neighbour's process can write the frame until it is moved back: it must not become a page table.
            self._lingering.add(mfn)
            return
        if not self._holds[mfn, True] and not self._holds[mfn, False]:
            self._exports.unshare(self._index(mfn))
            if mfn in self._lingering:
                self._lingering.discard(mfn)
                self._grants.drop(mfn, writable=True)
        self._grants.drop(mfn, writable=writable)

    # -- copies

    def _copy(self, kind: int, ref: int, rest: bytes, *, readonly: bool) -> tuple[int, bytes] | None:
        key = (ref, readonly)
        if kind == wire.PIN_COPY:
            if key in self._copies:
                raise wire.BadForm(f"grant {ref} is in use for a copy")
            window = self._copies[key] = self._pin_copy(ref, readonly=readonly)
            return 0, wire.WINDOW_BODY.pack(window.start, window.length) + self._page(window)
        if key not in self._copies:
            raise wire.BadForm(f"grant {ref} is not in use for a copy")
        window = self._copies[key]
        if kind == wire.READ:
            return 0, self._page(window)
        if kind == wire.UNPIN_COPY:
            self._unpin_copy(ref, self._copies.pop(key), readonly=readonly)
            return None
        if readonly:
            raise wire.BadForm(f"a write to grant {ref}, which is in use for reading")
        page = window.owner.page(window.mfn)
        for offset, data in wire.unpack_pieces(rest):
            if offset < window.start or offset + len(data) > window.start + window.length:
                raise wire.BadForm(f"a write outside the granted part of grant {ref}")
            page[offset : offset + len(data)] = data
        return None

    @staticmethod
    def _page(window: Window) -> bytes:
        """The granted part; the rest is zeros."""
        end = min(window.start + window.length, 4096)
        part = bytes(window.owner.page(window.mfn)[window.start : end])
        return (bytes(min(window.start, 4096)) + part).ljust(4096, b"\0")

    def _pin_copy(self, ref: int, *, readonly: bool) -> Window:
        # Not on to a third domain: two would wait for one another's neighbours.
        window = self._grants.pin_copy(ref, self._domid, readonly=readonly, transitive=False)
        if not readonly:
            try:
                window.owner.hold(window.mfn, writable=True)
            except GrantError:
                self._unpin_copy(ref, window, readonly=readonly, held=False)
                raise
            window.owner.drop(window.mfn, writable=False)
        return window

    def _unpin_copy(self, ref: int, window: Window, *, readonly: bool, held: bool = True) -> None:
        self._grants.unpin_copy(ref, readonly=readonly)
        window.owner.drop(window.mfn, writable=held and not readonly)

    # -- events

    def _event(self, kind: int, port: int, sender: int) -> tuple[int, bytes] | None:
        events = self._events
        if kind == wire.BIND:
            events.accept(port, self._domid, sender)
            return 0, b""
        try:
            channel = events.status(port)
        except XenError:
            return None
        if channel.state is ChannelState.INTERDOMAIN and (channel.peer, channel.peer_port) == (self._domid, sender):
            if kind == wire.SEND:
                events.pend(port)
            else:
                events.peer_closed(port)
        return None

    @property
    def idle(self) -> bool:
        """The neighbour uses nothing."""
        channels = self._events.channels
        return not (self._pins or self._holds or self._copies) and not any(
            c.state is ChannelState.INTERDOMAIN and c.peer == self._domid for c in channels
        )

    def refresh(self) -> None:
        """Bring the domain's memfd up to date."""
        self._exports.refresh()

    # -- the end of the neighbour

    def release(self) -> None:
        """Give back all that it used; its ports wait for it anew."""
        for (ref, readonly), window in self._copies.items():
            self._unpin_copy(ref, window, readonly=readonly)
        self._copies.clear()
        self._exports.close()
        for (mfn, writable), count in self._holds.items():
            for _ in range(count):
                self._grants.drop(mfn, writable=writable)
        self._holds.clear()
        for mfn in self._lingering:
            self._grants.drop(mfn, writable=True)
        self._lingering.clear()
        for (ref, increment, readonly), count in self._pins.items():
            for _ in range(count):
                self._grants.unpin(ref, increment, readonly=readonly)
        self._pins.clear()
        for port, channel in enumerate(self._events.channels):
            if channel.state is ChannelState.INTERDOMAIN and channel.peer == self._domid:
                self._events.peer_closed(port)


def _less(counter: collections.Counter[Any], key: tuple[int, ...]) -> None:
    counter[key] -= 1
    if not counter[key]:
        del counter[key]


def _parts(whole: int, part: int) -> bool:
    return whole > part and whole - part in (HOST_READ, HOST_WRITE, DEVICE_READ, DEVICE_WRITE)
