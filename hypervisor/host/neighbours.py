"""The other domains of the host, as one domain process knows them: grants and event channels across processes.

The host process introduces two domain processes when one of them asks for the other (`hypervisor.host.introductions`);
from then on they speak directly. A domain that nobody could introduce does not exist, as far as its neighbours go.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from typing import Any

from hypervisor import abi
from hypervisor.abi import errno
from hypervisor.domain import Domain
from hypervisor.errors import HostFailure, XenError
from hypervisor.grants.peer import GrantPeer
from hypervisor.host import peer_wire as wire
from hypervisor.host.channel import close_all
from hypervisor.host.guest_link_state import LinkTarget
from hypervisor.host.peer_limits import Purse
from hypervisor.host.peer_link import Desk, PeerGone, PeerLink
from hypervisor.host.peer_remote import RemoteDomain
from hypervisor.host.peer_server import PeerServer
from hypervisor.host.peer_shares import Exports, Imports
from hypervisor.host.poller import Poller
from hypervisor.memory import layout
from hypervisor.types import PAGE_SIZE

LOG = logging.getLogger(__name__)

MAX_NEIGHBOURS = 32
INTRODUCTION = 2.0
"""Seconds that a hypercall waits for the host process."""
ASKS_PER_SECOND, ASKS_AT_ONCE = 200, 1000
"""How often a guest may have the host process look for a domain."""
PEER_FDS = 5
"""Socket, exports writable and readable, imports writable and readable."""


class Neighbours:
    """Belongs to the run loop's thread, but for `introduce`.

    :param memory_fd: the domain's memfd.
    :param ask: tells the host process that domain number so-and-so is wanted; False: it is away.
    :param kept: whether a driver process has a frame of this domain mapped.
    :ivar shared: frames that neighbours use; they are not in the domain's own memfd now.
    """

    def __init__(
        self,
        domain: Domain,
        memory_fd: int,
        post: Callable[[Callable[[], None]], None],
        poller: Poller,
        ask: Callable[[int], bool],
        kept: Callable[[int], bool] = lambda _index: False,
        shared: set[int] | None = None,
    ) -> None:
        self._domain = domain
        self._memory_fd = memory_fd
        self._poller = poller
        self._ask = ask
        self._kept = kept
        self._desk = Desk(post)
        self._domid = domain.config.domid
        self._peers: dict[int, RemoteDomain] = {}
        self._servers: dict[int, PeerServer] = {}
        self._arrived: dict[int, tuple[int, int, list[int]] | None] = {}
        self._ended = False
        self._asks = Purse(ASKS_PER_SECOND, ASKS_AT_ONCE)
        self.shared: set[int] = set() if shared is None else shared

    # -- from the host process, in the channel thread

    def introduce(self, message: Mapping[str, Any], fds: list[int]) -> None:
        """Op ``peer``: ``domid``, and if there is such a domain ``base_mfn``, ``frames`` and `PEER_FDS` descriptors.

        :raises HostFailure: it makes no sense.
        """
        domid, base, frames = (_number(message.get(name)) for name in ("domid", "base_mfn", "frames"))
        good = 0 < domid < abi.DOMID_FIRST_RESERVED and domid != self._domid
        if fds:
            good = good and len(fds) == PEER_FDS and layout.FIRST_MFN <= base < base + frames <= layout.MAX_MFN
        if not good or self._ended:
            close_all(fds)
            raise HostFailure(f"op peer of domain {domid} with {len(fds)} descriptors is of no use here")
        found = (base, frames, fds) if fds else None
        self._desk.put(lambda: self._meet(domid, found))

    def refresh(self) -> None:
        """Bring the domain's memfd up to date, for who reads that: frames that neighbours use lie elsewhere.

        In the channel thread, while the guest is paused.
        """
        done = threading.Event()

        def work() -> None:
            for server in self._servers.values():
                server.refresh()
            done.set()

        if self._servers and not self._ended:
            self._desk.put(work)
            done.wait(INTRODUCTION)

    # -- the run loop's thread

    def entangled(self) -> str:
        """Which neighbour uses something of this domain's, or is used by it; "" for none."""
        for domid, peer in self._peers.items():
            server = self._servers.get(domid)
            if peer.in_use or (server is not None and not server.idle):
                return f"it and domain {domid} share frames or event channels"
        return "it shares frames with another domain" if self.shared else ""

    def end(self) -> None:
        """The guest runs no more: neighbours see the end of their links, frames are back in the domain's memory."""
        self._ended = True
        for domid, peer in list(self._peers.items()):
            peer.link.end("the guest has ended")
            if domid in self._servers:
                self._gone(domid, self._servers[domid])

    def _meet(self, domid: int, found: tuple[int, int, list[int]] | None) -> None:
        self._arrived[domid] = None
        if found is None:
            return
        base, frames, fds = found
        old = self._peers.get(domid)
        if old is not None:
            # Introduced anew: what the link before had is over.
            old.link.end("introduced again")
            self._desk.serve()
        if len(self._peers) >= MAX_NEIGHBOURS:
            self._make_room()
        if domid in self._peers or len(self._peers) >= MAX_NEIGHBOURS or self._overlaps(base, frames):
            LOG.warning("domain %d cannot be a neighbour now", domid)
            close_all(fds)
            return
        try:
            imports = Imports(frames, fds[3], fds[4])
        except OSError as exc:
            LOG.warning("no room to map frames of domain %d: %s", domid, exc)
            close_all(fds)
            return
        domain = self._domain
        link = PeerLink(domid, fds[0], self._poller, self._desk, lambda: self._gone(domid, server))
        exports = Exports(domain.memory, self._memory_fd, fds[1], fds[2], self.shared)
        server = PeerServer(domid, domain.grants.own, domain.events, exports, domain.memory.index, self._kept)
        link.server = server
        domain.engine.map_neighbour(base << 12, frames * PAGE_SIZE, imports.address)
        peer = self._peers[domid] = RemoteDomain(link, imports, base, frames)
        self._servers[domid] = server
        peer.on_free = lambda: self._desk.put(lambda: self._forget(domid))
        self._poller.call(link.start)

    def _make_room(self) -> None:
        """Part with a neighbour that has nothing of this domain's, nor this domain of its: it may ask again."""
        for domid, server in self._servers.items():
            if server.idle and not self._peers[domid].in_use:
                self._peers[domid].link.end("making room for another")
                self._desk.serve()
                return

    def _overlaps(self, base: int, frames: int) -> bool:
        """Whether the extent is in use still, by a domain that is gone but mapped."""
        memory = self._domain.memory
        extents = [(memory.base_mfn, memory.frames), *((p.base, p.frames) for p in self._peers.values())]
        return any(base < start + size and start < base + frames for start, size in extents)

    def _gone(self, domid: int, server: PeerServer) -> None:
        if self._servers.get(domid) is server:
            del self._servers[domid]
            server.release()
            self._forget(domid)

    def _forget(self, domid: int) -> None:
        """Let go of a neighbour that is gone, unless its frames are mapped here."""
        peer = self._peers.get(domid)
        if peer is not None and not peer.link.open and not peer.in_use:
            del self._peers[domid]
            self._domain.engine.unmap_neighbour(peer.base << 12, peer.frames * PAGE_SIZE)
            peer.imports.close()

    def _find(self, domid: int, *, alive: bool = False) -> RemoteDomain | None:
        peer = self._peers.get(domid)
        if peer is not None and not peer.link.open:
            self._forget(domid)
            if alive:
                return None
            peer = self._peers.get(domid)
        if peer is None and 0 < domid < abi.DOMID_FIRST_RESERVED and domid != self._domid and not self._ended:
            # A guest that asks for all numbers there are slows itself down, not the host process.
            self._asks.spend()
            self._arrived.pop(domid, None)
            if self._ask(domid):
                self._desk.wait(lambda: True if domid in self._arrived else None, INTRODUCTION)
                peer = self._peers.get(domid)
        return peer

    def find(self, domid: int) -> GrantPeer | None:
        """For `Grants.find_peer`."""
        return self._find(domid)

    def exists(self, domid: int) -> bool:
        peer = self._find(domid, alive=True)
        return peer is not None and peer.link.open

    # -- the far ends of event channels

    def send(self, peer: int, peer_port: int, local_port: int) -> None:
        found = self._peers.get(peer)
        if found is not None:
            found.link.tell(wire.SEND, wire.PORTS_BODY.pack(peer_port, local_port))

    def bind(self, peer: int, peer_port: int, local_port: int) -> None:
        """:raises XenError: ESRCH there is no such domain, EINVAL the port does not wait for this one."""
        found = self._find(peer, alive=True)
        if found is None:
            raise XenError(errno.ESRCH, f"there is no domain {peer}")
        try:
            status, _ = found.link.ask(wire.BIND, wire.PORTS_BODY.pack(peer_port, local_port))
        except PeerGone as exc:
            raise XenError(errno.ESRCH, str(exc)) from exc
        if status:
            raise XenError(errno.EINVAL, f"port {peer_port} of domain {peer} does not wait for domain {self._domid}")

    def closed(self, peer: int, peer_port: int, local_port: int) -> None:
        found = self._peers.get(peer)
        if found is not None:
            found.link.tell(wire.CLOSED, wire.PORTS_BODY.pack(peer_port, local_port))


def neighbours_of(target: LinkTarget, memory_fd: int, poller: Poller, ask: Callable[[int], bool]) -> Neighbours | None:
    """Join a machine with its neighbours."""
    domain = target.machine
    if domain is None:
        return None
    made = Neighbours(domain, memory_fd, target.post, poller, ask, lambda index: index in target.mapped, target.shared)
    domain.grants.find_peer = made.find
    target.router.neighbours = made
    return made


def _number(value: object) -> int:
    return value if type(value) is int else 0
