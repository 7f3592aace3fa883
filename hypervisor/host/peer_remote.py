"""A domain in another process as a `GrantPeer`: what this domain maps of it and copies from and to it."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable

from hypervisor import abi
from hypervisor.errors import HypervisorBug
from hypervisor.grants.peer import GrantError, Window
from hypervisor.host import peer_wire as wire
from hypervisor.host.peer_limits import SLOTS, Purse
from hypervisor.host.peer_link import PeerGone, PeerLink
from hypervisor.host.peer_shares import Imports, Place
from hypervisor.types import PAGE_SIZE

LOG = logging.getLogger(__name__)


REFUSALS_PER_SECOND, REFUSALS_AT_ONCE = 200, 1000
"""How often a guest may have a neighbour interrupted for nothing."""


@dataclasses.dataclass(slots=True)
class _Frame:
    """A frame that is mapped here. :ivar holds: of the neighbour's frame, by writable; `spare` the one `pin` took."""

    place: Place
    holds: dict[bool, int] = dataclasses.field(default_factory=lambda: {True: 0, False: 0})
    spare: dict[bool, int] = dataclasses.field(default_factory=lambda: {True: 0, False: 0})

    @property
    def in_use(self) -> bool:
        return any(self.holds.values()) or any(self.spare.values())


class _CopyPage:
    """A frame in use for copies, as its own owner: a copy of it here, which goes back piece by piece."""

    def __init__(self, remote: RemoteDomain, ref: int, data: bytes, *, readonly: bool) -> None:
        self._remote = remote
        self._ref = ref
        self._readonly = readonly
        self._known = data
        self._page = bytearray(data)

    @property
    def domid(self) -> int:
        return self._remote.domid

    @property
    def body(self) -> bytes:
        return wire.COPY_BODY.pack(self._ref, self._readonly)

    def page(self, mfn: int) -> memoryview:
        if self._readonly and self._remote.flush():
            # It may be the frame that was written.
            self._page[:] = self._remote.read_again(self.body)
        return memoryview(self._page)

    def flush(self) -> bool:
        """Send what was written; whether there was anything."""
        now = bytes(self._page)
        if self._readonly or now == self._known:
            return False
        self._remote.link.tell(wire.WRITE, self.body + wire.pack_pieces(self._known, now))
        self._known = now
        return True

    def hold(self, mfn: int, *, writable: bool) -> None:
        """The neighbour holds it already."""

    def drop(self, mfn: int, *, writable: bool) -> None:
        """With the use itself."""

    def pin(self, ref: int, mapper: int, increment: int, *, readonly: bool) -> int:
        raise HypervisorBug("a frame for copies is not mapped")

    def unpin(self, ref: int, increment: int, *, readonly: bool) -> None:
        raise HypervisorBug("a frame for copies is not mapped")

    def pin_copy(self, ref: int, mapper: int, *, readonly: bool, transitive: bool) -> Window:
        raise HypervisorBug("a frame for copies is none to copy from again")

    def unpin_copy(self, ref: int, *, readonly: bool) -> None:
        raise HypervisorBug("a frame for copies is none to copy from again")


class RemoteDomain:
    """For the run loop's thread.

    :param base: first machine frame of its extent; `frames` of them.
    :ivar on_free: called when nothing of a neighbour that is gone is in use any more.
    """

    def __init__(self, link: PeerLink, imports: Imports, base: int, frames: int) -> None:
        self.link = link
        self.imports = imports
        self.base = base
        self.frames = frames
        self._frames: dict[int, _Frame] = {}
        self._copies: dict[tuple[int, bool], _CopyPage] = {}
        self._pins = 0
        self._refused = Purse(REFUSALS_PER_SECOND, REFUSALS_AT_ONCE)
        self.on_free: Callable[[], None] = lambda: None

    @property
    def domid(self) -> int:
        return self.link.domid

    @property
    def in_use(self) -> bool:
        return bool(self._frames or self._pins)

    def _ask(self, kind: int, body: bytes) -> bytes:
        """:raises GrantError: its status; GNTST_bad_domain it has ended, GNTST_general_error it does not answer."""
        there = self.link.open
        try:
            status, answer = self.link.ask(kind, body)
        except PeerGone as exc:
            raise GrantError(abi.GNTST_general_error if there else abi.GNTST_bad_domain, str(exc)) from exc
        if status:
            self._refused.spend()
            # No neighbour makes up a status of its own.
            raise GrantError(status if -13 <= status < 0 else abi.GNTST_general_error, f"domain {self.domid} refuses")
        return answer

    # -- mappings

    def pin(self, ref: int, mapper: int, increment: int, *, readonly: bool) -> int:
        body = wire.PIN_BODY.pack(ref, increment, readonly)
        mfn = self._placed(self._ask(wire.PIN, body), writable=not readonly)
        self._frames[mfn].spare[not readonly] += 1
        self._pins += 1
        return mfn

    def _placed(self, answer: bytes, *, writable: bool) -> int:
        """Map what the neighbour shares at its machine address. :raises GrantError: it is not sane, or no room."""
        mfn, slot, kind = wire.PLACE_BODY.unpack(answer)
        place = Place(slot, bool(kind))
        if not self.base <= mfn < self.base + self.frames or slot >= SLOTS or (writable and not kind):
            self.link.end(f"it shares frame {mfn:#x} in slot {slot}")
            raise GrantError(abi.GNTST_general_error, f"domain {self.domid} shares a frame that is not its own")
        frame = self._frames.get(mfn)
        if frame is None or frame.place != place:
            try:
                self.imports.map(mfn - self.base, place)
            except OSError as exc:
                # The neighbour counts a use that is lost here: without the link it counts none.
                self.link.end(f"no room to map its frames: {exc}")
                raise GrantError(abi.GNTST_no_space, f"frame {mfn:#x} cannot be mapped: {exc}") from exc
            if frame is None:
                frame = self._frames[mfn] = _Frame(place)
            frame.place = place
        return int(mfn)

    def unpin(self, ref: int, increment: int, *, readonly: bool) -> None:
        self.link.tell(wire.UNPIN, wire.PIN_BODY.pack(ref, increment, readonly))
        self._pins -= 1
        self._look_whether_free()

    def _look_whether_free(self) -> None:
        if not self.link.open and not self.in_use:
            self.on_free()

    def hold(self, mfn: int, *, writable: bool) -> None:
        frame = self._frames.get(mfn)
        if frame is None:
            raise GrantError(abi.GNTST_general_error, f"frame {mfn:#x} is not shared")
        if frame.spare[writable]:
            frame.spare[writable] -= 1
        else:
            self._placed(self._ask(wire.HOLD, wire.HOLD_BODY.pack(mfn, writable)), writable=writable)
        frame.holds[writable] += 1

    def drop(self, mfn: int, *, writable: bool) -> None:
        frame = self._frames[mfn]
        frame.holds[writable] -= 1
        if not frame.in_use:
            del self._frames[mfn]
            self.imports.unmap(mfn - self.base)
        self.link.tell(wire.DROP, wire.HOLD_BODY.pack(mfn, writable))
        self._look_whether_free()

    def page(self, mfn: int) -> memoryview:
        if mfn not in self._frames:
            raise HypervisorBug(f"frame {mfn:#x} of domain {self.domid} is not mapped")
        return self.imports.page(mfn - self.base)

    # -- copies

    def pin_copy(self, ref: int, mapper: int, *, readonly: bool, transitive: bool) -> Window:
        self.flush()
        key = (ref, readonly)
        if key in self._copies:
            raise GrantError(abi.GNTST_general_error, f"grant {ref} of domain {self.domid} is in use for a copy")
        answer = self._ask(wire.PIN_COPY, wire.COPY_BODY.pack(ref, readonly))
        start, length = wire.WINDOW_BODY.unpack_from(answer)
        page = self._copies[key] = _CopyPage(self, ref, answer[wire.WINDOW_BODY.size :], readonly=readonly)
        return Window(0, start, min(length, PAGE_SIZE), page)

    def unpin_copy(self, ref: int, *, readonly: bool) -> None:
        page = self._copies.pop((ref, readonly))
        page.flush()
        self.link.tell(wire.UNPIN_COPY, page.body)

    def flush(self) -> bool:
        """Send what copies have written; whether there was anything."""
        return any([page.flush() for page in self._copies.values()])

    def read_again(self, body: bytes) -> bytes:
        """:raises GrantError."""
        return self._ask(wire.READ, body)
