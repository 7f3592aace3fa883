"""From the switch to the guest: its receive rings (public/io/netif.h).

Frames that find no posted buffers stay in the socket, which fills, so that the switch drops:
what a guest that does not read can hold is bounded by the socket.
"""

from __future__ import annotations

import dataclasses
import socket
import zlib
from collections.abc import Callable

from hypervisor import abi
from hypervisor.devices.driver import Copy, EventPort, GuestLink, Loop
from hypervisor.devices.net import headers, message, offload
from hypervisor.devices.net.headers import Frame
from hypervisor.devices.net.message import DATA_VALID, GSO_ECN, GSO_TCPV4, HEADER_BYTES, MAX_FRAME, NEEDS_CSUM, Header
from hypervisor.devices.net.rings import RxRequest, RxResponse, RxRing, gso_extra

PAGE = 4096
BATCH_FRAMES = 64
BATCHES = 8


@dataclasses.dataclass(frozen=True, slots=True)
class Offloads:
    """What the front end can take (its ``feature-*`` nodes)."""

    sg: bool = False
    gso4: bool = False
    gso6: bool = False
    csum4: bool = True
    csum6: bool = False

    def takes(self, header: Header, version6: bool) -> bool:
        gso = header.gso_type & ~GSO_ECN
        if gso:
            return self.gso4 if gso == GSO_TCPV4 else self.gso6
        if header.flags & NEEDS_CSUM:
            return self.csum6 if version6 else self.csum4
        return True


@dataclasses.dataclass(slots=True)
class ReceiveCounters:
    bytes: int = 0
    packets: int = 0
    dropped: int = 0


class Queue:
    """A receive ring and what this batch has put into it."""

    def __init__(self, ring: RxRing, event: EventPort) -> None:
        self.ring = ring
        self.event = event
        self.requests: list[RxRequest] = []
        self.responses: list[RxResponse] = []
        self.copied: list[tuple[int, int]] = []  # index of a response, index of its copy

    def take(self) -> RxRequest:
        request = self.ring.take()
        self.requests.append(request)
        return request

    def finish(self, statuses: list[int]) -> int:
        """Answer; how many frames were spoilt by a grant that cannot be written."""
        if not self.responses:
            return 0
        spoilt = 0
        for index, copy in self.copied:
            if statuses[copy]:
                self.responses[index] = self.responses[index]._replace(status=abi.NETIF_RSP_ERROR)
                spoilt += 1
        if self.ring.respond(self.requests, self.responses):
            self.event.notify()
        self.requests, self.responses, self.copied = [], [], []
        return spoilt


class Receiver:
    """:param accept: whether the guest wants a frame (multicast filter)."""

    def __init__(
        self,
        link: GuestLink,
        loop: Loop,
        queues: list[Queue],
        sock: socket.socket,
        offloads: Offloads,
        accept: Callable[[Frame], bool],
        guard: Callable[[Callable[[], None]], Callable[[], None]],
    ) -> None:
        self.counters = ReceiveCounters()
        self._link = link
        self._loop = loop
        self._queues = queues
        self._sock = sock
        self._offloads = offloads
        self._accept = accept
        self._work = guard(self.work)
        self._head = bytearray(HEADER_BYTES)
        self._held: list[tuple[Header, bytes]] = []
        self._listening = False
        self._closed = False
        self._copies: list[Copy] = []
        self._at = 0
        self.hungup = False
        for queue in queues:
            queue.ring.ask()

    def close(self) -> None:
        self._closed = True
        self._listen(False)
        for queue in self._queues:
            queue.ring.close()

    def notify(self) -> None:
        """Have the guest look at its rings."""
        for queue in self._queues:
            queue.event.notify()

    def work(self) -> None:
        """Hand the guest what has arrived. :raises DeviceBroken, LinkClosed."""
        if self._closed:
            return
        for _ in range(BATCHES):
            more = self._batch()
            if not more:
                return
        self._loop.call_soon(self._work)

    def _batch(self) -> bool:
        """One round trip's worth of frames; whether there may be more."""
        self._at, self._copies = 0, []
        more = True
        try:
            for _ in range(BATCH_FRAMES):
                if self._held:
                    if not self._place_held():
                        more = False
                        break
                elif self._at + MAX_FRAME > len(self._link.buffer):
                    break
                elif not self._receive():
                    more = False
                    break
        finally:
            self._finish()
        self._listen(not self._held and not self.hungup)
        return more

    def _finish(self) -> None:
        statuses = self._link.copy(self._copies) if self._copies else []
        for queue in self._queues:
            self.counters.dropped += queue.finish(statuses)

    def _receive(self) -> bool:
        """Take a frame from the switch; False: there is none."""
        room = self._link.buffer[self._at : self._at + MAX_FRAME]
        try:
            count, _, flags, _ = self._sock.recvmsg_into((self._head, room))
        except BlockingIOError:
            return False
        except ConnectionError:
            count, flags = 0, 0
        if not count:
            self.hungup = True  # the host process gives another socket, or closes the device
            return False
        size = count - HEADER_BYTES
        if flags & socket.MSG_TRUNC or size < message.MIN_FRAME:
            self.counters.dropped += 1
            return True
        frame = room[:size]
        header = message.parse(self._head)
        if not self._accept(frame):
            return True
        if self._offloads.takes(header, headers.ethertype(frame) == headers.IPV6) and self._fits(size):
            if not self._place(header, frame):
                self._held.append((header, bytes(frame)))
            return True
        self._convert(header, bytes(frame))
        return True

    def _fits(self, size: int) -> bool:
        return self._offloads.sg or size <= PAGE

    def _convert(self, header: Header, frame: bytes) -> None:
        """In software, what the front end cannot do itself."""
        plain = offload.plain(header, frame)
        if plain is None or not all(self._fits(len(piece)) for piece in plain):
            self.counters.dropped += 1
            return
        self._held.extend((Header(DATA_VALID if header.flags else 0), bytes(piece)) for piece in plain)

    def _place_held(self) -> bool:
        """Put the oldest held frame into the buffer; False: there are no buffers for it."""
        header, frame = self._held[0]
        if self._at + len(frame) > len(self._link.buffer):
            self._finish()
            self._at, self._copies = 0, []
        room = self._link.buffer[self._at : self._at + len(frame)]
        room[:] = frame
        if not self._place(header, room):
            return False
        del self._held[0]
        return True

    def _place(self, header: Header, frame: memoryview) -> bool:
        """Plan the copies of the frame that lies at `_at`; False: too few buffers are posted."""
        size = len(frame)
        queue = self._queue(frame)
        gso = header.gso_type & ~GSO_ECN
        slots = -(-size // PAGE) + bool(gso)
        if queue.ring.waiting() < slots and queue.ring.ask(slots) is False:
            return False
        flags = _flags(header, extra=bool(gso))
        for offset in range(0, size, PAGE):
            request = queue.take()
            length = min(PAGE, size - offset)
            more = abi.NETRXF_more_data if offset + length < size else 0
            queue.copied.append((len(queue.responses), len(self._copies)))
            queue.responses.append(RxResponse(request.id, flags | more, length))
            self._copies.append(Copy(request.gref, 0, length, self._at + offset, True))
            if gso and not offset:
                queue.take()
                kind = abi.XEN_NETIF_GSO_TYPE_TCPV4 if gso == GSO_TCPV4 else abi.XEN_NETIF_GSO_TYPE_TCPV6
                queue.responses.append(RxResponse(0, 0, 0, gso_extra(kind, header.gso_size)))
            flags = 0
        self._at += size
        self.counters.packets += 1
        self.counters.bytes += size
        return True

    def _queue(self, frame: Frame) -> Queue:
        """A flow stays on one queue, so that its order is kept."""
        if len(self._queues) == 1:
            return self._queues[0]
        layers = headers.locate(frame)
        if layers is None:
            return self._queues[0]
        key = bytes(frame[26:34] if layers.version == 4 else frame[22:54])
        if not layers.fragment and layers.protocol in (headers.TCP, headers.UDP):
            key += bytes(frame[layers.l4 : layers.l4 + 4])
        return self._queues[zlib.crc32(key) % len(self._queues)]

    def _listen(self, on: bool) -> None:
        if on and not self._listening:
            self._loop.add_reader(self._sock.fileno(), self._work)
        elif not on and self._listening:
            self._loop.remove_reader(self._sock.fileno())
        self._listening = on


def _flags(header: Header, *, extra: bool) -> int:
    flags = abi.NETRXF_extra_info if extra else 0
    if header.flags & NEEDS_CSUM:
        return flags | abi.NETRXF_csum_blank | abi.NETRXF_data_validated
    if header.flags & DATA_VALID:
        return flags | abi.NETRXF_data_validated
    return flags
